"""``diffclf app`` as it is typed."""

import os
import re
import shlex
import signal
import socket
import threading
import urllib.request

import pytest

from lightning_diffclf.commands import app, arguments, main
from tests.test_readme import ROOT, commands_of


def test_it_serves_until_it_is_told_to_end(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pages = []

    def visit():
        for _ in range(600):
            try:
                pages.append(urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read())
                break
            except OSError:
                threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=visit).start()
    main(["app", "--port", str(port), "--device", "cpu"])
    assert b"Which label fits?" in pages[0]
    assert re.search(rf"open http://127.0.0.1:{port} in a browser", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt", "none.ckpt"], "error: checkpoint: no file 'none.ckpt'"),
        (["--model", "{tmp_path}"], "error: pretrained: '{tmp_path}' has no model_index.json"),
        (["--port", "70000"], "error: port: 70000, expected 0 to 65535"),
        (["--template", "a photo"], "error: template: 'a photo', expected '{}' where the label goes"),
    ],
)
def test_what_is_wrong_is_said_before_it_serves(flags, message, tmp_path):
    flag, value = (text.replace("{tmp_path}", str(tmp_path)) for text in flags)
    with pytest.raises(SystemExit) as exit_info:
        main(["app", flag, value])
    assert str(exit_info.value.code).startswith(message.replace("{tmp_path}", str(tmp_path)))


def test_without_its_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_info:
        main(["app"])
    assert exit_info.value.code == "error: app: aiohttp is not installed; pip install 'lightning-diffclf[app]'"


def test_its_page_of_the_documentation_is_true():
    text = (ROOT / "docs" / "app.md").read_text()
    [code] = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(command)[2:] for command in commands_of(code) if command.startswith("diffclf app")]
    assert [bool(arguments.app(flags)) for flags in commands] == [True] * 3
    named = set(re.findall(r"`(--\w+)`", text.partition("## What can be chosen")[2].partition("\nIn the page")[0]))
    assert named == {f"--{name}" for name in vars(arguments.app([]))}
    assert (ROOT / "docs" / "images" / "app.png").stat().st_size <= 300_000
    assert "](docs/images/app.png)" in (ROOT / "README.md").read_text()
