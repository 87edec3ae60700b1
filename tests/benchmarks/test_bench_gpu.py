"""`make gpu` on a machine without a GPU, with nothing installed but what it says that it needs."""

import os
import re
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from lightning_diffclf import DiT

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "lightning", "timm", "einops", "torchmetrics", "scipy", "numpy", "pytest")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def only(needed: tuple[str, ...], folder: Path) -> Path:
    """A folder of links to packages and what they require, as if nothing else were installed."""
    todo, done = list(needed), set()
    while todo:
        name = re.sub("[-_.]+", "-", todo.pop()).lower()
        if name in done:
            continue
        done.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # for other machines
            continue
        for part in {file.parts[0] for file in found.files if file.parts[0] != ".."}:
            if not (folder / part).exists():
                (folder / part).symlink_to(found.locate_file(part))
        wanted = map(Requirement, found.requires or [])
        todo += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert not {"diffusers", "transformers", "pyarrow", "webdataset", "hypothesis"} & done
    return folder


def test_all_of_it_at_toy_size(tmp_path):
    site, out = tmp_path / "site", tmp_path / "gpu.md"
    site.mkdir()
    environment = os.environ | {"PYTHONPATH": f"{only(NEEDED, site)}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-S", str(ROOT / "benchmarks" / "bench_gpu.py"), f"--out={out}"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = out.read_text()
    assert set(shown.splitlines()) <= set(done.stdout.splitlines())
    assert not re.search("failed: |stopped after|: no time", shown), shown + done.stderr[-3000:]
    first, *parts = shown.split("\n## ")
    assert first.startswith("# At toy size, ")
    rows = {part.partition("\n")[0]: part.count("\n| ") - 2 for part in parts}
    large = {"DiT-XL/2 as classifier": -2, "Training DiT-XL/2": -2}  # left out
    small = {"DiT-S/2 as classifier": 2 + 2 + 2, "Training DiT-S/2": 3}  # no CUDA graph without a GPU
    assert rows == {"GPU tests": -2, **large, **small, "Engine": 3}
    assert re.search(r"0 passed, 0 failed, \d+ skipped; status 0", shown)


def test_make_takes_the_python_that_is_there():
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu", "PYTHON=mine"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "mine benchmarks/bench_gpu.py\n", done.stderr


def test_the_plain_network_is_a_dit():
    plain = import_module("plain_dit").PlainDiT(8, 16, 2, 2)
    dit = DiT(8, 2, 4, hidden_size=16, depth=2, num_heads=2, learn_sigma=False).eval()
    import_module("measuring").randomised(plain, std=0.1)
    plain.positions.copy_(dit.pos_embed)
    pairs = zip(dit.parameters(), plain.parameters(), strict=True)
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs)
        rows = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 500.0, 999.0]), torch.tensor([0, 7, 1000])
        torch.testing.assert_close(plain(*rows), dit(*rows))


def test_operations_are_the_published_ones():
    """Of Peebles & Xie 2023, table 4, which counts a product and a sum as one."""
    for name, gigaflops in (("DiT-XL/2", 118.64), ("DiT-S/2", 6.06)):
        found = import_module("measuring").forward_flops(lambda name=name: DiT.from_name(name))
        assert found / 2e9 == pytest.approx(gigaflops, rel=1e-3)


def hangs(end):
    yield "begun"
    time.sleep(60)


def fails(end):
    yield "begun"
    raise ValueError("its last words")


def ends(end):
    yield f"{end - time.monotonic() > 50}"


@pytest.mark.parametrize(
    ("work", "seconds", "lines"),
    [
        (hangs, 0.5, ["begun", "\nstopped after 0 s"]),
        (fails, 60, ["begun", "\nfailed: status 1; its last words are on the terminal"]),
        (ends, 60, ["True"]),
    ],
)
def test_a_part_that_does_not_end_well_is_a_line(work, seconds, lines):
    begun = time.monotonic()
    assert list(import_module("apart").lines_of(work, seconds, "fork")) == lines
    assert time.monotonic() - begun < 50  # not the minute that it would have taken


def test_what_does_not_fit_is_a_row_of_the_result(capsys):
    bench = import_module("bench_gpu")

    def runs_out():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def breaks():
        raise RuntimeError("no compiler\nand more")

    place = bench.Place("cpu", time.monotonic() + 60)
    assert bench.measured(runs_out, place).why == "out of memory"
    assert bench.measured(breaks, place).why == "failed: RuntimeError: no compiler"
    assert bench.measured(lambda: 2.0, place, needs=100).why == "left out: no time"
    assert bench.measured(lambda: 2.0, place) == (2.0, "–", None)
