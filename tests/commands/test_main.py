"""``diffclf`` and the words after it."""

import subprocess
import sys

import pytest

from lightning_diffclf import __version__
from lightning_diffclf.commands import COMMANDS, GROUPS, main


def ends(capsys, args, status):
    """What a command prints that ends with a status."""
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    assert exit_info.value.code == status
    return capsys.readouterr()


def test_help_lists_each_command_in_its_group(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    for title, group in GROUPS.items():
        first = lines.index(title) + 1
        assert [line.split()[0] for line in lines[first : first + len(group)]] == list(group)
    assert max(map(len, lines)) <= 100
    assert ends(capsys, [], 2).err == shown


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.module is not None])
def test_every_command_has_a_help_of_its_own(name, capsys):
    shown = ends(capsys, [name, "--help"], 0).out
    assert f"usage: diffclf {name} " in shown
    assert "--config.help" not in shown  # that of a Trainer


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("repor", "error: no command 'repor'; did you mean 'report'?"),
        ("xyzzy", "error: no command 'xyzzy'"),
        ("--nonsense", "error: no command '--nonsense'"),
    ],
)
def test_other_words_are_told_apart(word, told):
    with pytest.raises(SystemExit) as exit_info:
        main([word])
    assert exit_info.value.code == f"{told}\nAll commands: diffclf --help"


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"diffclf {__version__}\n"


def test_whoever_reads_may_leave():
    """As `diffclf configs | head` does."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "lightning_diffclf", "configs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
