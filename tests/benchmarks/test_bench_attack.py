"""The benchmark of attacks and certificates from end to end, on networks that have hardly been trained."""

import sys
from pathlib import Path

from lightning_diffclf import cli
from lightning_diffclf.callbacks import attack
from lightning_diffclf.results.stored import read_table
from tests.test_readme import SMALLER

LESS = {
    "DRAWS": "1",
    "BALLS": (("linf", "0.1"),),
    "APGD": ["--steps", "2", "--limit", "3"],
    "FRESH": ["--eps", "0.1", "--randomness", "fresh", "--seeds", "2", "--steps", "1", "--eot", "1", "--limit", "2"],
    "AUTO_OF_TIMM": ["--auto", "--batch_size", "2", "--data.eval_batch_size", "2", "--limit", "2"],
    "AUTO_OF_DIT": (("linf", "0.1", "2", "2"),),
    "SIGMAS": ("0.12",),
    "SMOOTHING": ["--n0", "2", "--n", "8", "--alpha", "0.1", "--radii", "0,0.05", "--limit", "2"],
}

QUICK = ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=1"]


def test_all_of_it_at_toy_size(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import bench_attack

    monkeypatch.setattr(attack, "auto_attack", lambda network, images, *_, **__: images)  # it has tests of its own
    for name, value in LESS.items():
        assert type(value) is type(getattr(bench_attack, name))
        monkeypatch.setattr(bench_attack, name, value)
    for name in ("dit_digits", "timm_digits"):
        flags = [one for one in SMALLER["train.py"].split() if name == "dit_digits" or "--samples" not in one]
        cli.train([f"--config={name}.yaml", f"--run_dir={tmp_path / name}", *flags, *QUICK])
    monkeypatch.setattr(sys, "argv", ["bench_attack.py", str(tmp_path)])
    capsys.readouterr()
    bench_attack.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row]
    attacks, certificates = (
        [row for row in rows if row[0] in ("dit_digits", "timm_digits") and len(row) == cells] for cells in (7, 6)
    )
    assert [row[0] for row in attacks] == ["dit_digits"] * 3 + ["timm_digits"] * 2
    assert [row[3] for row in attacks] == [
        "AutoAttack standard, fixed draws",
        "APGD, fixed draws",
        "APGD, fresh draws",
        "APGD",
        "AutoAttack standard",
    ]
    assert [row[4] for row in attacks] == ["2", "3", "2", "3", "2"]
    dit, vit = (
        {row["id"]: row for row in read_table(folder).to_pylist()}
        for folder in sorted(tmp_path.glob("trust/attack*auto*"))
    )
    right = [
        {i: {row["label"]} == {*row["clean_S"], *row["attacked_S"]} for i, row in one.items()} for one in (dit, vit)
    ]
    only = [sum(a[i] and not b[i] for i in a) for a, b in (right, right[::-1])]
    pairs = [row for row in rows if len(row) == 5 and row[0] == "linf"]
    assert [row[:4] for row in pairs] == [["linf", "0.1", "2", f"{only[0]} : {only[1]}"]]
    assert [row[0] for row in certificates] == ["timm_digits", "dit_digits"]
    assert {row[2] for row in certificates} == {"2"}
