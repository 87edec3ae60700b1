"""The server: in order, stopped when nobody listens, nothing but its own page and to nobody else's pages."""

import asyncio
import http.client
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
import torch

from lightning_diffclf import DiffusionClassifier, Draws
from lightning_diffclf.app import server
from lightning_diffclf.data.images import transform
from tests.app.conftest import LABELS, served
from tests.gaussians import Gaussians

BOUNDARY = "a-line-that-does-not-occur"


class Gated(Gaussians):
    """A denoiser whose calls wait until they are let through, one after the other."""

    def __init__(self):
        super().__init__()
        self.calls, self.let = 0, threading.Semaphore(0)

    def predict(self, x_t, t, candidate):
        self.calls += 1
        assert self.let.acquire(timeout=60)
        return super().predict(x_t, t, candidate)


class Slow:
    """A network of the menu that is as slow as it is told to be."""

    name, kind, size, device = "slow", "waits", (3, 3), torch.device("cpu")

    def __init__(self):
        self.denoiser = Gated()
        self.classes = self.labels = self.denoiser.candidates.names

    def classifier(self, labels, rule, draws):
        return DiffusionClassifier(self.denoiser, Draws(draws), microbatch=7)

    def pixels(self, image):
        return transform(3, 3)(image)[:1]


def asked(address, picture, **fields):
    """A connection over which a question was asked."""
    form = {"network": "assets/sd_digits", "labels": LABELS, "rule": "LikelihoodRatio", "draws": "10"} | fields
    parts = [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in form.items()]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="picture"; filename="../../x.png"\r\n\r\n'
    body = "".join(parts).encode() + head.encode() + picture + f"\r\n--{BOUNDARY}--\r\n".encode()
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("POST", "/decide", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})
    return connection


def events_of(connection):
    return (json.loads(line) for line in connection.getresponse())


def got(address, path, **headers):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


@pytest.fixture(scope="module")
def page(tiny, digits):
    with served([tiny], digits) as address:
        yield address


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_questions_are_answered_in_order_and_stop_when_nobody_listens(digits):
    network = Slow()
    with served([network]) as address:
        first = asked(address, digits[0], network="slow", labels="")
        until(lambda: network.denoiser.calls == 1)
        second, third = (asked(address, digits[k], network="slow", labels="") for k in (1, 2))
        heard = events_of(third)
        assert next(heard) == {"kind": "waiting", "before": 2}
        second.close()  # which has not begun, and never will
        assert next(heard) == {"kind": "waiting", "before": 1}
        first.close()  # in the middle of a call
        time.sleep(0.2)
        network.denoiser.let.release()  # that call ends; nothing follows it
        assert next(heard)["kind"] == "begun"
        until(lambda: network.denoiser.calls == 2)  # one of the first, one of the third
        network.denoiser.let.release(100)
        kinds = [event["kind"] for event in heard]
        assert kinds[-1] == "decided"
        assert kinds.count("landed") == 10
        assert network.denoiser.calls == 11


def test_the_server_ends_in_the_middle_of_a_decision(digits):
    network = Slow()
    with served([network]) as address:
        connection = asked(address, digits[0], network="slow", labels="")
        until(lambda: network.denoiser.calls == 1)
    network.denoiser.let.release(100)
    connection.close()
    time.sleep(0.2)
    assert network.denoiser.calls == 1


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port: {port} of '127.0.0.1' cannot be had .* try --port 0"):
            asyncio.run(server.serve(server.make_app([]), "127.0.0.1", port, print, asyncio.Event()))


def test_a_defect_is_told_and_logged_and_the_next_one_is_answered(digits, caplog, monkeypatch):
    network = Slow()
    network.denoiser.let.release(1000)
    with served([network]) as address:
        with monkeypatch.context() as patch:
            patch.setattr(network, "pixels", lambda image: torch.zeros(1, 1, 1))
            patch.setattr(network.denoiser, "encode", lambda images: 1 / 0)
            [*_, last] = events_of(asked(address, digits[0], network="slow", labels=""))
        assert last == {"kind": "refused", "message": "failed: division by zero; the terminal says more"}
        assert "ZeroDivisionError" in caplog.text
        [*_, last] = events_of(asked(address, digits[0], network="slow", labels=""))
        assert last["kind"] == "decided"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "/etc"}, "network: '/etc', expected one of ['assets/sd_digits']"),
        ({"draws": "many"}, "draws: 'many', expected a whole number"),
        ({"labels": "<b>one</b>"}, "labels: only '<b>one</b>', expected at least two, with commas between them"),
    ],
)
def test_bad_forms_have_one_clear_message(page, digits, fields, message):
    [*_, last] = events_of(asked(page, digits[0], **fields))
    assert last == {"kind": "refused", "message": message}


def test_large_uploads_are_refused(tiny, digits, monkeypatch):
    monkeypatch.setattr(server, "MAX_BYTES", 5000)
    with served([tiny]) as address:
        [event] = events_of(asked(address, bytes(100_000)))
        assert event == {"kind": "refused", "message": "picture: more than 5,000 bytes"}


@pytest.mark.parametrize(
    "path",
    ["/../pyproject.toml", "/%2e%2e/%2e%2e/pyproject.toml", "/page/index.html", "/app.py", "/examples/10.png",
     "/examples/..%2fapp.py", "/examples/-1.png", "//etc/passwd"],
)  # fmt: skip
def test_nothing_else_is_served(page, path):
    assert got(page, path)[0] == 404


def test_the_page_and_its_pictures_are(page, digits):
    status, headers, body = got(page, "/")
    assert status == 200
    assert b"<title>diffclf" in body
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert got(page, "/examples/7.png")[2] == digits[7]
    offer = json.loads(got(page, "/offer")[2])
    assert [one["name"] for one in offer["networks"]] == ["assets/sd_digits"]
    assert list(offer["rules"]) == ["LikelihoodRatio", "PairedTest", "Stages", "Exhaustive"]


def test_pages_of_others_are_not_answered(page):
    own = urlsplit(page).netloc
    assert got(page, "/offer", Host=own, Origin=page)[0] == 200
    assert got(page, "/offer", Host=own, Origin="http://evil.example")[0] == 403
    assert got(page, "/offer", Host=own, Origin="null")[0] == 403
    assert got(page, "/offer", Host="evil.example")[0] == 403  # whose name leads to this machine
    assert got(page, "/offer", Host=f"localhost:{urlsplit(page).port}")[0] == 200
