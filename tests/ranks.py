"""Several ranks of a program, forked from one process, so that what takes longest, the imports, is done once.

Each finds the environment that torchrun would have started it with.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import find_free_network_port

ROOT = Path(__file__).parents[1]


def run_ranks(script: str, *calls: tuple[Any, ...]) -> list[list[Any]]:
    """What ``work(devices, …)`` of a script of ours returned, one call after the other: that of each rank."""
    command = [sys.executable, f"tests/scripts/{script}", json.dumps(calls, default=str)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def answer(work: Callable[..., Any]) -> None:
    """What such a script does."""
    print(json.dumps([on_ranks(work, *call) for call in json.loads(sys.argv[1])]))


def on_ranks(work: Callable[..., Any], devices: int, *args: Any) -> list[Any]:
    port = find_free_network_port()
    with ProcessPoolExecutor(devices, multiprocessing.get_context("fork")) as ranks:
        return list(ranks.map(partial(on_rank, work, devices, port, args), range(devices)))


def on_rank(work: Callable[..., Any], devices: int, port: int, args: tuple[Any, ...], rank: int) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "one"}
    os.environ |= {"WORLD_SIZE": str(devices), "LOCAL_WORLD_SIZE": str(devices)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        return work(devices, *args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # which ends the others as well, that would wait for it
