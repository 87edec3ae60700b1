r"""How robust are two classifiers of digits, a DiT and a ViT of timm? python benchmarks/bench_attack.py RUNS.

RUNS has both, trained on the same digits (a minute or two each on two idle cores):

    python train.py --config dit_digits.yaml --run_dir RUNS/dit_digits
    python train.py --config timm_digits.yaml --run_dir RUNS/timm_digits

With 2 draws, the DiT is about as accurate as the ViT. Each row is a run of `diffclf attack` or `diffclf certify` into
RUNS/trust, which goes on where it was stopped. AutoAttack on the DiT takes a minute or two for a digit that it does not
fool, and two seconds for others: so it is run on few digits where many are left. All distances are in units of images
in [0, 1]; l2 of 8 x 8 pixels.
"""

import argparse
from datetime import date
from pathlib import Path

import torch

from lightning_diffclf.commands import run
from lightning_diffclf.files import read_json
from lightning_diffclf.results.statistics import Interval, mcnemar
from lightning_diffclf.results.stored import read_table

DRAWS = "2"
BALLS = (("linf", "0.03"), ("linf", "0.1"), ("linf", "0.2"), ("l2", "0.5"))
APGD = ["--steps", "25", "--limit", "50"]
FRESH = ["--eps", "0.1", "--randomness", "fresh", "--seeds", "3", "--steps", "20", "--limit", "25"]
AUTO_OF_TIMM = ["--auto", "--batch_size", "200", "--data.eval_batch_size", "200", "--limit", "200"]
AUTO_OF_DIT = (  # and how many digits, of which so many at once: what is interrupted begins a batch again
    ("linf", "0.2", "200", "25"),
    ("linf", "0.1", "200", "25"),
    ("l2", "0.5", "200", "25"),
    ("linf", "0.03", "25", "5"),
)
SIGMAS = ("0.12", "0.25")
SMOOTHING = ["--n0", "20", "--n", "100", "--radii", "0,0.1,0.2,0.3", "--limit", "25"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    args = parser.parse_args()
    attacks = [  # network and arguments
        ("dit_digits", ["--norm", norm, "--eps", eps, "--auto", "--limit", limit, *of_dit(batch)])
        for norm, eps, limit, batch in AUTO_OF_DIT
    ]
    attacks += [("dit_digits", ["--norm", norm, "--eps", eps, *APGD, *of_dit("25")]) for norm, eps in BALLS]
    attacks.append(("dit_digits", [*FRESH, *of_dit("25")]))
    for norm, eps in BALLS:
        attacks += [("timm_digits", ["--norm", norm, "--eps", eps, *how]) for how in (APGD, AUTO_OF_TIMM)]
    certificates = [
        (network, ["--sigma", sigma, *SMOOTHING, *own])
        for sigma in SIGMAS
        for network, own in (("timm_digits", []), ("dit_digits", ["--draws", DRAWS]))
    ]
    found = {
        command: [(network, done(args.runs, command, network, flags)) for network, flags in rows]
        for command, rows in (("attack", attacks), ("certify", certificates))
    }
    print(f"\n{date.today()}, torch {torch.__version__}\n")
    print("| network | norm | eps | attack | digits | right without attack | right under attack |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for network, one in found["attack"]:
        numbers, trial = one["metrics"], one["settings"]["attack"]
        how = trial["attack"] + (f", {trial['randomness']} draws" if network == "dit_digits" else "")
        shares = " | ".join(share(numbers, name) for name in ("accuracy", "robust_accuracy"))
        print(f"| {network} | {trial['norm']} | {trial['eps']} | {how} | {numbers['images']} | {shares} |")
    robust = {
        (trial["norm"], trial["eps"], network): withstands(one["folder"])
        for network, one in found["attack"]
        if (trial := one["settings"]["attack"])["attack"] == "AutoAttack standard"
    }
    print("\n| norm | eps | digits | withstand AutoAttack on the DiT only : on the ViT only | McNemar p |")
    print("| --- | --- | --- | --- | --- |")
    for norm, eps in BALLS:
        dit, vit = (robust[norm, float(eps), network] for network in ("dit_digits", "timm_digits"))
        both = dit.keys() & vit.keys()
        only = sum(dit[i] > vit[i] for i in both), sum(dit[i] < vit[i] for i in both)
        print(f"| {norm} | {eps} | {len(both)} | {only[0]} : {only[1]} | {mcnemar(*only):.2g} |")
    rows = found["certify"][0][1]["metrics"]["certified"]
    names = " | ".join(f"radius {row['radius']:g}" for row in rows)
    print(f"\n| network | sigma | digits | with an answer | {names} |\n| --- | --- | --- | --- |{' --- |' * len(rows)}")
    for network, one in found["certify"]:
        numbers, sigma = one["metrics"], one["settings"]["certification"]["sigma"]
        shares = " | ".join(str(Interval(row["accuracy"], row["low"], row["high"])) for row in numbers["certified"])
        print(f"| {network} | {sigma} | {numbers['images']} | {numbers['answered']:.0%} | {shares} |")


def of_dit(batch: str) -> list[str]:
    """Arguments for the DiT, so many digits at once."""
    return ["--draws", DRAWS, "--batch_size", batch, "--data.eval_batch_size", batch]


def done(runs: Path, command: str, network: str, flags: list[str]) -> dict:
    """What metrics.json says of a run, after it has been made or gone on with."""
    out = runs / "trust" / "_".join([command, network, *(flag.strip("-") for flag in flags)])
    checkpoint = str(runs / network / "checkpoints" / "last.ckpt")
    run(command, ["--ckpt", checkpoint, "--out", str(out), *flags, *QUIET])
    return read_json(out / "metrics.json") | {"folder": out}


def withstands(folder: Path) -> dict[str, bool]:
    """Of each digit, by its id, whether it is right with and without attack."""
    rows = read_table(folder).select(["id", "label", "clean_S", "attacked_S"]).to_pylist()
    return {row["id"]: {row["label"]} == {*row["clean_S"], *row["attacked_S"]} for row in rows}


def share(numbers: dict, name: str) -> str:
    """With its interval."""
    return str(Interval(*(numbers[f"{name}{end}"] for end in ("", "_low", "_high"))))


if __name__ == "__main__":
    main()
