"""Our job scripts on a real SLURM: two nodes on this machine, made of Debian's packages, torn down afterwards.

Tests share one training without interruption, with which the others are compared bit by bit.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_diffclf.cli import evaluate

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.ddp]

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "configs" / "slurm"

INTERVAL = 20  # steps between checkpoints

STATES_BEFORE_THE_END = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}

CPU = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]

QUICK = [
    "--config=dit_digits.yaml",
    *CPU,
    "--trainer.max_steps=300",
    "--trainer.val_check_interval=300",
    f"--checkpoint.every_n_train_steps={INTERVAL}",
    "--model.hidden_size=16",
    "--model.depth=1",
    "--model.num_heads=2",
    "--ema.decay=0.95",
    "--data.batch_size=32",
    "--classifier.fit_images=0",
    "--samples.columns=0",
]


class Cluster:
    """A running SLURM, by its commands."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, log: Path, script: str, *args: str, nodes: int = 1, tasks: int = 1, options: tuple = ()) -> str:
        """Submit one of our files, for this machine; returns the job's number."""
        shape = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--gpus-per-node=0", "--cpus-per-task=1"]
        shape = shape if script != "evaluate_merge.sbatch" else []
        out = f"--output={log}/%x-%j.out"
        return self.run("sbatch", "--parsable", *shape, out, *options, str(JOBS / script), *args).strip()

    def show(self, job: str) -> list[dict[str, str]]:
        """What SLURM says of a job, or of each task of an array."""
        lines = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()
        return [dict(pair.split("=", 1) for pair in line.split() if "=" in pair) for line in lines]

    def wait(self, job: str, log: Path, state: str = "COMPLETED") -> list[dict[str, str]]:
        """Wait until a job has ended; ``state`` is how it should."""

        def ended() -> list[dict[str, str]]:
            tasks = self.show(job)
            over = all(task["EndTime"] != "Unknown" and task["JobState"] not in STATES_BEFORE_THE_END for task in tasks)
            return tasks if over else []

        tasks = until(ended, log)
        assert {task["JobState"] for task in tasks} == {state}, logs(log)
        return tasks


def logs(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.out")))


def until(found: Callable[[], object], log: Path, seconds: float = 240.0):
    """What ``found`` returns, as soon as that is something."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, logs(log)
        time.sleep(0.05)
    return result


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # The name of a unix socket is short, so the folder of the state must not be one of pytest's.
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder:
        knobs = {"DIR": f"{folder}/state", "MODE": "private", "EXTRA": f"FirstJobId={os.getpid()}"}  # a port follows it
        env = os.environ | {f"LOCAL_SLURM_{name}": value for name, value in knobs.items()}
        script = ["bash", str(ROOT / "tests" / "scripts" / "slurm_local.sh")]
        try:
            started = subprocess.run([*script, "start"], env=env, capture_output=True, text=True, timeout=180)
            if started.returncode != 0:
                pytest.skip(f"no SLURM to be had here: {(started.stderr.strip().splitlines() or ['?'])[-1]}")
            # Not in this process's own environment: with srun at hand, Lightning warns where it is not used.
            settings = dict(re.findall(r"(\w+)='([^']*)'", started.stdout))
            yield Cluster(
                {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
                | settings
                | {
                    "PATH": f"{Path(sys.executable).parent}:{settings['PATH']}:{os.environ['PATH']}",
                    "VENV": sys.prefix,
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                }
            )
        finally:
            subprocess.run([*script, "stop"], env=env, capture_output=True, timeout=120)


@pytest.fixture(scope="session")
def undisturbed(cluster, tmp_path_factory) -> Path:
    """A run of two tasks on one node."""
    folder = tmp_path_factory.mktemp("undisturbed")
    cluster.wait(cluster.submit(folder, "train.sbatch", *QUICK, f"--run_dir={folder}/run", tasks=2), folder)
    return folder / "run"


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_training(run: Path, other: Path) -> None:
    first, second = last(run), last(other)
    assert first["global_step"] == second["global_step"] == 300
    for part in ("state_dict", "current_model_state"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), (part, name)
    assert list(run.rglob("hpc_ckpt_*")) == []


def saved_steps(run: Path) -> list[int]:
    """Steps of the numbered checkpoints, of which only the newest stays."""
    return [int(path.stem.partition("step=")[2]) for path in run.glob("checkpoints/epoch=0-step=*.ckpt")]


def test_a_signalled_job_saves_requeues_itself_and_goes_on(cluster, undisturbed, tmp_path):
    """On two nodes, which train exactly as two tasks of one node."""
    job = cluster.submit(tmp_path, "train_multinode.sbatch", *QUICK, f"--run_dir={tmp_path}/run", nodes=2)
    until(lambda: saved_steps(tmp_path / "run"), tmp_path)
    cluster.run("scancel", "--signal=USR1", job)
    (ended,) = cluster.wait(job, tmp_path)
    assert ended["Restarts"] == "1", logs(tmp_path)
    assert ended["NodeList"] == "127.0.0.[1-2]"
    assert logs(tmp_path).count("Starting with 2 processes") == 2
    (step,) = re.findall(r"requeue: step (\d+) is saved in .*; job \d+ is in the queue again", logs(tmp_path))
    assert INTERVAL <= int(step) < 300
    assert f"resuming from {tmp_path}/run/checkpoints/last.ckpt" in logs(tmp_path)
    assert_same_training(tmp_path / "run", undisturbed)


def test_a_killed_job_loses_at_most_what_came_after_the_last_checkpoint(cluster, undisturbed, tmp_path):
    args = "train.sbatch", *QUICK, f"--run_dir={tmp_path}/run"
    job = cluster.submit(tmp_path, *args, tasks=2)
    until(lambda: max(saved_steps(tmp_path / "run"), default=0) > INTERVAL, tmp_path)
    cluster.run("scancel", "--signal=KILL", f"{job}.0")  # its step: KILL to the job would be SIGTERM first
    cluster.wait(job, tmp_path, "FAILED")
    left = last(tmp_path / "run")["global_step"]
    assert left % INTERVAL == 0
    assert max(saved_steps(tmp_path / "run")) - INTERVAL <= left < 300  # last.ckpt is the later one of a pair
    cluster.wait(cluster.submit(tmp_path, *args, tasks=2), tmp_path)
    assert f"resuming from {tmp_path}/run/checkpoints/last.ckpt" in logs(tmp_path)
    assert_same_training(tmp_path / "run", undisturbed)


def test_an_array_classifies_each_image_once(cluster, undisturbed, tmp_path):
    ckpt = ["--ckpt", str(undisturbed / "checkpoints" / "last.ckpt"), *CPU, "--classifier.draws=20"]
    array = cluster.submit(tmp_path, "evaluate_array.sbatch", f"{tmp_path}/whole", *ckpt, options=("--array=0-2",))
    merge = cluster.submit(
        tmp_path, "evaluate_merge.sbatch", f"{tmp_path}/whole", options=(f"--dependency=afterok:{array}",)
    )
    evaluate([*ckpt, "--out", str(tmp_path / "undivided")])
    assert len(cluster.wait(array, tmp_path)) == 3
    cluster.wait(merge, tmp_path)

    def decided(folder: Path) -> pa.Table:
        return pq.read_table(folder / "predictions.parquet").sort_by("id").select(["id", "label", "prediction", "nfe"])

    parts = [decided(tmp_path / "whole" / f"part-{number}-of-3").num_rows for number in (1, 2, 3)]
    assert sum(parts) == 360
    assert min(parts) > 80
    whole = decided(tmp_path / "whole")
    assert whole.equals(decided(tmp_path / "undivided"))
    right = [
        label == prediction
        for label, prediction in zip(whole["label"].to_pylist(), whole["prediction"].to_pylist(), strict=True)
    ]
    assert sum(right) / 360 > 0.2  # by chance: 0.1
