"""The commands of ``diffclf`` that need no Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_diffclf.commands.classify import classify_command
from lightning_diffclf.commands.data import encode_command, shards_command
from lightning_diffclf.commands.export import export_command
from lightning_diffclf.commands.fid import fid_command
from lightning_diffclf.commands.results import compare_command, merge_command, replay_command, report_command
from lightning_diffclf.commands.sample import sample_command

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "classify": classify_command,
    "replay": replay_command,
    "merge": merge_command,
    "compare": compare_command,
    "report": report_command,
    "shards": shards_command,
    "encode": encode_command,
    "sample": sample_command,
    "fid": fid_command,
    "export": export_command,
}
