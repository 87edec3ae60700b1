"""The tiny model and a page that is served, for all tests of the app."""

import asyncio
import threading
from contextlib import contextmanager

import pytest
import torch

from lightning_diffclf.app.decision import Question, decide, scenes_of_digits
from lightning_diffclf.app.networks import TextToImage
from lightning_diffclf.app.server import make_app, serve
from lightning_diffclf.data.digit_scenes import WORDS

LABELS = ", ".join(WORDS)


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def tiny() -> TextToImage:
    return TextToImage(device="cpu")


@pytest.fixture(scope="package")
def digits() -> list[bytes]:
    """A scene of each digit, as PNG."""
    return scenes_of_digits()


@contextmanager
def served(networks, examples=(), host="127.0.0.1"):
    """The address of a page that is served meanwhile, by a thread."""
    found, ready = {}, threading.Event()

    async def main():
        found["loop"], found["stop"] = asyncio.get_running_loop(), asyncio.Event()

        def tell(address):
            found["address"] = address
            ready.set()

        await serve(make_app(networks, examples, host), host, 0, tell, found["stop"])

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(30)
    yield found["address"]
    found["loop"].call_soon_threadsafe(found["stop"].set)
    thread.join(30)
    assert not thread.is_alive()


def told(network, picture, labels=LABELS, rule="LikelihoodRatio", draws=24, error_map=False):
    """All events of a decision."""
    events = []
    decide(network, Question(picture, labels, rule, draws, error_map), events.append)
    return events
