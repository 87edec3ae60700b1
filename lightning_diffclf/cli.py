"""The commands with a Trainer: LightningCLI with named configurations, and evaluation from a checkpoint alone.

``python train.py --config dit_digits.yaml``, ``python evaluate.py --ckpt PATH`` and
``diffclf fit|evaluate|validate|test|predict`` are one parser: one YAML file is one whole experiment, and every value in
it is also a flag. All other commands: :mod:`~lightning_diffclf.commands`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console

from lightning_diffclf.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_diffclf.callbacks.diffusion_classifier import DiffusionClassifierCallback
from lightning_diffclf.callbacks.ema import EMA
from lightning_diffclf.callbacks.loggers import check_packages, run_loggers
from lightning_diffclf.callbacks.network_summary import NetworkSummary
from lightning_diffclf.callbacks.one_training import OneTraining
from lightning_diffclf.callbacks.progress import ClassifierProgressBar
from lightning_diffclf.callbacks.requeue import Requeue
from lightning_diffclf.callbacks.samples import SampleGrid
from lightning_diffclf.callbacks.sharding import parse_part
from lightning_diffclf.callbacks.training_plan import plan_training
from lightning_diffclf.commands import evaluate, main, telling
from lightning_diffclf.commands.configs import EXTENDS, NamedConfig, find, is_file_name, layers
from lightning_diffclf.commands.mistakes import check_variables, of_option
from lightning_diffclf.commands.open_settings import complete
from lightning_diffclf.commands.parser import Plain
from lightning_diffclf.commands.trainer_settings import check_trainer, integers_first, refusals
from lightning_diffclf.errors import UserError, user_error
from lightning_diffclf.hub import local_file
from lightning_diffclf.inert import CLASSES, check_inert, for_evaluation, read_settings
from lightning_diffclf.models.published import is_published, load_published, read_published
from lightning_diffclf.modules.checkpoints import check_checkpoint, check_classes, read_checkpoint
from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT
from lightning_diffclf.modules.published_network import PublishedNetwork
from lightning_diffclf.progress import listening

__all__ = ["CONFIG_KEY", "DiffClfCLI", "evaluate", "evaluation_config", "main", "train"]

CONFIG_KEY = "diffclf_config"  # where a checkpoint keeps the YAML of its run

PROCESSES_KEY = "diffclf_processes"  # and how many processes it was trained on

KEPT_FOR_EVALUATION = (
    "seed_everything",
    "model",
    "data",
    "classifier",
    "ema",
    "checkpoint",
)  # of a checkpoint's configuration


class Parser(Plain, LightningArgumentParser):
    """Of the commands with a Trainer."""


class KeepConfig(SaveConfigCallback):
    """Writes the run's configuration beside its logs, and into its checkpoints."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = self.parser.dump(self.config, skip_none=False)
        checkpoint[PROCESSES_KEY] = trainer.world_size

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        before = checkpoint.get(PROCESSES_KEY, trainer.world_size)
        if trainer.state.fn == "fit" and before != trainer.world_size:
            rank_zero_info(f"resuming with {trainer.world_size} processes in place of {before}")


class DiffClfCLI(LightningCLI):
    """LightningCLI for this package; see the module's first lines."""

    def __init__(self, args: Sequence[str], default_subcommand: str | None = None) -> None:
        named = args[0] if args and args[0] in LightningCLI.subcommands() else default_subcommand
        self._only = [named] if named else list(LightningCLI.subcommands())
        for path in sorted(set().union(*CLASSES.values())):
            import_module(path.rpartition(".")[0])  # classes that are imported are known by their names alone
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=KeepConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=Parser,
            args=list(args),
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there
        """The one that is asked for: to collect the options of each takes a tenth of a second or two."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in self._only}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(prog="diffclf", **kwargs)
        parser.add_argument(
            "-c", "--config", action=NamedConfig, help="YAML file, or the name of one in configs/; may be repeated"
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        integers_first(parser)
        parser.add_argument(
            f"--{EXTENDS}",
            type=str | list[str] | None,
            default=None,
            help="In a file: the file, or list of files, whose values it changes",
        )
        parser.add_argument(
            "--run_dir", type=str, default="runs/default", help="Folder for checkpoints, logs and results of this run"
        )
        parser.add_argument(
            "--warm_start",
            type=str | None,
            default=None,
            help="Weights that fit begins with where run_dir has no checkpoint yet: a checkpoint, or published ones",
        )
        parser.add_argument(
            "--plan",
            action="store_true",
            help="Measure what training or evaluation would cost, print that, and write nothing",
        )
        parser.add_argument(
            "--untrained",
            action="store_true",
            help="Evaluate trainable weights without a checkpoint, as they were made",
        )
        parser.add_lightning_class_args(DiffusionClassifierCallback, "classifier")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(SampleGrid, "samples")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Requeue, "requeue")
        parser.set_defaults(
            {"samples.columns": 0, "checkpoint.save_last": True, "checkpoint.enable_version_counter": False}
        )
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments(
            "run_dir", "checkpoint.dirpath", compute_fn=lambda folder: str(Path(folder) / "checkpoints")
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        check_variables(os.environ)
        # A new list: sys.argv must not change, Lightning's DDP launcher runs it again for the other ranks.
        if len(self._only) == 1 and args[:1] != self._only:
            args = [*self._only, *args]
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        if self._get(self.config, EXTENDS) is not None:
            raise UserError(f"{EXTENDS}: only files say what they extend; expected --config, which may be repeated")
        check_packages(self._get(self.config, "trainer.logger"))
        check_trainer(self._get(self.config, "trainer"))
        config = self.config[self.subcommand] if self.subcommand else self.config
        complete(config)
        if config["plan"] and not self._fits:
            config["classifier.plan"] = True

    def _parse_ckpt_path(self) -> None:
        """Nothing: the base class would let a checkpoint's hyperparameters override flags and YAML in silence."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            told = user_error(error)
            if told is None:
                raise
            config = self.config[self.subcommand] if self.subcommand else self.config
            raise type(told)(of_option(str(told), vars(config.as_flat()))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        callbacks = list(config.get("callbacks") or [])
        if config.get("enable_progress_bar") is not False:
            callbacks.append(ClassifierProgressBar())
        if config.get("enable_model_summary") is not False:
            callbacks.append(NetworkSummary())
        if self._fits:
            callbacks.append(OneTraining())
        if config.get("logger") in (None, True):
            kwargs["logger"] = False
            if self._fits:
                path = self._ckpt_path()
                resumes = path is not None and not is_published(path)
                kwargs["logger"] = run_loggers(self._get(self.config, "run_dir"), resumes)
        kwargs["plugins"] = [*(config.get("plugins") or []), AtomicCheckpointIO()]
        with refusals():
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    @property
    def _fits(self) -> bool:
        return self.subcommand == "fit"

    def _ckpt_path(self) -> str | None:
        """The checkpoint to go on from: of ``last``, the run's own file if there is one."""
        path = self._get(self.config, "ckpt_path")
        if path != "last":
            return path
        last = Path(self._get(self.config, "run_dir")) / "checkpoints" / "last.ckpt"
        return str(last) if last.is_file() else None

    def _run_subcommand(self, subcommand: str) -> None:
        if self._fits and self._get(self.config, "plan"):
            if self.trainer.is_global_zero:
                Console().print(plan_training(self.trainer, self.model, self.datamodule).to_table())
            return
        path = self._ckpt_path()
        if self.config[subcommand].get("ckpt_path") == "last":
            if path is None:
                self.config_init[subcommand]["ckpt_path"] = None
            else:
                print(f"{'resuming from' if self._fits else 'weights of'} {path}")
        if path in ("best", "hpc", "registry"):
            pass  # Lightning's
        elif path is not None:
            if is_published(path):
                self._load_weights(path)
                self.config_init[subcommand]["ckpt_path"] = None
            else:
                checkpoint = read_checkpoint(path)
                check_classes(self.model, checkpoint, path)
                check_checkpoint(self.model, checkpoint, path)
        elif self._fits and (start := self._get(self.config, "warm_start")) is not None:
            self._load_weights(start)
        elif not self._fits:
            self._check_trained()
        bar = self.trainer.progress_bar_callback
        with listening(bar.tell) if isinstance(bar, ClassifierProgressBar) else nullcontext():
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """Say where everything is."""
        run_dir = Path(self._get(self.config, "run_dir"))
        if self.trainer.is_global_zero and (left := self._left_in(run_dir)):
            print("\n".join([f"trained {self.trainer.global_step:,} steps; in {run_dir}:", *left]))

    def _left_in(self, run_dir: Path) -> list[str]:
        """What a training leaves in its folder, a line each."""
        sampled = ", diffclf sample --ckpt" if isinstance(self.model, ClassConditionalDiT) else ""
        what = {
            "checkpoints/last.ckpt": f"weights and settings: diffclf evaluate --ckpt{sampled}",
            "samples.png": "generated images",
            "validation": "confusion matrix, accuracy of each timestep",
            "logs": "numbers as CSV, and the configuration",
            "tensorboard": f"curves and pictures: tensorboard --logdir {shlex.quote(str(run_dir))}",
        }
        width = max(map(len, what))
        return [f"  {name:{width}}  {about}" for name, about in what.items() if (run_dir / name).exists()]

    def _check_trained(self) -> None:
        """Raise where an evaluation would be of a network that nobody trained; its cost may be measured."""
        trainable = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        meant = self._get(self.config, "untrained") or self._get(self.config, "classifier.plan")
        if trainable and not meant:
            raise UserError(
                f"checkpoint: none given, and the {trainable:,} weights of {type(self.model).__name__} are random; "
                "expected --ckpt PATH (of diffclf: --ckpt_path), or --untrained to evaluate them nevertheless"
            )

    def _load_weights(self, path: str) -> None:
        """Put published weights, or the averaged ones of a checkpoint, into the module."""
        if isinstance(self.model, PublishedNetwork):
            self.model.load(path)
            return
        if not isinstance(self.model, ClassConditionalDiT):
            raise UserError(
                f"checkpoint: {path!r} has weights for a ClassConditionalDiT, not {type(self.model).__name__}"
            )
        if is_published(path):
            load_published(self.model.net, self.model.schedule, path)
        else:
            checkpoint = read_checkpoint(path)
            check_checkpoint(self.model, checkpoint, path)
            self.model.load_state_dict(checkpoint["state_dict"])
        print(f"weights of {path}")


def evaluation_config(path: str | Path, trusted: bool = False) -> str:
    """YAML with model, data and classifier of the run that wrote a checkpoint.

    Args:
        path: The checkpoint.
        trusted: Whether it may name any class and any address; otherwise see :mod:`~lightning_diffclf.inert`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, was not written by this package's command line, or says what it may not.
    """
    return settings_of(read_published(path) if is_published(path) else read_checkpoint(path), path, trusted)


def settings_of(checkpoint: Mapping[str, Any], path: str | Path, trusted: bool = False) -> str:
    """As :func:`evaluation_config`, of a checkpoint that was read from ``path``."""
    if CONFIG_KEY not in checkpoint:
        raise UserError(
            f"checkpoint: {str(path)!r} does not say how it was made (no {CONFIG_KEY!r}, which `diffclf fit` writes); "
            "give --config as well, such as dit_256_imagenet.yaml for published weights"
        )
    where = f"checkpoint: {str(path)!r}"
    kept = for_evaluation(read_settings(checkpoint[CONFIG_KEY], where), KEPT_FOR_EVALUATION)
    if not trusted:
        check_inert(kept, where)
    return yaml.safe_dump(kept, sort_keys=False)


def train(args: Sequence[str] | None = None) -> None:
    """``train.py``: the command line with ``fit`` implied; ``args`` are those of the process if omitted."""
    given = sys.argv[1:] if args is None else args
    telling(lambda: DiffClfCLI(given, default_subcommand="fit"), program=args is None)


def test_arguments(given: Namespace, folder: str, own: Sequence[str]) -> list[str]:
    """Arguments of ``test`` that evaluate what commands with ``--ckpt`` and ``--config`` are given.

    Args:
        given: Their common arguments.
        folder: Where results go in the folder of the run, or the next free one, where no ``--out`` is given.
        own: Further arguments, which the user's flags may override.
    """
    ckpt = None if given.ckpt is None else str(local_file(given.ckpt))
    configs = given.config or [evaluation_config(str(ckpt), given.trust_checkpoint)]  # --config or --ckpt is there
    run_dir = Path(given.run_dir) if given.run_dir else default_run_dir(ckpt, configs)
    part = "-{}of{}".format(*parse_part(given.part)) if given.part else ""
    out = given.out or f"{run_dir / (folder + part)}"
    return [
        "test",
        *[f"--config={config}" for config in configs],
        f"--classifier.output_dir={out}",
        *([] if given.out else ["--classifier.next_free=true"]),
        "--verbose=false",
        f"--run_dir={given.run_dir or Path(out).parent}",
        *([f"--classifier.part={given.part}"] if given.part else []),
        *own,
        *(["--untrained"] if given.untrained else []),
        *([f"--ckpt_path={ckpt}"] if ckpt else []),
        *given.flags,
    ]


def default_run_dir(ckpt: str | None, configs: Sequence[str] = ()) -> Path:
    """Folder of a run: that of ``checkpoints/`` with its checkpoint, else the last ``run_dir`` of the files."""
    if ckpt is None or is_published(ckpt):
        run_dir = Path()
        for config in configs:  # names of files, or YAML itself
            for layer in layers(find(config)) if is_file_name(config) else []:
                found = (yaml.safe_load(layer.read_text(encoding="utf-8")) or {}).get("run_dir", run_dir)
                run_dir = Path(found) if isinstance(found, (str, Path)) else run_dir  # else the parser will complain
        return run_dir
    folder = Path(ckpt).parent
    return folder.parent if folder.name == "checkpoints" else folder
