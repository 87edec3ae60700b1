"""Group testing as a search: python benchmarks/bench_group_testing.py [--variant shipped] [--steps 4000].

Digit triples (1,000 classes), networks of bench_training_for_search.py, one of which was trained on sets of classes.
All candidates are halved, the errors at the mean embeddings of both halves are compared (two calls with the same
noise), and the difference of their log likelihoods, tempered, changes the candidates' weights, by which the next halves
are balanced and the next means taken.

The table says for how many images the class that LikelihoodRatio(0.002) alone decides for is among the first 5, 10, 20
and 50 candidates by weight, beside the package's searches. "Right half": comparisons in which its half has the smaller
error; 50 % is chance.
"""

import argparse
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from bench_training_for_search import DRAWS, MICROBATCH, RULE, VARIANTS, row, table, trained
from tasks import TASKS
from torch import Tensor

from lightning_diffclf import ClassConditionalDiT, CovarianceSearch, DiffusionClassifier, Draws, GradientSearch
from lightning_diffclf.classifier.draws import nested_order
from lightning_diffclf.noise import KeyedNoise

FIRST = (5, 10, 20, 50)
CALLS = (20, 40, 80)
TIMES, TEMPER = (0.5, 0.8), 0.1  # of 0.2 - 0.5, 0.3 - 0.7 and 0.5 - 0.8, and of 0.03 to 1, the best
HALVES = (("at random", 1), ("along a direction", 1), ("along a direction", 8), ("by a digit", 1))  # comparisons a draw
GRADIENTS = GradientSearch(draws=16, timesteps=(0.3, 0.7))


def halves(module: ClassConditionalDiT, w_BK: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Which candidates are in the first of two halves of about the same weight (B, K), bool."""
    classes = torch.arange(w_BK.shape[1])
    if how == "at random":  # of every two that follow each other by weight, one
        coin = torch.rand(len(w_BK), len(classes) // 2, generator=generator) < 0.5
        first = torch.stack([coin, ~coin], 2).flatten(1)
        return torch.zeros_like(first).scatter(1, w_BK.argsort(1, descending=True), first)
    if how == "by a digit":  # at some place: what these classes are made of, which no search knows
        place = 10 ** int(torch.randint(3, (), generator=generator))
        along_BK = torch.rand(len(w_BK), 10, generator=generator)[:, classes // place % 10]
    else:  # along a random direction in which the embeddings vary
        embedding_KP, shares_BK = module.conditions(classes), torch.randn(w_BK.shape, generator=generator)
        shares_BK = shares_BK * w_BK.sqrt()
        direction_BP = shares_BK @ embedding_KP - shares_BK.sum(1, keepdim=True) * (w_BK @ embedding_KP)
        along_BK = direction_BP @ embedding_KP.T
    order = along_BK.argsort(1)
    sorted_BK = w_BK.gather(1, order)
    first = sorted_BK.cumsum(1) - sorted_BK / 2 < 0.5
    return torch.zeros_like(first).scatter(1, order, first)


@torch.no_grad()
def group_testing(
    module: ClassConditionalDiT, images: Tensor, ids: Sequence[int], how: str, at_one_draw: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """After each comparison: log weights of all candidates (B, K), and which are in the better half (B, K), bool."""
    schedule, generator, keyed = module.schedule, torch.Generator().manual_seed(0), KeyedNoise(0)
    embedding_KP = module.conditions(torch.arange(module.hparams["num_classes"]))
    log_w_BK = torch.zeros(len(images), len(embedding_KP))
    draws = math.ceil(max(CALLS) / 2 / at_one_draw)
    t_S = (TIMES[0] + (TIMES[1] - TIMES[0]) * (nested_order(draws) + 0.5) / draws).float()
    for draw in np.arange(draws).repeat(at_one_draw).tolist():
        noise = np.empty(images.shape, dtype=np.float32)
        for out, image_id in zip(noise, ids, strict=True):
            keyed.fill(out, keyed.key(f"groups: {image_id}"), draw)
        noise_B, t_B = torch.from_numpy(noise), t_S[draw].expand(len(images))
        x_t = schedule.add_noise(images, noise_B, t_B)
        w_BK = log_w_BK.softmax(1)
        first_BK, errors = halves(module, w_BK, how, generator), []
        for members_BK in (first_BK, ~first_BK):
            shares_BK = torch.where(members_BK, w_BK.clamp_min(1e-30), 0)
            mean_BP = shares_BK / shares_BK.sum(1, keepdim=True) @ embedding_KP
            output = module.predict_from(*schedule.network_rows(x_t, t_B), mean_BP)
            errors.append((schedule.to_epsilon(output, x_t, t_B) - noise_B).square().flatten(1).mean(1))
        nats_B1 = images[0].numel() / 2 * (errors[1].log() - errors[0].log())[:, None]
        log_w_BK = log_w_BK + TEMPER * torch.where(first_BK, nats_B1, -nats_B1) / 2
        yield log_w_BK, first_BK == (nats_B1 > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="may be repeated (default: all)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/training_for_search"), help="for weights")
    args = parser.parse_args()
    print(
        f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {args.steps} steps of {args.batch}, seed {args.seed}; "
        f"{args.images} images"
    )
    task = TASKS["digit_triples"]
    images, _, ids = (part[: args.images] for part in task.test())
    table("network", "search", "calls", *(f"in the first {count}" for count in FIRST), "right half")
    for name in args.variant or list(VARIANTS):
        module, _ = trained(name, args.steps, args.batch, args.seed, args.folder / task.name, task.name)
        alone = DiffusionClassifier(module, Draws(DRAWS), elimination=RULE, microbatch=MICROBATCH)
        wanted_B1 = torch.tensor([[result.candidate] for result in alone(images, ids)])
        for how, at_one_draw in HALVES:
            text, right = f"halves {how}" + f", {at_one_draw} at one draw" * (at_one_draw > 1), []
            for log_w_BK, better_BK in group_testing(module, images, ids, how, at_one_draw):
                right.append(better_BK.gather(1, wanted_B1).float().mean())
                if (calls := 2 * len(right)) in CALLS:
                    rank_B = (log_w_BK > log_w_BK.gather(1, wanted_B1)).sum(1)
                    shares = [f"{(rank_B < count).float().mean():.0%}" for count in FIRST]
                    row(name, text, calls, *shares, f"{np.mean(right):.0%}")
        learnt = CovarianceSearch().fit(module, [(task.unlabelled(), None)])
        for text, search in ((f"{GRADIENTS}", GRADIENTS), ("CovarianceSearch()", learnt)):
            shares = []
            for count in FIRST:
                if isinstance(search, GradientSearch):
                    search = replace(search, least=count, most=count)
                else:
                    search.least = search.most = count
                classifier = DiffusionClassifier(module, proposal=search)
                found = search.propose(classifier, images, ids, [np.arange(1000)] * len(ids))
                kept = [int(k) in some for (k,), some in zip(wanted_B1, found.candidates, strict=True)]
                shares.append(f"{np.mean(kept):.0%}")
            row(name, text, found.nfe[0], *shares, "")


if __name__ == "__main__":
    main()
