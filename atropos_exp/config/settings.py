"""`Settings`: what every class that a YAML file sets is made of, and the types that many keys share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from atropos_exp.config.typed import Mistake, SettingsError, join, strip_optional, translated

# Every number has two ends: what nobody means is refused here, and not by whatever it would overflow or fill later.
Count = Annotated[int, Field(ge=1, le=10**9)]
Index = Annotated[int, Field(ge=0, le=10**9)]
Few = Annotated[int, Field(ge=1, le=1024)]  # processes, threads or devices
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Seconds = Annotated[float, Field(gt=0, le=1e6, description="seconds")]  # at most 11 days

_HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
_TRUTH = {
    **dict.fromkeys(("y", "yes", "on", "true", "1"), True),
    **dict.fromkeys(("n", "no", "off", "false", "0"), False),
}


class Settings(BaseModel):
    """A frozen object whose fields are exactly the keys of a YAML mapping, without defaults.

    A number must be finite and in its range, a whole number takes no fraction, and text stays text. Numbers and truth
    values may be written as text, because YAML reads `1e-4` as such.

        class Clip(Settings):
            low: Annotated[float, Field(ge=0, le=1, description="1: no lower bound")]
            mode: Literal["token", "sequence"]

    Checks between fields go into a `model_validator(mode="after")` that raises UserError, a line per mistake, each
    starting with "key: ". Raises SettingsError with all mistakes at once.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    if not TYPE_CHECKING:  # a type checker sees the fields as keywords

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise SettingsError(translated(error, type(self), values)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if _holds_settings(annotation):
            return value
        refused = [
            Mistake(path=path, message="refused: only the file of a group's option names a class")
            for path in _hydra_keys(value)
        ]
        if refused:
            raise SettingsError(refused)
        if _has_interpolation(value):
            raise PydanticCustomError("interpolation_error", "text with an interpolation that is not resolved")
        if isinstance(value, str) and value.isspace():
            raise PydanticCustomError("blank_text", "text without a letter")
        return _converted(annotation, value)


def _converted(annotation: Any, value: Any) -> Any:
    """`value`, with text read as the number, truth value or choice that is wanted, and numbers as text."""
    _, wanted = strip_optional(annotation)
    if get_origin(wanted) is list and isinstance(value, list | tuple):
        return [_converted(get_args(wanted)[0], item) for item in value]
    if get_origin(wanted) is dict and isinstance(value, Mapping):
        return {key: _converted(get_args(wanted)[1], item) for key, item in value.items()}
    if wanted is str and type(value) is int:  # of any other number it is not known how it was written
        return str(value)
    if wanted is bool and isinstance(value, int):
        return bool(value)
    if not isinstance(value, str):
        return value
    if wanted is bool:
        return _TRUTH.get(value.lower(), value)
    if wanted in (int, float):
        try:
            return wanted(value)
        except ValueError:
            return value
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return wanted.__members__.get(value.removeprefix(f"{wanted.__name__}."), value)
    return value


def _holds_settings(annotation: Any) -> bool:
    _, wanted = strip_optional(annotation)
    return isinstance(wanted, type) and issubclass(wanted, BaseModel)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)


def _hydra_keys(value: Any, path: str = "") -> Iterator[str]:
    """Paths of keys that hydra.utils.instantiate would act upon."""
    for key, item in _items(value):
        if key in _HYDRA_KEYS:
            yield join(path, key)
        yield from _hydra_keys(item, join(path, key))


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, str):
        return "${" in value or value == "???"
    return any(_has_interpolation(item) for _, item in _items(value))
