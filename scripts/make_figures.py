"""Draw the pictures of docs/: python scripts/make_figures.py (two minutes of one CPU core).

Every number and pixel is computed here, by the network of `make demo` as it is kept in benchmarks/data/ (digits, 8 x 8
pixels) and by the tiny text-to-image model in assets/sd_digits, on test images that they were not trained on.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import lightning_diffclf
from lightning_diffclf import Classification, DiffusionClassifier, Draws, LikelihoodRatio, PairedTest, Stages
from lightning_diffclf.data.digit_scenes import WORDS
from lightning_diffclf.noise import KeyedNoise
from lightning_diffclf.results.figures import save_image_grid

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from tasks import TASKS  # noqa: E402

DRAWS = 100
EASY, CLOSE = 0, 55  # test images, by their place
BLUE, GREY, RED = "#1f6feb", "#767676", "#c93c37"
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "diffclf",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.bbox": "tight",
}


def show(axes: Axes, pixels: Tensor, title: str = "", colour: str = "black") -> None:
    """One image (1, H, W) in [-1, 1]."""
    axes.imshow(pixels[0], cmap="gray", vmin=-1, vmax=1)
    axes.set_title(title, color=colour, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


class Digits:
    """The trained network and the test digits."""

    def __init__(self) -> None:
        task = TASKS["digits"]
        self.network = task.network()
        self.images, self.labels, self.ids = task.test()
        self.errors_BKS, _, self.timesteps_S = task.errors()

    def classify(self, rule, chosen: slice = slice(None), **settings) -> list[Classification]:
        classifier = DiffusionClassifier(self.network, draws=Draws(DRAWS), elimination=rule, **settings)
        return classifier(self.images[chosen], ids=self.ids[chosen])

    def noisy(self, position: int, times_S: Tensor) -> tuple[Tensor, Tensor]:
        """An image at each timestep (S, 1, 8, 8), and the noise that is in it: that of its first draws."""
        image, keyed = self.images[position : position + 1], KeyedNoise(0)
        noise = np.empty((len(times_S), *image.shape[1:]), np.float32)
        for draw, out in enumerate(noise):
            keyed.fill(out, keyed.key(self.ids[position]), draw)
        eps = torch.from_numpy(noise)
        return self.network.schedule.add_noise(image.expand_as(eps), eps, times_S), eps

    @torch.no_grad()
    def predicted_noise(self, x_t: Tensor, times_N: Tensor, candidates_N: Tensor) -> Tensor:
        """What the network takes for noise in each row under its candidate (N, 1, 8, 8)."""
        schedule = self.network.schedule
        x_in, time = schedule.network_input(x_t, times_N), schedule.network_time(times_N)
        return schedule.to_epsilon(self.network.predict(x_in, time, candidates_N), x_t, times_N)


def noise(digits: Digits) -> Figure:
    """One image at six noise levels."""
    times = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 0.95])
    figure, row = plt.subplots(1, len(times), figsize=(6.4, 1.5))
    for axes, x_t, t in zip(row, digits.noisy(EASY, times)[0], times, strict=True):
        show(axes, x_t, f"t = {t:.2g}")
    return figure


def guesses(digits: Digits) -> Figure:
    """What the network sees in one noisy image when told each class, and how wrong it was about the noise."""
    times = torch.full((10,), 0.6)
    x_t, eps = (one[:1].expand(10, -1, -1, -1) for one in digits.noisy(EASY, times))
    predicted = digits.predicted_noise(x_t, times, torch.arange(10))
    schedule = digits.network.schedule
    clean = (x_t - schedule.sigma(times).view(-1, 1, 1, 1) * predicted) / schedule.alpha(times).view(-1, 1, 1, 1)
    errors = (predicted - eps).square().mean((1, 2, 3))
    best = int(errors.argmin())
    figure = plt.figure(figsize=(6.4, 3.2))
    grid = figure.add_gridspec(2, 11, height_ratios=[1, 1.6], hspace=0.15)
    show(figure.add_subplot(grid[0, 0]), x_t[0], "noisy")
    for k in range(10):
        show(figure.add_subplot(grid[0, k + 1]), clean[k], f"as {k}", BLUE if k == best else "black")
    bars = figure.add_subplot(grid[1, 1:])
    bars.bar(range(10), errors, color=[BLUE if k == best else GREY for k in range(10)], width=0.7)
    bars.set_xticks(range(10))
    bars.set_xlim(-0.5, 9.5)
    bars.set_xlabel("candidate")
    bars.set_ylabel("error")
    return figure


def race(digits: Digits) -> Figure:
    """How candidates fall behind, draw by draw, until they are dropped: an easy image and a close one."""
    figure, rows = plt.subplots(2, 2, figsize=(6.4, 5.4), width_ratios=[1, 5], layout="constrained")
    for (image, panel), position in zip(rows, (EASY, CLOSE), strict=True):
        show(image, digits.images[position])
        one = slice(position, position + 1)
        result = digits.classify(LikelihoodRatio(alpha=0.01), one, keep_errors=True)[0]
        errors_KS, winner = result.errors_KS.numpy().astype(float), result.candidate
        behind_KS = np.cumsum(errors_KS - errors_KS[winner], 1) * result.dims / 2
        behind_KS /= np.cumsum(errors_KS[winner]) / np.arange(1, errors_KS.shape[1] + 1)
        longest = result.draws_K.argsort(descending=True)[:4].tolist()
        for k, seen in enumerate(result.draws_K.tolist()):
            line = -np.concatenate([[0.0], behind_KS[k, :seen]])
            colour, width, layer = (BLUE, 2.2, 3) if k == winner else (GREY, 1.2, 2)
            panel.plot(range(seen + 1), line, color=colour, lw=width, zorder=layer)
            if k != winner:
                panel.plot(seen, line[-1], "x", color=RED, ms=6, zorder=4)
            if k in longest:
                panel.annotate(str(k), (seen, line[-1]), (7, -4), textcoords="offset points", color=colour)
        panel.set_xlim(0, 1.1 * int(result.draws_K.max()))
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.set_xlabel("draws")
        panel.set_ylabel("evidence, nats")
        panel.set_title(f"{result.nfe} network calls instead of {10 * DRAWS:,}", fontsize=11)
    return figure


def cost(digits: Digits) -> Figure:
    """Network calls for an image by rule, over all test images, and how often the decision is that of all draws."""
    everything = digits.errors_BKS.mean(2).argmin(1)
    rules = {
        "the paper's stages": Stages((10, DRAWS), (5, 1)),
        "PairedTest(0.05)": PairedTest(0.05),
        "LikelihoodRatio(0.01)": LikelihoodRatio(alpha=0.01),
    }
    names, calls, notes = ["all draws"], [10.0 * DRAWS], [f"{np.mean(everything == digits.labels.numpy()):.1%} right"]
    for name, rule in rules.items():
        results = digits.classify(rule)
        agreement = np.mean([r.prediction == e for r, e in zip(results, everything, strict=True)])
        right = np.mean([r.prediction == int(label) for r, label in zip(results, digits.labels, strict=True)])
        names.append(name)
        calls.append(float(np.mean([r.nfe for r in results])))
        notes.append(f"{right:.1%} right, {agreement:.1%} as all draws")
    figure, axes = plt.subplots(figsize=(6.4, 3))
    titles = [f"{name}\n{note}" for name, note in zip(names, notes, strict=True)]
    axes.barh(titles, calls, color=[GREY, GREY, GREY, BLUE], height=0.6)
    for place, count in enumerate(calls):
        axes.annotate(f"{count:,.0f}", (count, place), (5, -4), textcoords="offset points")
    axes.invert_yaxis()
    axes.set_xlim(0, 1150)
    axes.set_xticks(range(0, 1001, 250))
    axes.set_xlabel("network calls for an image")
    axes.tick_params(axis="y", length=0)
    return figure


def timesteps(digits: Digits) -> Figure:
    """How often a single draw is right, by its timestep."""
    right = (digits.errors_BKS.argmin(1) == digits.labels.numpy()[:, None]).mean(0)
    order = np.argsort(digits.timesteps_S)
    figure, axes = plt.subplots(figsize=(6.4, 2.6))
    axes.plot(digits.timesteps_S[order], 100 * right[order], color=BLUE, lw=2)
    axes.axhline(10, color=GREY, ls="--", lw=1)
    axes.annotate("chance", (1, 10), (4, -4), textcoords="offset points", color=GREY)
    axes.set_ylim(0, 100)
    axes.set_xlim(0, 1)
    axes.set_xlabel("t: from clean to noise")
    axes.set_ylabel("right, %")
    return figure


def evidence(digits: Digits) -> Figure:
    """Where in the image the runner-up loses: the difference of squared errors, averaged over draws."""
    result = digits.classify(None, slice(CLOSE, CLOSE + 1))[0]
    first, second = (int(result.candidates_K[place]) for place in result.ranking[:2])
    times = result.timesteps_S
    x_t, eps = digits.noisy(CLOSE, times)
    squares = [
        (digits.predicted_noise(x_t, times, torch.full((len(times),), candidate)) - eps).square()
        for candidate in (first, second)
    ]
    difference = (squares[1] - squares[0]).mean((0, 1))
    figure, (left, right) = plt.subplots(1, 2, figsize=(5.4, 2.4), layout="constrained")
    show(left, digits.images[CLOSE], "the image")
    most = float(difference.abs().max())
    shown = right.imshow(difference, cmap="RdBu", vmin=-most, vmax=most)
    right.set_title(f"blue: for {first}, red: for {second}", fontsize=10)
    right.set_xticks([])
    right.set_yticks([])
    figure.colorbar(shown, ax=right, shrink=0.8)
    return figure


def scenes() -> Figure:
    """Four scenes, classified by prompts."""
    classify = lightning_diffclf.pipeline(str(ROOT / "assets" / "sd_digits"), labels=list(WORDS))
    paths = sorted((ROOT / "tests" / "data" / "scenes").glob("*.png"))
    figure, rows = plt.subplots(2, len(paths), figsize=(6.4, 2.6), gridspec_kw={"hspace": 0.25, "wspace": 0.55})
    for (top, bottom), path in zip(rows.T, paths, strict=True):
        top.imshow(plt.imread(path), cmap="gray")
        top.set_axis_off()
        best = classify(path, top_k=3)[::-1]
        bottom.barh([one["label"] for one in best], [one["score"] for one in best], color=[GREY, GREY, BLUE])
        bottom.set_xlim(0, 1)
        bottom.set_xticks([0, 1], ["0", "100 %"])
        bottom.tick_params(axis="y", length=0)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    plt.rcParams.update(STYLE)
    digits = Digits()
    for draw in (noise, guesses, race, cost, timesteps, evidence):
        draw(digits).savefig(out / f"{draw.__name__}.svg", metadata={"Date": None})
        print(out / f"{draw.__name__}.svg", flush=True)
    scenes().savefig(out / "scenes.svg", metadata={"Date": None})
    labels = torch.arange(10).repeat_interleave(10)
    samples = digits.network.sample(labels, guidance_scale=1.5)
    save_image_grid(samples, [str(k) for k in range(10)], out / "samples.png")


if __name__ == "__main__":
    main()
