"""What candidates share in a UNet: python benchmarks/bench_sharing.py [--pairs 7].

Calls of `predict_shared`, where candidates of an (image, draw) pair share what comes before the first cross-attention
and prompts' keys and values are looked up, beside `predict`, which repeats all for each row. FLOPs are counted by
torch; CPU seconds are the process's own, medians of calls in turn, with the quartiles of the ratio of two neighbours.
The published UNets are counted on tensors without data, at the size they were trained for.
"""

import argparse
import platform
import time
from collections.abc import Callable
from datetime import date

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tasks import TASKS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf.models import unet
from lightning_diffclf.models.sharing import Sharing

ROWS = 64
PER_PAIR = (2, 8, 64)  # candidates of a pair: late in a contest, after a search, at the beginning
PUBLISHED = {
    "Stable Diffusion 1.x": (64, {"cross_attention_dim": 768}),
    "Stable Diffusion 2.x": (
        64,
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    ),
}


def flops(call: Callable[[], Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def published(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    """Shared and plain call of a published UNet, and latents, all without data."""
    size, config = PUBLISHED[name]
    with torch.device("meta"):
        network = UNet2DConditionModel(sample_size=size, **config).eval()
        prompts, x_t = torch.empty(ROWS, 77, config["cross_attention_dim"]), torch.empty(ROWS, 4, size, size)
    sharing = Sharing(network, unet.predict, {"encoder_hidden_states": prompts}, {})
    return sharing, lambda x, t, c: unet.predict(network, x, t, {"encoder_hidden_states": prompts[c]}), x_t


def small() -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    """Those of assets/sd_digits."""
    task = TASKS["captions"]
    denoiser = task.network()
    x0 = denoiser.encode(task.test()[0][:ROWS])
    return denoiser.predict_shared, denoiser.predict, x0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of calls that are timed")
    args = parser.parse_args()
    print(
        f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {ROWS} rows\n"
    )
    print(
        "| network | candidates of a pair | GFLOPs / row | shared | saved | CPU ms / row | shared | ratio (quartiles) |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in ("assets/sd_digits", *PUBLISHED):
        measured = name not in PUBLISHED
        shared, plain, x_t = small() if measured else published(name)
        for each in PER_PAIR:
            pair = torch.arange(ROWS, device=x_t.device) // each
            candidate = torch.arange(ROWS, device=x_t.device) % each
            x_M, t_M = x_t[: ROWS // each], torch.full((ROWS // each,), 500, device=x_t.device)
            calls = [lambda: plain(x_M[pair], t_M[pair], candidate), lambda: shared(x_M, t_M, pair, candidate)]  # noqa: B023
            calls[1]()  # prompts are done once
            counts = [flops(call) for call in calls]
            cells = [f"{count / ROWS / 1e9:.4g}" for count in counts] + [f"{1 - counts[1] / counts[0]:.1%}"]
            if measured:
                seconds = np.array([[timed(call) for call in calls] for _ in range(args.pairs)])
                cells += [f"{1000 * one / ROWS:.2f}" for one in np.median(seconds, 0)]
                low, middle, high = np.quantile(seconds[:, 1] / seconds[:, 0], (0.25, 0.5, 0.75))
                cells.append(f"{middle:.3f} ({low:.3f} … {high:.3f})")
            else:
                cells += ["", "", ""]
            print("| " + " | ".join([name, str(each), *cells]) + " |", flush=True)


def timed(call: Callable[[], Tensor]) -> float:
    start = time.process_time()
    with torch.no_grad():
        call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
