"""From plain values to a frozen settings object: every value checked against its field, all mistakes collected."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, TypeGuard, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atropos_exp.errors import UserError

# key -> (whether a value is accepted, the words for what is)
Ranges = Mapping[str, tuple[Callable[[Any], bool], str]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """One thing wrong in a configuration. `path` is the dotted key, "" for none in particular."""

    path: str
    message: str


def construct(cls: type, values: Mapping[str, Any], path: str, mistakes: list[Mistake]) -> Any:
    """`cls(**values)` with values converted to the field types, or None after appending to `mistakes`."""
    before = len(mistakes)
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            mistakes.append(unknown_key(join(path, key), [join(path, name) for name in names]))
    arguments = {}
    for name in names:
        if name not in values:
            mistakes.append(Mistake(path=join(path, name), message="missing: it needs a value"))
        else:
            arguments[name] = _convert(hints[name], values[name], join(path, name), mistakes)
    if len(mistakes) > before:
        good = {name: value for name, value in arguments.items() if not _concerned(join(path, name), mistakes[before:])}
        for message in out_of_range(getattr(cls, "RANGES", {}), good):
            mistakes.extend(located(UserError(message), cls, path))
        return None
    try:
        return cls(**arguments)
    except UserError as error:
        mistakes.extend(located(error, cls, path))
        return None


def out_of_range(ranges: Ranges, values: Mapping[str, Any]) -> Iterator[str]:
    """A line for every value that its field does not accept."""
    for key, (accepts, expected) in ranges.items():
        if key in values and not accepts(values[key]):
            yield f"{key}: got {_shown(values[key])}, expected {expected}"


def check_ranges(settings: Any) -> None:
    """For `__post_init__` of settings with `RANGES`. Raises UserError with a line for each value out of range."""
    wrong = list(out_of_range(settings.RANGES, {name: getattr(settings, name) for name in settings.RANGES}))
    if wrong:
        raise UserError("\n".join(wrong))


def _concerned(path: str, mistakes: list[Mistake]) -> bool:
    return any(mistake.path == path or mistake.path.startswith(path + ".") for mistake in mistakes)


def unknown_key(path: str, known: Iterable[str]) -> Mistake:
    hint = "" if path.rsplit(".", 1)[-1].startswith("_") else did_you_mean(path, known)
    return Mistake(path=path, message="unknown key." + hint)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?", preferring a near spelling, then the same last name elsewhere; "" if nothing is near."""
    options = list(known)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.75)
    if not near:
        last = {option: option.rsplit(".", 1)[-1] for option in options}
        names = difflib.get_close_matches(word.rsplit(".", 1)[-1], set(last.values()), n=1, cutoff=0.75)
        near = [option for option in options if names and last[option] == names[0]][:1]
    return f" Did you mean '{near[0]}'?" if near else ""


def join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def located(error: UserError, cls: type, path: str) -> Iterator[Mistake]:
    """One mistake per line of a part's error. A line that starts with one of the part's keys belongs to that key."""
    names = [field.name for field in dataclasses.fields(cls)]
    for line in str(error).removeprefix(f"{path}: ").splitlines():
        word = line.split(maxsplit=1)[0].rstrip(":,") if line.strip() else ""
        key = word.removeprefix(path + ".") if path else word
        if key.split(".")[0] in names:
            rest = line.strip()[len(word) :].lstrip(":, ")
            rest = f"got {rest.removeprefix('is ')}" if rest.startswith("is ") else rest
            yield Mistake(path=join(path, key), message=rest or line.strip())
        elif line.strip():
            yield Mistake(path=path, message=line.strip())


def _convert(annotation: Any, value: Any, path: str, mistakes: list[Mistake]) -> Any:
    optional, inner = _strip_optional(annotation)
    if value is None and optional:
        return None
    if _is_settings(inner):
        if isinstance(value, Mapping):
            return construct(inner, value, path, mistakes)
        mistakes.append(Mistake(path=path, message=f"got {value!r}, expected a mapping with its own keys"))
        return None
    if get_origin(inner) is list and _is_settings(get_args(inner)[0]) and isinstance(value, list):
        return [_convert(get_args(inner)[0], item, f"{path}.{i}", mistakes) for i, item in enumerate(value)]
    for key in _hydra_keys(value, path):
        mistakes.append(Mistake(path=key, message="refused: only the file of a group's option names a class"))
        return None
    if type(value) is inner and inner in (bool, int, float, str) and "${" not in str(value) and value != "???":
        return value  # as OmegaConf would, in a hundredth of the time
    try:
        return OmegaConf.to_object(OmegaConf.merge(_schema(annotation), {"value": value})).value  # type: ignore[union-attr]
    except OmegaConfBaseException:
        mistakes.append(Mistake(path=path, message=f"got {_shown(value)}, expected {type_name(annotation)}"))
        return None


@functools.cache
def _schema(annotation: Any) -> Any:
    return OmegaConf.structured(dataclasses.make_dataclass("Value", [("value", annotation)]))


def _hydra_keys(value: Any, path: str) -> Iterator[str]:
    """Paths of keys that hydra.utils.instantiate would act upon."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("_target_", "_partial_", "_args_", "_recursive_", "_convert_"):
                yield join(path, key)
            yield from _hydra_keys(item, join(path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _hydra_keys(item, join(path, i))


def _is_settings(annotation: Any) -> TypeGuard[type]:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _strip_optional(annotation: Any) -> tuple[bool, Any]:
    if get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation):
        rest = [argument for argument in get_args(annotation) if argument is not type(None)]
        return True, rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007 (built at run time)
    return annotation is Any, annotation


def type_name(annotation: Any) -> str:
    """For people: "int", "list of float, or null", "one of grpo, rloo"."""
    optional, inner = _strip_optional(annotation)
    if inner is Any:
        return "any value"
    if isinstance(inner, type) and issubclass(inner, Enum):
        name = "one of " + ", ".join(member.name for member in inner)
    elif get_origin(inner) is list:
        name = f"a list (each item {type_name(get_args(inner)[0])})"
    elif get_origin(inner) is dict:
        name = f"a mapping (each value {type_name(get_args(inner)[1])})"
    else:
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        name = words.get(getattr(inner, "__name__", ""), getattr(inner, "__name__", str(inner)))
    return f"{name}, or null" if optional else name


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
