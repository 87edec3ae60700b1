import os
import resource
import signal
import time

import pytest
import torch

from lightning_diffclf.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_diffclf.errors import UserError
from lightning_diffclf.models.published import is_published
from lightning_diffclf.modules.checkpoints import read_checkpoint


def test_writes_what_torch_reads(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"step": step, "weight": torch.full((3,), float(step))}, path)
        found = torch.load(path, weights_only=True)
        assert found["step"] == step
        assert found["weight"].tolist() == [step] * 3
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def in_child(function) -> int:
    """Run ``function`` in a process of its own; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    return child


def test_a_kill_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    many = {"step": 2, "weights": [torch.zeros(1_000_000) for _ in range(200)]}  # 800 MB are not written at once
    child = in_child(lambda: AtomicCheckpointIO().save_checkpoint(many, path))
    while not any(part.stat().st_size > 0 for part in tmp_path.glob("*.tmp")):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert torch.load(path, weights_only=True) == {"step": 1}
    [part] = tmp_path.glob("*.tmp")
    with pytest.raises((RuntimeError, OSError)):
        torch.load(part, weights_only=True)  # it was in the middle
    AtomicCheckpointIO().save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]  # what was left goes: it is large


def test_of_a_damaged_checkpoint_the_newest_whole_one_is_named(tmp_path):
    for number, name in enumerate(["epoch=0-step=1.ckpt", "epoch=0-step=3.ckpt", "epoch=0-step=2.ckpt", "last.ckpt"]):
        AtomicCheckpointIO().save_checkpoint({"weight": torch.arange(3) + number}, tmp_path / name)
        os.utime(tmp_path / name, (number, number))
    for name in ("last.ckpt", "epoch=0-step=2.ckpt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        os.utime(tmp_path / name, (9, 9))
    found = (
        r"last.ckpt' cannot be read \(it is damaged.*; the newest .* is '.*epoch=0-step=3.ckpt': --ckpt_path takes it"
    )
    for read in (is_published, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(UserError, match=found):
            read(tmp_path / "last.ckpt")
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match="none of the 3 others beside it is whole"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # as a full disk
        try:
            AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(10_000)}, path)
        except OSError as error:
            (tmp_path / "error").write_text(str(error))

    os.waitpid(in_child(save), 0)
    said = (tmp_path / "error").read_text()
    assert said.startswith(f"checkpoint: '{path}' cannot be written (")
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["error", "last.ckpt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoint: '.*last.ckpt' cannot be written"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")
