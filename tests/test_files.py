"""Files that are whole or not there, and folders that one process writes to at a time."""

import os
import signal
import subprocess

import pytest

from lightning_diffclf import files
from lightning_diffclf.errors import FailedWrite, MissingFile, UserError
from lightning_diffclf.files import (
    FolderLock,
    read_checked_json,
    read_json,
    remove_temporaries,
    replacing,
    write_checked_json,
    write_json,
    write_text,
)


def in_child(function) -> int:
    """Run ``function`` in a process of its own, which then waits to be killed; returns its id once it is done."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            function()
            os.write(writer, b"done")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 4) == b"done"
    os.close(reader)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# --- writing and reading -------------------------------------------------------------------------------------------


def test_a_file_is_what_it_was_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text("one", path)
    with replacing(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
        assert temporary.parent == path.parent  # or it could not be renamed
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_two_who_write_the_same_file_do_not_mix(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("1" * 100)
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1" * 100


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyboardInterrupt(), UserError("told"), MissingFile("x")])
def test_errors_leave_the_old_file_and_pass_as_they_are(error, tmp_path):
    write_text("one", tmp_path / "a")

    def write() -> None:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "one")]


def test_a_full_disk_is_told_in_one_line(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small disk to fill")
    try:
        with pytest.raises(FailedWrite, match=r"report: '.*/a' cannot be written \(.*No space left.* is complete"):
            write_text("x" * 100_000, small / "a", "report")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_folders_that_cannot_be_made_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedWrite, match=r"picture: '.*file/a' cannot be written"):
        write_json([1], tmp_path / "file" / "a", what="picture")


def test_json_comes_back_and_other_files_are_told(tmp_path):
    write_json({"name": "ü", "values": [1, 2.5, None]}, tmp_path / "a.json", indent=2)
    assert read_json(tmp_path / "a.json") == {"name": "ü", "values": [1, 2.5, None]}
    (tmp_path / "b.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"run: '.*b.json' cannot be read"):
        read_json(tmp_path / "b.json", "run")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
    with pytest.raises(MissingFile, match=r"run: no file '.*c.json'"):
        read_json(tmp_path / "c.json", "run")


def test_json_with_a_checksum_is_read_as_it_was_written_or_not_at_all(tmp_path):
    values = {"counts": {"a.tar": 3, "ü": 4}, "scaling": 0.18215, "classes": ["cat"]}
    write_checked_json(values, tmp_path / "a.json")
    whole = (tmp_path / "a.json").read_bytes()
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1
        (tmp_path / "b.json").write_bytes(broken)
        try:
            found = read_checked_json(tmp_path / "b.json")
        except UserError:
            pass
        else:  # white space; another name than that of the checksum, which its readers do not know
            assert found == values or (found.keys() - values.keys() and values.items() <= found.items())
    write_json(values, tmp_path / "c.json")  # by hand
    assert read_checked_json(tmp_path / "c.json") == values
    (tmp_path / "a.json").write_bytes(whole.replace(b"0.18215", b"0.18275"))
    with pytest.raises(UserError, match=r"index: '.*a.json' was changed or damaged: it does not have its checksum"):
        read_checked_json(tmp_path / "a.json", "index")


def test_what_killed_processes_left_can_be_removed(tmp_path):
    def write() -> None:
        opened.__enter__().write_text("half")

    opened = replacing(tmp_path / "a")
    kill(in_child(write))
    write_text("other", tmp_path / "b.txt")
    assert len(list(tmp_path.iterdir())) == 2
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


# --- one process at a time -----------------------------------------------------------------------------------------


def test_a_folder_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    child = in_child(lambda: FolderLock(tmp_path))
    with pytest.raises(
        UserError, match=rf"output: '{tmp_path}' is being written to by process {child} on \S+ for 0:00:"
    ):
        FolderLock(tmp_path)
    kill(child)
    assert (tmp_path / files.LOCK).is_file()  # what is left locks nothing
    lock = FolderLock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path), pytest.raises(UserError):
        FolderLock(tmp_path)
    FolderLock(tmp_path).release()


def test_workers_that_outlive_a_killed_process_do_not_hold_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)

    def with_worker() -> None:
        FolderLock(tmp_path)
        worker = in_child(lambda: None)
        (tmp_path / "worker").write_text(str(worker))

    child = in_child(with_worker)
    kill(child)
    worker = int((tmp_path / "worker").read_text())
    try:
        os.kill(worker, 0)  # it lives
        FolderLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_dying_process_is_waited_for(tmp_path):
    child = in_child(lambda: FolderLock(tmp_path))
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {child}"])
    FolderLock(tmp_path).release()
    os.waitpid(child, 0)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuses(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuses)
    with pytest.warns(RuntimeWarning, match="file system without locks"), FolderLock(tmp_path):
        pass


def test_folders_that_cannot_be_locked_are_told(tmp_path):
    with pytest.raises(FailedWrite, match=r"output: '.*none' cannot be written"):
        FolderLock(tmp_path / "none")
