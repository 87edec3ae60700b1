"""What a file of others may say: values, and classes of this package by name; nothing that opens or runs anything.

A checkpoint carries the settings of its run, and evaluation takes them from there. The command line turns settings into
objects: it imports whatever a ``class_path`` names and hands it whatever stands beside it. So the settings are checked
while they are still text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lightning_diffclf.errors import UserError

CLASSES: Mapping[str, frozenset[str]] = {
    "model": frozenset(
        {
            "lightning_diffclf.ClassConditionalDiT",
            "lightning_diffclf.PublishedNetwork",
            "lightning_diffclf.LoraStableDiffusion",
            "lightning_diffclf.SoftPrompts",
            "lightning_diffclf.ZeroShotStableDiffusion",
            "lightning_diffclf.baselines.clip.ZeroShotCLIP",
            "lightning_diffclf.baselines.sd_features.DenoiserFeatures",
            "lightning_diffclf.baselines.timm_classifier.TimmClassifier",
            "lightning_diffclf.baselines.timm_classifier.TimmFromScratch",
            "lightning_diffclf.modules.adapters.LoraStableDiffusion",
            "lightning_diffclf.modules.adapters.SoftPrompts",
            "lightning_diffclf.modules.class_conditional_dit.ClassConditionalDiT",
            "lightning_diffclf.modules.published_network.PublishedNetwork",
            "lightning_diffclf.modules.zero_shot_sd.ZeroShotStableDiffusion",
        }
    ),
    "data": frozenset(
        {
            "lightning_diffclf.data.caption_pairs.CaptionPairsDataModule",
            "lightning_diffclf.data.clip_benchmark.ClipBenchmarkDataModule",
            "lightning_diffclf.data.digit_scenes.DigitScenesDataModule",
            "lightning_diffclf.data.digits.DigitPairsDataModule",
            "lightning_diffclf.data.digits.DigitTriplesDataModule",
            "lightning_diffclf.data.digits.DigitsDataModule",
            "lightning_diffclf.data.image_folder.ImageFolderDataModule",
            "lightning_diffclf.data.imagenet.ImageNetDataModule",
            "lightning_diffclf.data.medmnist.MedMNISTDataModule",
            "lightning_diffclf.data.parquet.ParquetDataModule",
            "lightning_diffclf.data.winoground.WinogroundDataModule",
            "lightning_diffclf.data.zero_shot.ZeroShotDataModule",
        }
    ),
    "classifier.elimination": frozenset(
        f"lightning_diffclf.{folder}{name}"
        for file, names in (
            ("elimination", ("Exhaustive", "Stages")),
            ("sequential", ("PairedTest", "LikelihoodRatio")),
        )
        for name in names
        for folder in ("", "classifier.", f"classifier.{file}.")
    ),
    "classifier.proposal": frozenset(
        f"lightning_diffclf.{folder}{name}"
        for file, name in (
            ("search", "GradientSearch"),
            ("linear_probe", "LinearProbe"),
            ("covariance_search", "CovarianceSearch"),
        )
        for folder in ("", "classifier.", f"classifier.{file}.")
    ),
}  # that settings of others may name, and where

TAKEN: Mapping[str, frozenset[str]] = {
    "classifier": frozenset(
        {
            *("draws", "seed", "loss", "elimination", "weights", "budget", "abstain", "ensemble", "candidates"),
            *("proposal", "reduction", "temperature", "coverage", "coverage_by_class", "microbatch", "compile", "name"),
            *("grid", "antithetic"),
        }
    ),
    "ema": frozenset({"decay"}),
    # by which Lightning knows that it is the same callback:
    "checkpoint": frozenset({"monitor", "mode", "every_n_train_steps", "every_n_epochs", "train_time_interval"}),
    "trainer": frozenset({"precision"}),
}  # of these sections, evaluation takes only this: where to write is said by who evaluates

MAX_CHARACTERS = 4_000_000
MAX_VALUES = 200_000  # aliases make a few hundred characters of YAML into more than any memory holds
MAX_DEPTH = 20

OPENS = re.compile(r"\bpipe:|://|::|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", re.IGNORECASE)
ASK = "give settings of your own with --config, or, if you trust who made it, --trust-checkpoint"

BRACES = re.compile(r"\{[^{}]*(?:,|\.\.)[^{}]*\}|\$\{")  # of which webdataset makes other strings


def read_settings(text: Any, where: str) -> dict[str, Any]:
    """Settings as a mapping of plain values.

    Args:
        text: YAML.
        where: What it belongs to, for messages.

    Raises:
        ValueError: if it is no YAML of plain values, or is too large.
    """
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        found = f"{len(text):,} characters" if isinstance(text, str) else f"a {type(text).__name__}"
        raise UserError(f"{where}: settings are {found}, expected YAML of at most {MAX_CHARACTERS:,}; {ASK}")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, for one
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where}: settings cannot be read, expected YAML of plain values ({reason[:200]}); {ASK}"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: settings are a {type(found).__name__}, expected sections by name; {ASK}")
    return found


def check_inert(settings: Mapping[str, Any], where: str) -> None:
    """Raise unless settings name classes of this package only, and nothing that opens a process or an address.

    Args:
        settings: What :func:`read_settings` returns, reduced to what will be used.
        where: What it belongs to, for messages.

    Raises:
        ValueError: naming the entry, what was found, and what is expected.
    """
    count = 0
    left: list[tuple[str, int, Any]] = [("", 0, dict(settings))]
    while left:
        name, depth, value = left.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            size = f"more than {MAX_VALUES:,} values, or nested deeper than {MAX_DEPTH}"
            raise UserError(f"{where}: settings of {size}, expected fewer; {ASK}")
        if isinstance(value, Mapping):
            _check_mapping(name, value, where)
            left += [(f"{name}.{key}" if name else str(key), depth + 1, one) for key, one in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [(f"{name}[{i}]", depth + 1, one) for i, one in enumerate(value)]
        elif isinstance(value, str):
            _check_text(name, value, where)
        elif value is not None and not isinstance(value, (bool, int, float)):
            raise _refused(where, name, value, "text, a number, true, false or null")


def _check_mapping(name: str, value: Mapping[Any, Any], where: str) -> None:
    """A mapping is a section, or a class with its arguments where one is expected."""
    strange = [key for key in value if not isinstance(key, str) or not key.isidentifier()]  # a.b would be nested
    if strange:
        raise _refused(where, name or "settings", strange[0], "names as keys")
    if not name:
        for section in value:
            expects_mapping = section in CLASSES or section in TAKEN
            if expects_mapping and not isinstance(value[section], Mapping):
                raise _refused(where, section, value[section], "entries by name")
        return
    if name in CLASSES:
        found = value.get("class_path")
        if not isinstance(found, str) or found not in CLASSES[name]:
            known = sorted({one.rpartition(".")[2] for one in CLASSES[name]})
            raise _refused(where, f"{name}.class_path", found, f"a class of this package: {', '.join(known)}")
        others = sorted(value.keys() - {"class_path", "init_args"})
        if others or not isinstance(value.get("init_args", {}), Mapping):
            raise _refused(where, name, others or value["init_args"], "class_path and init_args")
    elif "class_path" in value:
        raise _refused(where, f"{name}.class_path", value["class_path"], "no class here")
    if name == "classifier":
        for key in ("elimination", "proposal"):  # as text, the name of a class or a function, which would be imported
            one = value.get(key)
            if one is not None and not isinstance(one, Mapping):
                raise _refused(where, f"{name}.{key}", one, "null, or a class")


def _check_text(name: str, value: str, where: str) -> None:
    if OPENS.search(value) or (":" in value and BRACES.search(value)):
        raise _refused(where, name, value, "no pipe, no address and no control characters")


def _refused(where: str, name: str, value: Any, expected: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return UserError(
        f"{where} has settings that it may not have, {name}: {shown}, expected {expected}. Nothing was run; {ASK}"
    )


def for_evaluation(settings: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """Of a run's settings, what its evaluation needs: not where results and checkpoints went, and no download."""
    found: dict[str, Any] = {}
    for section in (*sections, "trainer"):
        value = settings.get(section)
        if value is None:
            continue
        if section in TAKEN and isinstance(value, Mapping):
            value = {key: one for key, one in value.items() if key in TAKEN[section]}
        if section == "data" and isinstance(value, Mapping) and isinstance(value.get("init_args"), Mapping):
            arguments = {key: one for key, one in value["init_args"].items() if key != "download"}
            value = {**value, "init_args": arguments}
        found[section] = value
    return found
