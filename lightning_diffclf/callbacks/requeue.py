"""Save, and hand the job back to SLURM, when its time limit comes near or others need its place."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_diffclf.callbacks.diffusion_classifier import DiffusionClassifierCallback
from lightning_diffclf.errors import UserError
from lightning_diffclf.interruption import Left, interrupt

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # either will do; some libraries claim one of them

ENDS = (signal.SIGTERM, signal.SIGHUP)  # of a job that is preempted or cancelled, of a terminal that is gone

SCONTROL_SECONDS = 60.0  # it would wait for longer where SLURM's controller does not answer


class Requeue(Checkpoint):
    """On a signal: save at the next optimizer step, ``scontrol requeue`` this job if it is to go on, end the process.

    SIGUSR1 and SIGUSR2 always requeue. SLURM sends one of them before the time limit where the job script says
    ``#SBATCH --signal=USR1@300`` (not ``B:``: that is for the shell only). All processes save ``last.ckpt`` in the
    folder of the ModelCheckpoint, so that the same command resumes exactly where it stopped (``ckpt_path: last``).
    Outside of SLURM, saving and ending is all.

    SIGTERM and SIGHUP always save. SLURM sends SIGTERM for a preemption as for ``scancel``, and a job that its user
    cancelled must not come back. So it is requeued only if ``scontrol show job`` tells that it runs in the grace time
    of a preemption; one that is preempted without such a time is requeued by SLURM. Under ``nohup`` SIGHUP stays
    ignored.

    In training, the signal handler only takes a note. Whether any process was told is decided by all of them right
    after an optimizer step: never in the middle of a step, of accumulated batches, or of a validation. It takes the
    place of Lightning's handlers, which would write ``hpc_ckpt_*.ckpt`` in the middle of a step, and on SIGTERM wait
    for a broadcast of the first process, whichever was told.

    In ``test``, ``validate`` and ``predict``, a process leaves at once, between two layers of its network: an image may
    take minutes. What it has decided is stored by a DiffusionClassifierCallback that has an ``output_dir``. Without
    one, only SIGTERM and SIGHUP are heard.

    A Checkpoint callback in Lightning's sense, so that it comes after all callbacks that change the weights.

    Args:
        every_n_steps: Optimizer steps from one decision to the next. Each costs a small all-reduce; so many steps and a
            validation have to fit into the time between the signal and the limit.

    Raises:
        ValueError: if ``every_n_steps`` is out of range; from ``setup``, if no ModelCheckpoint is listed before it.
        SystemExit: after saving: status 0; of the first process 1 if SLURM did not take the job back, and 128 plus the
            signal's number if SIGTERM or SIGHUP ended it for good.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise UserError(f"requeue: every_n_steps {every_n_steps}, expected at least 1")
        self.every_n_steps = every_n_steps
        self._told: set[signal.Signals] = set()
        self._stores = False
        self._evaluation: L.Trainer | None = None  # that may be left at once
        self._previous: dict[signal.Signals, Any] = {}  # handlers that were there before
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise UserError(
                f"requeue: the first checkpoint callback is {type(trainer.checkpoint_callback).__name__}, "
                "expected a ModelCheckpoint, which says where checkpoints go"
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._stores = any(isinstance(one, DiffusionClassifierCallback) and one.output_dir for one in callbacks)
        self._told, self._process = set(), os.getpid()
        if stage != "fit" and not self._stores:
            return
        # Not later: the Trainer installs its own handlers between here and the first step, where it finds none.
        for number in SIGNALS:
            previous = signal.signal(number, self._note)
            self._previous.setdefault(number, previous)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}
        self._stores, self._evaluation = False, None

    def _note(self, number: int, *_: Any) -> None:
        if os.getpid() != self._process:  # one that reads data for this one
            return
        self._told.add(signal.Signals(number))
        if self._evaluation is not None:
            interrupt(self._leave_evaluation)

    # Only when the Trainer has installed its own, which it puts beside others; it also puts back what was there before.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        for number in ENDS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        if trainer.state.fn != "fit":
            self._evaluation = trainer
            if trainer.received_sigterm:  # before this process had its own handler
                self._told.add(signal.SIGTERM)
            if self._told:
                self._leave_evaluation()

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = on_train_start

    # --- training --------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._step = self._step, trainer.global_step
        if self._step == before or self._step % self.every_n_steps:
            return
        anyone = partial(trainer.strategy.reduce_boolean_decision, all=False)
        if anyone(bool(self._told)):
            told = {number for number in (*SIGNALS, *ENDS) if anyone(number in self._told)}
            ignore_ends()
            trainer._logger_connector.update_train_step_metrics()  # of this step: Lightning's turn is after this hook
            path = self._save(trainer)
            leave(trainer, f"step {self._step} is saved in {path}", told)

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

    # No decision by all: processes may have different numbers of batches, and there is nothing to save together. SLURM
    # tells each of them; elsewhere the one that started the others does.

    def _leave_evaluation(self) -> None:
        trainer, self._evaluation = self._evaluation, None
        if trainer is None:  # it is leaving already
            return
        ignore_ends()
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        if not self._stores:
            raise Left(128 + min(self._told))
        leave(trainer, "what was decided is stored", self._told)  # by the classifier's on_exception


def ignore_ends() -> None:
    """Let SLURM's SIGTERM, which follows a requeue at once, not disturb a process that is leaving."""
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)


def leave(trainer: L.Trainer, done: str, told: Collection[signal.Signals]) -> None:
    """Have SLURM requeue the job where it is to go on, and end this process.

    Args:
        trainer: Its first process talks to SLURM and to the user.
        done: What has been saved, for the message.
        told: The signals that came.

    Raises:
        SystemExit: always. Not ``trainer.should_stop``: that would end the training properly, with its last callbacks.
    """
    raise Left(hand_back(done, told) if trainer.is_global_zero else 0)


def hand_back(done: str, told: Collection[signal.Signals]) -> int:
    """Have SLURM requeue this job where ``told`` and SLURM say so, and tell the user; returns the process's status."""
    job, ends = job_id(), [number for number in ENDS if number in told]
    status = 128 + ends[0] if ends else 0  # as of a process that such a signal ends: scripts stop here
    if job is None:
        print(f"\nrequeue: {done}; not in a SLURM job: the same command resumes", flush=True)
        return status
    try:
        if ends:
            state = scontrol("show", "job", "--oneliner", job)
            if is_requeued(state):
                print(f"\nrequeue: {done}; SLURM puts job {job} in the queue again", flush=True)
                return 0
            if not goes_on(state, time_limit=len(told) > len(ends)):
                cause = f"{ends[0].name} came without a preemption"
                print(
                    f"\nrequeue: {done}; job {job} is not requeued ({cause}): the same job script resumes", flush=True
                )
                return status
        scontrol("requeue", job)
    except FailedCommand as complaint:
        message = (
            f"error: requeue: {done}, but SLURM did not requeue job {job} ({complaint}). Submit the same job "
            "script again: it resumes from there. Jobs may requeue themselves with #SBATCH --requeue"
        )
        print(f"\n{message}", file=sys.stderr, flush=True)
        return 1
    print(f"\nrequeue: {done}; job {job} is in the queue again", flush=True)
    return 0


def is_requeued(state: str) -> bool:
    """Whether SLURM has put this job back already: it was started again more often than this process knows of."""
    restarts = re.search(r"\bRestarts=(\d+)", state)
    return restarts is not None and int(restarts[1]) > int(os.environ.get("SLURM_RESTART_COUNT", 0))


def goes_on(state: str, time_limit: bool) -> bool:
    """Whether a job that was told to end should be requeued, by what ``scontrol show job`` says of it.

    In the grace time of a preemption it is running and has a PreemptTime; when that is over, SLURM would cancel it in
    one mode, requeue it in the other, unless it has ended before. One that is cancelled has no PreemptTime.

    Args:
        state: What ``scontrol show job`` says.
        time_limit: Whether the signal before the time limit had come too: a job that then reaches it goes on.

    Example:
        >>> goes_on("JobId=7 JobState=RUNNING Reason=None PreemptTime=2026-11-25T04:42:24", time_limit=False)
        True
        >>> goes_on("JobId=7 JobState=COMPLETING Reason=None PreemptTime=None", time_limit=False)
        False
    """
    preempted = re.search(r"\bPreemptTime=\d", state) is not None and " JobState=RUNNING " in f" {state} "
    return preempted or (time_limit and " Reason=TimeLimit " in f" {state} ")


def job_id() -> str | None:
    """What ``scontrol`` calls this job, also if it is one of an array; None outside of SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


class FailedCommand(Exception):
    """What SLURM's command answered instead of doing what it was told."""


def scontrol(*args: str) -> str:
    """Run ``scontrol``; returns what it prints.

    Raises:
        FailedCommand: if it is missing, did not answer, or did not do it.
    """
    try:
        answer = subprocess.run(
            ["scontrol", *args], capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FailedCommand(str(error)) from error
    if answer.returncode != 0:
        raise FailedCommand(f"scontrol: {(answer.stderr or answer.stdout).strip()}")
    return answer.stdout
