"""What was probably meant: plain words for what the command line cannot understand."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from textwrap import dedent
from typing import Any

from lightning_diffclf.errors import UserError
from lightning_diffclf.inert import CLASSES

PACKAGES = {
    "trainer.logger": "lightning.pytorch.loggers",
    "trainer.callbacks": "lightning.pytorch.callbacks",
    "trainer.profiler": "lightning.pytorch.profilers",
    "trainer.strategy": "lightning.pytorch.strategies",
}  # where Lightning has the classes of an option

NO_OPTION = re.compile(
    r"(?:(?:Subcommand '.+'|Group '(.+)') does not accept option|Option) '(.+?)'(?: is not accepted)?"
)

OF_CLASS = re.compile(
    r"^( *)(?:- )?Problem with given class_path '(.+?)':\n((?:\1 +\S.*(?:\n|$))+)", re.MULTILINE
)  # a class with arguments of its own; what is said about these is indented

VARIABLES = re.compile(r"PL_(?:FIT|VALIDATE|TEST|PREDICT)__(.+)")


def similar(given: str, known: Iterable[str]) -> list[str]:
    """The known name that is most like the one given, at most one; its beginning or, if dotted, its last part will do.

    Example:
        >>> similar("--trainer.max_step", ["--trainer.max_steps", "--trainer.max_time"])
        ['--trainer.max_steps']
        >>> similar("--reuse", ["--requeue", "--classifier.reuse"])
        ['--classifier.reuse']
        >>> similar("--ckpt", ["--ckpt_path", "--config"])
        ['--ckpt_path']
        >>> similar("classif", ["classify", "compare"]), similar("--help-me", ["--trainer.devices"])
        (['classify'], [])
    """
    known = list(dict.fromkeys(known))
    by_case = {name.lower(): name for name in known}
    by_tail = {name.rpartition(".")[2].lower(): name for name in reversed(known)}
    last = given.rpartition(".")[2].strip("-").lower()
    exact = [by_tail[last]] if last in by_tail else []
    whole = difflib.get_close_matches(given.lower(), by_case, 1, 0.75)
    tail = difflib.get_close_matches(last, by_tail, 1, 0.75)
    begun = [name for name in known if len(given.strip("-")) > 1 and name.startswith(given)]
    return [*exact, *(by_case[name] for name in whole), *(by_tail[name] for name in tail), *begun][:1]


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """That there is no such thing, and what may have been meant.

    Example:
        >>> unknown("command", "classif", ["classify", "compare"])
        "no command 'classif'; did you mean 'classify'?"
    """
    found = similar(given, known)
    return f"no {what} {given!r}" + (f"; did you mean {found[0]!r}?" if found else "")


def explained(message: str, options: Iterable[str], prefix: str = "") -> str:
    """A message of the parser in plain words, with whole names of options; as it is where it says something else.

    Args:
        message: What the parser says.
        options: Flags that it knows.
        prefix: What comes before the names of options in the message, such as ``model.``.
    """
    options = list(options)
    if found := re.match(r"unrecognized arguments: (?:\S+ )*?(--?[^\s=]+)", message):
        return unknown("option", found[1], options)
    if found := re.match(r"argument subcommand: invalid choice: '(.*?)' \(choose from (.*)\)", message):
        return unknown("command", found[1], re.findall(r"[\w-]+", found[2]))
    if found := NO_OPTION.fullmatch(message):
        name = f"{found[1]}.{found[2]}" if found[1] else found[2]
        names = [option.removeprefix("--") for option in options]
        return unknown("option", prefix + name, [prefix + known for known in names])
    if found := re.fullmatch(r"the following arguments are required: (.*)", message):
        parts = " and ".join(sorted(name.rpartition(".")[2] for name in found[1].split(", ")))
        return f"{parts}: none given; expected --config FILE (`diffclf configs` lists those that come along)"
    if found := re.fullmatch(r'Parser key "(.+?)":\s*(.*)', message, re.DOTALL):
        return _of_option(prefix + found[1], dedent(found[2]).strip())
    return prefix.removesuffix(".") + (": " if prefix else "") + message


def _of_option(name: str, message: str) -> str:
    """What is wrong with the value of one option."""
    if found := re.fullmatch(r"Expected a <class '(\w+)'>\. Got value: (.*)", message, re.DOTALL):
        return f"{name}: {found[2]!r}, expected {found[1]}"
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        plain = re.findall(r"Expected a <class '(int|float|bool)'>", message)  # it takes these as well
        what = f"{found[1]!r}, expected {' or '.join(plain)}" if plain else unknown("class", found[1], _classes(name))
        return f"{name}: {what}"
    if found := OF_CLASS.search(message):
        class_path, inner = found[2], dedent(found[3]).strip()
        if class_path in {"lightning.LightningModule", "lightning.LightningDataModule"}:
            return (
                f"{name}: options before a class is named; expected --{name} CLASS, or the file that names one first, "
                "and what changes it later (--config sd_pets.yaml --config clip.yaml)"
            )
        if re.search("has no attribute|No module named", inner):
            short = class_path.rpartition(".")[2]
            return f"{name}: {unknown('class', short, _classes(name))} ({inner})"
        return explained(inner, _parameters(class_path), f"{name}.")
    if found := re.search(r"^ *Given value: (.*)", message, re.MULTILINE):
        return _none_of_types(name, found[1], message)
    return f"{name}: {message}"


def _none_of_types(name: str, given: str, message: str) -> str:
    """That a value is none of several types, of which some are lists of words.

    Example:
        >>> _none_of_types("trainer.precision", "bf61", "Expected a typing.Literal['32', 'bf16', 'bf16-mixed']")
        "trainer.precision: 'bf61', expected one of '32', 'bf16', 'bf16-mixed'; did you mean 'bf16'?"
        >>> _none_of_types("trainer.max_epochs", "x", "Expected a <class 'int'>, Expected a <class 'NoneType'>")
        "trainer.max_epochs: 'x', expected int"
        >>> _none_of_types("model", "3", "Not a valid subclass of LightningModule, Expected a <class 'NoneType'>")
        "model: '3', expected a class, as class_path and init_args"
    """
    lists = ", ".join(re.findall(r"typing\.Literal\[(.*?)\]", message))
    words = list(dict.fromkeys(re.findall(r"'([^']*)'", lists)))
    types = [kind for kind in re.findall(r"Expected a <class '(\w+)'>", message) if kind != "NoneType"]
    expected = " or ".join([*types, *(["one of " + ", ".join(map(repr, words))] if words else [])])
    expected = expected or "a class, as class_path and init_args"
    meant = similar(given, words)
    return f"{name}: {given!r}, expected {expected}" + (f"; did you mean {meant[0]!r}?" if meant else "")


def _classes(option: str) -> list[str]:
    """Short names of the classes that an option may name."""
    known = {path.rpartition(".")[2] for path in CLASSES.get(option, ())}
    if option in PACKAGES:
        known.update(import_module(PACKAGES[option]).__all__)
    return sorted(known)


def _parameters(class_path: str) -> list[str]:
    """Names of the arguments of a class that the parser has imported."""
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def of_option(message: str, values: Mapping[str, Any]) -> str:
    """What a class says about an argument, with the whole name of the option that gave it, where that is certain.

    Args:
        message: Begins with the name of the argument, and what was found.
        values: By whole name, such as ``model.init_args.depth``.

    Example:
        >>> of_option("depth: 0, expected at least 1", {"model.init_args.depth": 0, "data.init_args.batch_size": 8})
        'model.depth: 0, expected at least 1'
        >>> of_option("size: 0, expected at least 1", {"model.init_args.size": 4, "data.init_args.size": 0})
        'data.size: 0, expected at least 1'
        >>> of_option("checkpoint: none given", {"model.init_args.depth": 0})
        'checkpoint: none given'
    """
    name, _, rest = message.partition(": ")
    of_name = [key for key in values if key.rpartition(".")[2] == name and "." in key]
    as_told = [key for key in of_name if re.match(rf"{re.escape(repr(values[key]))}(?!\w)", rest)]
    found = of_name if len(of_name) == 1 else as_told
    return f"{found[0].replace('init_args.', '')}: {rest}" if len(found) == 1 else message


def check_variables(environment: Mapping[str, str]) -> None:
    """Raise if there are variables by which Lightning's command lines may be told options: this one takes flags only.

    Raises:
        ValueError: names the flag in place of the variable.
    """
    for variable in sorted(environment):
        if found := VARIABLES.fullmatch(variable):
            flag = found[1].lower().replace("__", ".")
            raise UserError(f"environment: {variable} is not read; expected --{flag} {environment[variable]}, or unset")
