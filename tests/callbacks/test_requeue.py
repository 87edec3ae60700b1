import csv
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_diffclf import EMA, ClassConditionalDiT, DiffusionClassifierCallback
from lightning_diffclf.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_diffclf.callbacks.loggers import AppendingCSVLogger
from lightning_diffclf.callbacks.requeue import ENDS, SIGNALS, Requeue
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.results import store
from lightning_diffclf.results.row_files import write_part
from lightning_diffclf.results.stored import read_table
from tests.gaussians import Gaussians, loader

SCRIPT = Path(__file__).parents[1] / "scripts" / "fit_requeue.py"

ONE_TASK = {"NTASKS": 1, "NTASKS_PER_NODE": 1, "NNODES": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "dit"}


@pytest.fixture(autouse=True)
def _handlers():
    """A run that is left by SystemExit leaves its handlers to a process that is about to end."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *ENDS)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests themselves run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A ``scontrol`` that writes down what it was told; returns the file."""
    told, folder = tmp_path / "told", tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>"{told}"\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return told


@pytest.fixture
def job(scontrol, monkeypatch):
    """As in a job of one task, for Lightning as well."""
    for name, value in ({"JOB_ID": 12} | ONE_TASK).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return scontrol


class Signalling(L.Callback):
    """Sends this process a signal at the start of a batch of training, or of the first one of a validation."""

    def __init__(self, batch: int | str | None, number: int | tuple[int, ...] = signal.SIGUSR1) -> None:
        self.batch, self.numbers = batch, number if isinstance(number, tuple) else (number,)

    def signal(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            self.signal()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.batch == "validation" and batch_idx == 0:
            self.signal()


def fit(
    folder: Path,
    batch: int | str | None = None,
    number: int | tuple[int, ...] = signal.SIGUSR1,
    every_n_steps: int = 1,
    logger: AppendingCSVLogger | bool = False,
    **kwargs,
):
    """Eight steps, with validation after the fourth; resumes from last.ckpt if there is one."""
    torch.manual_seed(0)
    last = folder / "last.ckpt"
    checkpoint = ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=8)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        max_steps=8,
        max_epochs=-1,
        default_root_dir=folder,
        # The averaging comes last on purpose: Lightning has to put it before the others.
        callbacks=[Signalling(batch, number), checkpoint, Requeue(every_n_steps), EMA(0.9)],
        plugins=[AtomicCheckpointIO()],
        **kwargs,
    )
    dit = ClassConditionalDiT(
        input_size=8, in_channels=1, num_classes=10, latents=False, hidden_size=16, depth=1, num_heads=2
    )
    trainer.fit(dit, DigitsDataModule(batch_size=16), ckpt_path=str(last) if last.exists() else None)


def rows(folder: Path) -> list[str]:
    with open(folder / "logs" / "version_0" / "metrics.csv", newline="") as file:
        return [row["step"] for row in csv.DictReader(file) if row["train/loss"]]


def read(folder: Path) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_same_training(first: dict, second: dict) -> None:
    assert first["global_step"] == second["global_step"]
    for part in ("state_dict", "current_model_state"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), (part, name)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_step_that_is_saved_is_logged_too(tmp_path):
    for batch, last in ((2, 2), (None, 7)):
        settings = {"logger": AppendingCSVLogger(tmp_path, name="logs", version=0), "log_every_n_steps": 1}
        with pytest.raises(SystemExit) if batch else nullcontext():
            fit(tmp_path, batch, **settings)
        assert rows(tmp_path) == [str(step) for step in range(last + 1)]


@pytest.mark.parametrize(
    ("batch", "settings", "step"),
    [
        (2, {}, 3),
        (2, {"number": signal.SIGUSR2}, 3),
        ("validation", {}, 5),  # average and trained weights have changed places there
        (2, {"accumulate_grad_batches": 2}, 2),  # in the first batch of the second step
        (1, {"every_n_steps": 3}, 3),
        (7, {}, 8),  # nothing is left to do when the job starts again
    ],
    ids=["step", "other signal", "validation", "accumulation", "every third step", "last step"],
)
def test_saves_at_the_step_and_goes_on_as_if_nothing_had_been(tmp_path, job, capsys, batch, settings, step):
    with pytest.raises(SystemExit) as left:
        fit(tmp_path / "run", batch, **settings)
    assert left.value.code == 0
    assert job.read_text() == "requeue 12\n"
    assert f"step {step} is saved in {tmp_path}/run/last.ckpt; job 12 is in the queue again" in capsys.readouterr().out
    saved = read(tmp_path / "run")
    assert saved["global_step"] == step
    settings.pop("number", None)
    fit(tmp_path / "run", **settings)
    fit(tmp_path / "undisturbed", **settings)
    assert_same_training(read(tmp_path / "run"), read(tmp_path / "undisturbed"))
    # Neither Lightning's own files nor a second last.ckpt beside that of the requeue.
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["epoch=0-step=8.ckpt", "last.ckpt"]
    names = read(tmp_path / "run")["state_dict"].keys()
    assert any(not torch.equal(saved["state_dict"][name], saved["current_model_state"][name]) for name in names)


def says(folder: Path, state: str) -> None:
    """Have the job's ``scontrol`` say this of it, as SLURM 22.05 was seen to."""
    with (folder / "bin" / "scontrol").open("a") as script:
        script.write(f'[ "$1" = requeue ] || echo "JobId=12 JobName=dit {state}"\n')


PREEMPTED = "JobState=RUNNING Reason=None Requeue=1 Restarts=0 PreemptTime=2026-11-25T04:42:24"
CANCELLED = "JobState=COMPLETING Reason=None Requeue=1 Restarts=0 PreemptTime=None"
AT_ITS_LIMIT = "JobState=COMPLETING Reason=TimeLimit Requeue=1 Restarts=0 PreemptTime=None"
REQUEUED = "JobState=COMPLETING Reason=None Requeue=1 Restarts=1"
RUNNING = "JobState=RUNNING Reason=None Requeue=1 Restarts=0 PreemptTime=None"

ASKED, BOTH = "show job --oneliner 12\n", "show job --oneliner 12\nrequeue 12\n"

TERM, HUP, USR1 = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


@pytest.mark.parametrize(
    ("number", "state", "told", "status", "message"),
    [
        (TERM, PREEMPTED, BOTH, 0, "job 12 is in the queue again"),
        (TERM, REQUEUED, ASKED, 0, "SLURM puts job 12 in the queue again"),
        (TERM, CANCELLED, ASKED, 143, "job 12 is not requeued (SIGTERM came without a preemption)"),
        (TERM, RUNNING, ASKED, 143, "job 12 is not requeued (SIGTERM"),
        (TERM, AT_ITS_LIMIT, ASKED, 143, "job 12 is not requeued (SIGTERM"),
        (HUP, RUNNING, ASKED, 129, "job 12 is not requeued (SIGHUP"),
        ((USR1, TERM), AT_ITS_LIMIT, BOTH, 0, "job 12 is in the queue again"),
        ((USR1, TERM), CANCELLED, ASKED, 143, "job 12 is not requeued (SIGTERM"),
    ],
)
def test_sigterm_saves_and_requeues_only_where_slurm_says_so(
    tmp_path, job, capsys, number, state, told, status, message
):
    says(tmp_path, state)
    with pytest.raises(SystemExit) as left:
        fit(tmp_path / "run", 2, number)
    assert left.value.code == status
    assert job.read_text() == told
    assert f"step 3 is saved in {tmp_path}/run/last.ckpt; {message}" in capsys.readouterr().out
    assert read(tmp_path / "run")["global_step"] == 3


def test_a_job_that_was_requeued_before_is_not_taken_for_requeued_now(tmp_path, job, monkeypatch):
    says(tmp_path, CANCELLED.replace("Restarts=0", "Restarts=2"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(SystemExit) as left:
        fit(tmp_path / "run", 2, TERM)
    assert (left.value.code, job.read_text()) == (143, ASKED)


def test_sigterm_where_slurm_does_not_answer_is_an_error_with_its_remedy(tmp_path, job, capsys):
    (tmp_path / "bin" / "scontrol").write_text("#!/nowhere\n")
    with pytest.raises(SystemExit) as left:
        fit(tmp_path / "run", 2, TERM)
    assert left.value.code == 1
    assert "SLURM did not requeue job 12 ([Errno 2]" in capsys.readouterr().err
    assert read(tmp_path / "run")["global_step"] == 3


@pytest.mark.parametrize(("number", "status"), [(TERM, 143), (HUP, 129)])
def test_sigterm_and_sighup_outside_of_slurm_go_on_as_if_nothing_had_been(tmp_path, scontrol, number, status):
    """During a validation, so that the Trainer has had its own handlers."""
    with pytest.raises(SystemExit) as left:
        fit(tmp_path / "run", "validation", number)
    assert left.value.code == status
    assert read(tmp_path / "run")["global_step"] == 5
    assert not scontrol.exists()
    fit(tmp_path / "run")
    fit(tmp_path / "undisturbed")
    assert_same_training(read(tmp_path / "run"), read(tmp_path / "undisturbed"))


def test_sighup_stays_ignored(tmp_path, scontrol):
    """As nohup has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    fit(tmp_path / "run", 2, HUP)
    assert read(tmp_path / "run")["global_step"] == 8


@pytest.mark.ddp
def test_all_processes_leave_when_one_is_told(tmp_path, job):
    """Two processes, of which the second one gets the signal that Lightning would answer by waiting for the first."""
    says(tmp_path, PREEMPTED)
    done = run_script(tmp_path, "2", "SIGTERM", SLURM_NTASKS=None)
    assert done.returncode == 0, done.stderr
    assert job.read_text() == BOTH
    assert read(tmp_path)["global_step"] == 3
    assert "job 12 is in the queue again" in done.stdout


def run_script(folder: Path, *args: str, **changes: str | None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in (os.environ | changes).items() if value is not None}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *args],
        env=env | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_full_disk_leaves_the_old_checkpoint_and_the_job_ends_with_an_error(tmp_path, job):
    with pytest.raises(SystemExit):
        fit(tmp_path, 0)
    before = (tmp_path / "last.ckpt").read_bytes()
    done = run_script(tmp_path, "1", "SIGUSR1", "full")
    assert done.returncode != 0
    assert f"checkpoint: '{tmp_path}/last.ckpt' cannot be written (" in done.stderr
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert list(tmp_path.glob("*.tmp")) == []
    assert job.read_text() == "requeue 12\n"  # that of the first run


def test_outside_of_slurm_the_same_command_goes_on(tmp_path, scontrol, capsys):
    with pytest.raises(SystemExit) as left:
        fit(tmp_path / "run", 2)
    assert left.value.code == 0
    assert "not in a SLURM job: the same command resumes" in capsys.readouterr().out
    assert not scontrol.exists()


def test_a_task_of_an_array_requeues_itself_only(tmp_path, job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", 0)
    assert job.read_text() == "requeue 10_3\n"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (
            "#!/bin/sh\necho 'Requested operation is presently disabled' >&2; exit 1\n",
            "operation is presently disabled",
        ),
        ("#!/nowhere\n", "No such file or directory"),
    ],
)
def test_a_requeue_that_fails_is_an_error_with_its_remedy(tmp_path, job, capsys, command, complaint):
    (tmp_path / "bin" / "scontrol").write_text(command)
    with pytest.raises(SystemExit) as left:
        fit(tmp_path / "run", 2)
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert f"step 3 is saved in {tmp_path}/run/last.ckpt, but SLURM did not requeue job 12" in error
    assert "Submit the same job script again" in error


def test_handlers_are_put_back(tmp_path, job):
    before = [signal.getsignal(number) for number in (*SIGNALS, *ENDS)]
    fit(tmp_path / "run")
    assert [signal.getsignal(number) for number in (*SIGNALS, *ENDS)] == before


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="requeue: every_n_steps 0, expected at least 1"):
        Requeue(every_n_steps=0)
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[Requeue()], default_root_dir=tmp_path)
    with pytest.raises(
        ValueError, match="requeue: the first checkpoint callback is Requeue, expected a ModelCheckpoint"
    ):
        trainer.fit(Gaussians(), loader(4))


# --- evaluation -------------------------------------------------------------------------------------------------------


class SignallingEvaluation(L.Callback):
    def __init__(self, number: int = signal.SIGUSR1) -> None:
        self.number = number

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 2:
            os.kill(os.getpid(), self.number)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start


def evaluate(
    stage: str, out: Path, *callbacks: L.Callback, network: Gaussians | None = None, flush_every: int = 100
) -> None:
    classifier = DiffusionClassifierCallback(draws=5, microbatch=16, output_dir=str(out), flush_every=flush_every)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[classifier, *callbacks],
    )
    options = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(network or Gaussians(), loader(20), **options)


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_an_evaluation_keeps_what_is_decided_and_goes_on(tmp_path, job, stage):
    with pytest.raises(SystemExit) as left:
        evaluate(stage, tmp_path / "out", SignallingEvaluation(), Requeue())
    assert left.value.code == 0
    assert job.read_text() == "requeue 12\n"
    assert read_table(tmp_path / "out").num_rows == 7  # of 8 images; the last one does not fill a micro-batch
    evaluate(stage, tmp_path / "out")
    evaluate(stage, tmp_path / "undisturbed")
    columns = ["id", "prediction", "nfe"]
    first, second = (read_table(tmp_path / name).select(columns).sort_by("id") for name in ("out", "undisturbed"))
    assert first.num_rows == 20
    assert first.equals(second)


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
@pytest.mark.parametrize(("number", "status"), [(TERM, 143), (HUP, 129)])
def test_an_evaluation_that_is_ended_keeps_what_is_decided(tmp_path, scontrol, stage, number, status):
    with pytest.raises(SystemExit) as left:
        evaluate(stage, tmp_path / "out", SignallingEvaluation(number), Requeue())
    assert left.value.code == status
    assert read_table(tmp_path / "out").num_rows == 7  # of 8 images; the last one does not fill a micro-batch
    assert not scontrol.exists()


def test_a_preempted_evaluation_is_requeued(tmp_path, job):
    says(tmp_path, PREEMPTED)
    with pytest.raises(SystemExit) as left:
        evaluate("test", tmp_path / "out", SignallingEvaluation(TERM), Requeue())
    assert (left.value.code, job.read_text()) == (0, BOTH)


class SignallingNetwork(Gaussians):
    """Is told to end in the middle of a network call; counts the calls that it sees through."""

    def __init__(self, call: int, number: int = TERM) -> None:
        super().__init__()
        self.call, self.number, self.begun, self.ended = call, number, 0, 0

    def predict(self, x_t, t, candidate):
        self.begun += 1
        if self.begun == self.call:
            os.kill(os.getpid(), self.number)
        output = super().predict(x_t, t, candidate)
        self.ended += 1
        return output


@pytest.mark.parametrize(("number", "status"), [(TERM, 143), (signal.SIGUSR1, 0)])
def test_an_evaluation_is_left_in_the_middle_of_an_image(tmp_path, scontrol, capsys, number, status):
    network = SignallingNetwork(30, number)
    with pytest.raises(SystemExit) as left:
        evaluate("test", tmp_path / "out", Requeue(), network=network)
    assert (left.value.code, network.begun, network.ended) == (status, 30, 29)
    assert "what was decided is stored; not in a SLURM job: the same command resumes" in capsys.readouterr().out
    before = read_table(tmp_path / "out")
    assert 0 < before.num_rows <= 29 * 16 // 35  # all that 29 micro-batches can have decided
    evaluate("test", tmp_path / "out", Requeue(), network=SignallingNetwork(-1, number))
    evaluate("test", tmp_path / "undisturbed")
    first, second = (read_table(tmp_path / name).select(["id", "prediction", "nfe"]) for name in ("out", "undisturbed"))
    assert first.sort_by("id").equals(second.sort_by("id"))


def test_an_evaluation_is_not_left_in_the_middle_of_writing(tmp_path, monkeypatch):
    """What was being written is there, whole, and the program ends right after."""
    written = []

    def told_while_writing(table, path):
        os.kill(os.getpid(), TERM)
        write_part(table, path)
        written.append(path)

    monkeypatch.setattr(store, "write_part", told_while_writing)
    network = SignallingNetwork(-1)
    with pytest.raises(SystemExit) as left:
        evaluate("test", tmp_path / "out", Requeue(), network=network, flush_every=3)
    assert left.value.code == 143
    assert [path.is_file() for path in written] == [True]
    assert read_table(tmp_path / "out").num_rows == 3
    assert network.ended < 20 * 35 // 16


def test_the_process_that_reads_data_does_not_hand_the_job_back():
    requeue = Requeue()
    requeue.setup(SimpleNamespace(callbacks=[]), None, "test")
    requeue._process += 1
    requeue._note(TERM)
    assert requeue._told == set()


def test_an_evaluation_that_stores_nothing_only_ends(tmp_path, job):
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(TERM)
    seen = []

    class Looking(L.Callback):
        def on_test_start(self, trainer, pl_module):
            seen.append(signal.getsignal(signal.SIGUSR1))

    class Told(L.Callback):
        def on_test_batch_start(self, *_):
            os.kill(os.getpid(), TERM)

    def run(*callbacks):
        L.Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), default_root_dir=tmp_path).test(
            Gaussians(), loader(4), verbose=False
        )

    requeue = Requeue()
    run(requeue, Looking())
    assert seen[0] != requeue._note
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(TERM)) == before
    with pytest.raises(SystemExit) as left:
        run(requeue, Told())
    assert left.value.code == 143
    assert not job.exists()
