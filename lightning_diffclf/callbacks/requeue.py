"""Save, and hand the job back to SLURM, when its time limit comes near."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_diffclf.callbacks.diffusion_classifier import DiffusionClassifierCallback
from lightning_diffclf.errors import UserError

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # either will do; some libraries claim one of them

SCONTROL_SECONDS = 60.0  # it would wait for longer where SLURM's controller does not answer


class Requeue(Checkpoint):
    """On SIGUSR1 or SIGUSR2: save at the next optimizer step, ``scontrol requeue`` this job, and end the process.

    SLURM sends the signal before the time limit where the job script says ``#SBATCH --signal=USR1@300`` (not ``B:``:
    that is for the shell only). All processes save ``last.ckpt`` in the folder of the ModelCheckpoint, so that the same
    command resumes exactly where it stopped (``ckpt_path: last``). Outside of SLURM, saving and ending is all.

    The signal handler only sets a flag. Whether any process was told is decided by all of them right after an optimizer
    step: never in the middle of a step, of accumulated batches, or of a validation. With this handler in place,
    Lightning does not install its own, which would write ``hpc_ckpt_*.ckpt`` in the middle of a step.

    In ``test``, ``validate`` and ``predict`` with a DiffusionClassifierCallback that has an ``output_dir``, a process
    leaves at the end of its batch; what it has decided is stored. Other evaluations do not listen.

    A Checkpoint callback in Lightning's sense, so that it comes after all callbacks that change the weights.

    Args:
        every_n_steps: Optimizer steps from one decision to the next. Each costs a small all-reduce; so many steps and a
            validation have to fit into the time between the signal and the limit.

    Raises:
        ValueError: if ``every_n_steps`` is out of range; from ``setup``, if no ModelCheckpoint is listed before it.
        SystemExit: after saving: status 0, or 1 if SLURM did not take the job back.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise UserError(f"requeue: every_n_steps {every_n_steps}, expected at least 1")
        self.every_n_steps = every_n_steps
        self._signalled = False
        self._previous: dict[signal.Signals, Any] = {}  # handlers that were there before
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise UserError(
                f"requeue: the first checkpoint callback is {type(trainer.checkpoint_callback).__name__}, "
                "expected a ModelCheckpoint, which says where checkpoints go"
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        stores = any(isinstance(one, DiffusionClassifierCallback) and one.output_dir for one in callbacks)
        if stage != "fit" and not stores:
            return
        self._signalled = False
        # Not later: the Trainer installs its own handlers between here and the first step, where it finds none.
        for number in SIGNALS:
            previous = signal.signal(number, self._note)
            self._previous.setdefault(number, previous)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def _note(self, *_: Any) -> None:
        self._signalled = True

    # --- training --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._step = self._step, trainer.global_step
        if self._step == before or self._step % self.every_n_steps:
            return
        if trainer.strategy.reduce_boolean_decision(self._signalled, all=False):
            ignore_sigterm()
            path = self._save(trainer)
            leave(trainer, f"step {self._step} is saved in {path}")

    def _save(self, trainer: L.Trainer) -> str:
        """Write ``last.ckpt``, on all ranks together."""
        checkpoint = trainer.checkpoint_callback
        assert isinstance(checkpoint, ModelCheckpoint)
        assert checkpoint.dirpath is not None
        path = os.path.join(checkpoint.dirpath, "last.ckpt")
        # In the state that is saved. A last.ckpt that it does not know would make it write last-v1.ckpt from then on.
        checkpoint.last_model_path = path
        trainer.save_checkpoint(path, weights_only=False)
        return path

    # --- evaluation ------------------------------------------------------------------------------------------------

    # No decision by all: processes may have different numbers of batches. SLURM tells each of them, and there is
    # nothing to save together.

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit":
            self._end_evaluation(trainer)

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._end_evaluation(trainer)

    def on_predict_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._end_evaluation(trainer)

    def _end_evaluation(self, trainer: L.Trainer) -> None:
        if self._signalled:
            ignore_sigterm()
            leave(trainer, "what was decided is stored")  # by the classifier's on_exception


def ignore_sigterm() -> None:
    """Let SLURM's SIGTERM, which follows a requeue at once, not disturb a process that is leaving."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave(trainer: L.Trainer, done: str) -> None:
    """Have SLURM requeue the job, and end this process.

    Args:
        trainer: Its first process talks to SLURM and to the user.
        done: What has been saved, for the message.

    Raises:
        SystemExit: always. Not ``trainer.should_stop``: that would end the training properly, with its last callbacks.
    """
    if trainer.is_global_zero:
        job = job_id()
        if job is None:
            print(f"\nrequeue: {done}; not in a SLURM job: the same command resumes", flush=True)
        else:
            complaint = requeue(job)
            if complaint is not None:
                message = (
                    f"error: requeue: {done}, but SLURM did not requeue job {job} ({complaint}). Submit the same job "
                    "script again: it resumes from there. Jobs may requeue themselves with #SBATCH --requeue"
                )
                print(f"\n{message}", file=sys.stderr, flush=True)
                raise SystemExit(1)
            print(f"\nrequeue: {done}; job {job} is in the queue again", flush=True)
    raise SystemExit(0)


def job_id() -> str | None:
    """What ``scontrol`` calls this job, also if it is one of an array; None outside of SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def requeue(job: str) -> str | None:
    """Run ``scontrol requeue``; returns None if that went well, else what went wrong."""
    try:
        answer = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if answer.returncode == 0 else f"scontrol: {(answer.stderr or answer.stdout).strip()}"
