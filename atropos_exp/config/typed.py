"""What is wrong with a settings object: pydantic finds the mistakes, this module puts them into words."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from atropos_exp.errors import UserError

_UNKNOWN = "unknown key."
_HINT = " Did you mean '"
_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "any value"}
# What other programs call a key -> the last name of ours.
_SYNONYMS = {
    **dict.fromkeys(("lr", "learningrate"), "learning_rate"),
    **dict.fromkeys(("steps", "num_steps", "total_steps", "epochs", "num_train_epochs"), "max_steps"),
    **dict.fromkeys(("bs", "train_batch_size", "per_device_train_batch_size"), "batch_size"),
    **dict.fromkeys(("num_generations", "num_rollouts", "n"), "group_size"),
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_completion_length"), "max_response_length"),
    **dict.fromkeys(("beta", "kl_beta"), "kl_coef"),
    **dict.fromkeys(("warmup", "num_warmup_steps"), "warmup_steps"),
    "wd": "weight_decay",
    **dict.fromkeys(("num_gpus", "nproc_per_node"), "num_processes"),
}
_FAR = 1000  # an upper end from here on only catches slips: it is named to who went beyond it
_LIMITS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """One thing wrong in a configuration. `path` is the dotted key, "" for none in particular."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message

    def below(self, path: str) -> Mistake:
        """The same mistake where `path` holds the object that it was found in."""
        message = self.message
        if path and message.startswith(_UNKNOWN):
            message = message.replace(_HINT, f"{_HINT}{path}.", 1)
        return Mistake(path=join(path, self.path), message=message)


class SettingsError(UserError):
    """A settings object that cannot be made, with every mistake in it. Their paths start at that object."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__(mistakes)
        self.mistakes = mistakes

    def __str__(self) -> str:
        return "\n".join(map(str, self.mistakes))


def construct(cls: type[BaseModel], values: Mapping[str, Any], path: str, mistakes: list[Mistake]) -> Any:
    """`cls(**values)` for a class of `Settings`, or None after appending to `mistakes`."""
    try:
        return cls(**{str(key): value for key, value in values.items()})
    except SettingsError as error:
        mistakes.extend(mistake.below(path) for mistake in error.mistakes)
        return None


def translated(error: ValidationError, cls: type[BaseModel], values: Mapping[str, Any]) -> list[Mistake]:
    """What pydantic found wrong with `values` for a `cls`, unknown keys first."""
    found = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    return list(dict.fromkeys(mistake for one in found for mistake in _translated(one, cls, values)))


def _translated(one: ErrorDetails, cls: type[BaseModel], values: Mapping[str, Any]) -> Iterable[Mistake]:
    path = ".".join(map(str, one["loc"]))
    cause = one.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):  # of settings inside these
        return [mistake.below(path) for mistake in cause.mistakes]
    if isinstance(cause, Exception):  # of a validator of the class
        return [Mistake(path=path, message=str(cause))] if path else located(str(cause), cls, "")
    if one["type"] == "extra_forbidden":
        return [unknown_key(path, cls.model_fields)]
    if one["type"] == "missing":
        return [Mistake(path=path, message="missing: it needs a value")]
    name = str(one["loc"][0])
    field = cls.model_fields[name]
    about_type = len(one["loc"]) > 1 or one["type"].endswith(("_type", "_error", "enum")) or values[name] is None
    wanted = type_name(field.annotation) if about_type else _accepted(field, one["type"])
    if one["type"] == "string_type" and isinstance(values[name], int | float):
        wanted += ", so put it in quotes"
    if len(one["loc"]) > 1 and field.description:
        wanted += f" ({field.description})"
    return [Mistake(path=name, message=f"got {_shown(values[name])}, expected {wanted}")]


def unknown_key(path: str, known: Iterable[str]) -> Mistake:
    hint = "" if path.rsplit(".", 1)[-1].startswith("_") else did_you_mean(path, known)
    return Mistake(path=path, message=_UNKNOWN + hint)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?", preferring a near spelling, then the same last name elsewhere; "" if nothing is near."""
    options = list(known)
    synonym = _SYNONYMS.get(word.rsplit(".", 1)[-1])
    near = [option for option in options if option.rsplit(".", 1)[-1] == synonym][:1]
    near = near or difflib.get_close_matches(word, options, n=1, cutoff=0.75)
    if not near:
        last = {option: option.rsplit(".", 1)[-1] for option in options}
        names = difflib.get_close_matches(word.rsplit(".", 1)[-1], set(last.values()), n=1, cutoff=0.75)
        near = [option for option in options if names and last[option] == names[0]][:1]
    return f"{_HINT}{near[0]}'?" if near else ""


def join(path: str, key: object) -> str:
    return f"{path}.{key}".strip(".")


def located(text: str, cls: type[BaseModel], path: str) -> Iterator[Mistake]:
    """One mistake per line of a part's `text`. A line that starts with one of the part's keys belongs to that key."""
    for line in text.removeprefix(f"{path}: ").splitlines():
        word = line.split(maxsplit=1)[0].rstrip(":,") if line.strip() else ""
        key = word.removeprefix(path + ".") if path else word
        if key.split(".")[0] in cls.model_fields:
            rest = line.strip()[len(word) :].lstrip(":, ")
            rest = f"got {rest.removeprefix('is ')}" if rest.startswith("is ") else rest
            yield Mistake(path=join(path, key), message=rest or line.strip())
        elif line.strip():
            yield Mistake(path=path, message=line.strip())


def strip_optional(annotation: Any) -> tuple[bool, Any]:
    """Whether null is accepted, and the type of everything else."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation):
        (inner,) = (argument for argument in get_args(annotation) if argument is not type(None))
        return True, strip_optional(inner)[1]
    return annotation is Any, annotation


def type_name(annotation: Any) -> str:
    """For people: "a whole number", "a list (each item a number), or null", "one of auto, cpu, cuda"."""
    optional, inner = strip_optional(annotation)
    if get_origin(inner) is Literal:
        name = "one of " + ", ".join(map(str, get_args(inner)))
    elif get_origin(inner) is list:
        name = f"a list (each item {_item(get_args(inner)[0])})"
    elif get_origin(inner) is dict:
        name = f"a mapping (each value {_item(get_args(inner)[1])})"
    elif isinstance(inner, type) and issubclass(inner, Enum):
        name = "one of " + ", ".join(member.name for member in inner)
    elif isinstance(inner, type) and issubclass(inner, BaseModel):
        name = "a mapping with its own keys"
    else:
        name = _TYPES.get(inner, getattr(inner, "__name__", str(inner)))
    return f"{name}, or null" if optional and inner is not Any else name


def _item(annotation: Any) -> str:
    limits = _limits(get_args(annotation)[1:]) if get_origin(annotation) is Annotated else ""
    return f"{type_name(annotation)}, {limits}" if limits else type_name(annotation)


def _accepted(field: FieldInfo, problem: str) -> str:
    """The range of a field, and what its description says of it. `problem`: pydantic's name of what was wrong."""
    annotated = [item for item in (field.annotation, *get_args(field.annotation)) if get_origin(item) is Annotated]
    metadata = [*field.metadata, *(extra for item in annotated for extra in get_args(item)[1:])]
    described = [one.description for one in (field, *metadata) if isinstance(one, FieldInfo) and one.description]
    words = _limits(metadata, beyond=problem.startswith("less_than"))
    if problem == "finite_number":
        words = f"a finite number, {words}" if words else "a finite number"
    words = f"{words} ({described[0]})" if words and described else words or "".join(described[:1])
    optional, _ = strip_optional(field.annotation)
    return f"{words or type_name(field.annotation)}{', or null' if optional and 'null' not in words else ''}"


def _limits(metadata: Iterable[Any], *, beyond: bool = True) -> str:
    flat = [extra for one in metadata for extra in (one.metadata if isinstance(one, FieldInfo) else [one])]
    limits = {key: getattr(one, key) for key in _LIMITS for one in flat if getattr(one, key, None) is not None}
    shown = {
        key: f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
        for key, limit in limits.items()
        if beyond or key not in ("le", "lt") or limit < _FAR
    }
    if {"ge", "le"} <= shown.keys():
        return f"{shown['ge']} to {shown['le']}"
    return " and ".join(_LIMITS[key].format(limit) for key, limit in shown.items())


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
