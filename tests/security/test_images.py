"""Pictures of others open nothing else and take no more memory than an image may; names in reports are text."""

import io
import os
import re
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from lightning_diffclf.commands import run
from lightning_diffclf.data.images import FORMATS, MAX_PIXELS, decode_image, open_image
from lightning_diffclf.data.shards import Shards, ShardStream
from lightning_diffclf.errors import UserError
from lightning_diffclf.results import charts
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.page import render
from lightning_diffclf.results.report import evaluation_page, make_figures, write_report
from lightning_diffclf.results.store import Settings, claim, write_whole
from tests.results.made_up import made_up_rows, made_up_run, to_table
from tests.security.test_shards import member, pair, shard


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def png(width: int, height: int, colour: int = 2) -> bytes:
    """A valid PNG of one colour, in a few kilobytes whatever its size (rows are compressed in pieces)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 + min(width, 1000) * 3)) for _ in range(min(height, 50))) + packed.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (20_000, 9_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)])
def test_a_picture_of_a_billion_pixels_is_not_decoded(size, monkeypatch):
    Path("bomb.png").write_bytes(png(*size))

    def decoded(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(UserError, match=r"image: 'bomb\.png' cannot be read \(.*(pixels|Image)") as error:
        open_image("bomb.png")
    assert "decoded" not in str(error.value)
    assert MAX_PIXELS < 30_000**2


def test_a_bomb_in_a_shard_is_an_image_that_training_may_skip(capsys):
    shard(
        "0.tar",
        [
            member("bomb.png", png(30_000, 30_000)),
            member("bomb.cls", b"1"),
            *(one for key in "abcdefgh" for one in pair(key)),
        ],
    )
    with pytest.raises(UserError, match=r"sample bomb in \./0\.tar cannot be read"):
        list(zip(range(20), ShardStream(Shards("."), lambda image, rng: image.size, buffer=1), strict=False))
    stream = iter(ShardStream(Shards("."), lambda image, rng: image.size, buffer=2, skip_bad=0.5))
    assert {next(stream)["id"] for _ in range(40)} == {f"0/{key}" for key in "abcdefgh"}
    assert "skipped" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jpg", "png", "eps"])
def test_a_picture_in_postscript_runs_no_other_program(suffix, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(command))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **settings: pytest.fail(str(args)))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    code = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(PWNED) (w) file closefile\n%%EOF\n"
    Path(f"evil.{suffix}").write_bytes(code)
    with pytest.raises(UserError, match="cannot be read"):
        open_image(f"evil.{suffix}")
    with pytest.raises(UserError, match="cannot be read"):
        decode_image(io.BytesIO(code), "sample")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_that_is_read_is_read(name):
    Image.new("RGB", (9, 7), (255, 0, 0)).save("x.img", name)
    assert open_image("x.img").size == (9, 7)


# --- reports -------------------------------------------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"><svg/onload=alert(3)>[red]"


def test_names_ids_and_paths_in_a_report_are_text():
    rows = list(made_up_rows(20, 3))
    evil = [type(row)(**{**vars(row), "id": f"{EVIL}{i}"}) for i, row in enumerate(rows)]
    names = [f"{EVIL}{c}" for c in range(3)]
    info = {
        "candidate_names": names, "candidate_classes": [0, 1, 2], "class_names": names, "timesteps_S": list(range(20)),
        "log_snr_S": list(range(20)), "command": f"evaluate.py {EVIL}",
    }  # fmt: skip
    settings = Settings({"draws": 20, EVIL: EVIL}, info)
    folder = Path("<script>alert(4)<")
    write_whole(to_table(evil), settings, claim(folder, settings))
    evaluation = Evaluation.read(folder)
    page = evaluation_page(evaluation, make_figures(evaluation), gallery=240)
    html = render(page, folder, settings, charts.specs(dict(page.charts)), library="")
    for harm in ("<script>alert", "<img src=x", "<svg/onload", "onerror=alert(2)>'\""):
        assert harm not in html
    assert len(re.findall(r"<script\b", html)) == html.count("</script>")
    assert "alert(1)" in html
    assert [path.name for path in Path().iterdir()] == [folder.name]


def test_names_of_folders_are_text_on_the_terminal(capsys):
    for name in ("[red]a", "[/b]"):
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        made_up_run(folder / "run", made_up_rows(10, 3), 3)
    run("compare", ["[red]a/run", "[/b]/run"])
    shown = capsys.readouterr().out
    assert "[red]a/run" in shown
    assert "[/b]/run" in shown


def test_a_report_elsewhere_removes_no_file_of_others(monkeypatch):
    monkeypatch.setattr("lightning_diffclf.results.report.make_figures", lambda evaluation: {})
    run = made_up_run(Path("run"), made_up_rows(10, 3), 3)
    Path("paper/figures").mkdir(parents=True)
    Path("paper/figures/mine.png").write_text("mine")
    Path("paper/figures/disagreement.png").write_text("of an earlier report")
    write_report(run, "paper/report.html")
    assert Path("paper/figures/mine.png").read_text() == "mine"
    assert not Path("paper/figures/disagreement.png").exists()
