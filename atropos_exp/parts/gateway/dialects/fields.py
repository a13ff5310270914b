"""Reading a request body field by field. A field that nothing read is refused by name, never silently ignored."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from atropos_exp.parts.gateway.refusal import Refusal, invalid, unsupported
from atropos_exp.types import TokenIds

# Parameters that change nothing here when they have this value. Any other value is refused.
NEUTRAL: Mapping[str, Any] = {
    "stream": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "min_p": 0,
    "min_tokens": 0,
    "min_new_tokens": 0,
    "logit_bias": {},
    "bad_words": [],
    "use_beam_search": False,
    "early_stopping": False,
    "echo": False,
    "suffix": "",
    "response_format": {"type": "text"},
    "spaces_between_special_tokens": True,
    "detokenize": True,
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "top_logprobs": 0,
    "top_logprobs_num": 0,
    "logprob_start_len": -1,
    "return_text_in_logprobs": False,
    "return_hidden_states": False,
    "return_tokens_as_token_ids": False,
    "add_special_tokens": True,
}
# Parameters that say nothing about sampling.
HARMLESS = frozenset(
    ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id", "rid")
)


class Fields:
    """A JSON object whose fields are taken out one by one. `null` counts as missing.

    Every method raises Refusal (400), which names the field, what was expected and what came. Example:
    `fields = Fields(body); n = fields.count("n", 1, 1, 64); fields.finish()` refuses {"n": 0} and {"m": 1}.
    """

    def __init__(self, body: Any, *, prefix: str = "") -> None:
        if not isinstance(body, dict):
            raise invalid(prefix.rstrip(".") or "the body", body, "a JSON object")
        self._left = {key: value for key, value in body.items() if value is not None}
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = None) -> Any:
        """Take the field as it is."""
        return self._left.pop(name, default)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Take a finite number between `low` and `high`."""
        value = self._left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise invalid(self._prefix + name, value, f"a number {_range(low, high)}")
        return float(value)

    def integer(self, name: str, default: int | None, low: float, high: float) -> int | None:
        """Take a whole number between `low` and `high`; None if it is missing and has no default."""
        value = self._left.pop(name, default)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value != value // 1:
            raise invalid(self._prefix + name, value, f"a whole number {_range(low, high)}")
        return int(value)

    def count(self, name: str, default: int, low: float, high: float) -> int:
        """Take a whole number between `low` and `high`."""
        value = self.integer(name, default, low, high)
        assert value is not None
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Take a boolean."""
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise invalid(self._prefix + name, value, "true or false")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Take one text or a list of texts, as a tuple; empty if the field is missing."""
        value = self._left.pop(name, ())
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) and text for text in value):
            raise invalid(self._prefix + name, value, "a text or a list of texts, none of them empty")
        return tuple(value)

    def finish(self) -> None:
        """Raise Refusal if a field is left whose value would have an effect."""
        for name, value in self._left.items():
            if name not in HARMLESS and (name not in NEUTRAL or value != NEUTRAL[name]):
                also = f" or set it to {NEUTRAL[name]!r}" if name in NEUTRAL else ""
                raise unsupported(self._prefix + name, value, f"leave it out{also}")


def token_ids(value: Any, name: str) -> TokenIds:
    """`value` as int32 [P]; it must be a non-empty list of token ids. The engine refuses ids outside its vocabulary."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        array = np.zeros(0)
    if not isinstance(value, list) or array.ndim != 1 or array.dtype.kind != "i":
        raise invalid(name, value, "a non-empty list of token ids")
    if array.min() < 0 or array.max() >= 1 << 31:
        bad = array[(array < 0) | (array >= 1 << 31)][0]
        raise Refusal(400, "value", f"{name} must hold token ids; got {bad}", param=name)
    return array.astype(np.int32)


def _range(low: float, high: float) -> str:
    return f"from {low:g} on" if math.isinf(high) else f"from {low:g} to {high:g}"
