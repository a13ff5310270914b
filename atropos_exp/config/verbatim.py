"""Text stays text: `name=2024_11` and `model.revision=12e4567` are numbers to Hydra, but not to their keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

from atropos_exp.config.build import find_class
from atropos_exp.config.root import GROUPS, RunConfig
from atropos_exp.config.settings import Settings
from atropos_exp.config.typed import strip_optional
from atropos_exp.errors import UserError

# A path in someone's home, for which Hydra's grammar has no sign.
_HOME = re.compile(r"(?<=[=,\[(])(~[^\s,'\"\[\](){}]*)")
_LOSSY = (OverrideParser.INT, OverrideParser.FLOAT, OverrideParser.BOOL)


def verbatim(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The same overrides, with a value in quotes where its key takes text and Hydra would read a number or a truth
    value, and around a `~` for someone's home. `folders` hold the options of groups. What cannot be parsed, or names no
    key of ours, stays as it is.

        verbatim(["name=2024_11", "seed=2024_11"], [CONF_DIR])  # ["name='2024_11'", "seed=2024_11"]
    """
    return [_quoted(_HOME.sub(r"'\1'", text), folders) for text in overrides]


def _quoted(text: str, folders: Sequence[Path]) -> str:
    key = text.split("=", 1)[0].lstrip("+")
    spans = list(_read_otherwise(text))
    if not spans or not _takes_text(key.split("."), folders):
        return text
    for start, end in reversed(spans):
        text = f"{text[:start]}'{text[start:end]}'{text[end:]}"
    return text


def _read_otherwise(text: str) -> Iterator[tuple[int, int]]:
    """Where in an override numbers and truth values stand by themselves: not in quotes, nor as arguments of `range`."""
    listener = HydraErrorListener()
    lexer = OverrideLexer(InputStream(text))
    parser = OverrideParser(CommonTokenStream(lexer))
    for one in (lexer, parser):
        one.removeErrorListeners()
        one.addErrorListener(listener)
    try:
        tree: Any = parser.override()  # type: ignore[no-untyped-call]
    except HydraException:
        return  # Hydra says what is wrong with it
    yield from _spans(tree)


def _spans(node: Any) -> Iterator[tuple[int, int]]:
    if isinstance(node, OverrideParser.PrimitiveContext):
        if node.getChildCount() == 1 and node.start.type in _LOSSY:
            yield node.start.start, node.stop.stop + 1
        return
    if isinstance(node, OverrideParser.FunctionContext) and node.start.text not in ("choice", "shuffle"):
        return
    for child in getattr(node, "children", None) or ():
        yield from _spans(child)


def _takes_text(names: Sequence[str], folders: Sequence[Path]) -> bool:
    """Whether a dotted key takes text, or a list of it, in any option of its group."""
    if names[0] not in (*GROUPS, "sweep"):
        return _is_text(RunConfig, names)
    return any(_is_text(cls, names[1:]) for cls in _classes(names[0], folders))


def _is_text(cls: type[Settings], names: Sequence[str]) -> bool:
    if not names or names[0] not in cls.model_fields:
        return False
    _, kind = strip_optional(cls.model_fields[names[0]].annotation)
    if isinstance(kind, type) and issubclass(kind, Settings):
        return _is_text(kind, names[1:])
    if get_origin(kind) in (list, tuple):
        return strip_optional(get_args(kind)[0])[1] is str
    return kind is str and len(names) == 1


def _classes(group: str, folders: Sequence[Path]) -> Iterator[type[Settings]]:
    """Of the options of a group. A file that names none is left to the check, which says so."""
    targets = set()
    for file in [file for folder in folders for file in sorted((folder / group).glob("*.yaml"))]:
        try:
            targets.add(yaml.safe_load(file.read_text(encoding="utf-8"))["_target_"])
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            continue
    for target in sorted(map(str, targets)):
        try:
            yield find_class(target, group)
        except UserError:
            continue
