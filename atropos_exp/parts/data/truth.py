"""Ground truths as text: rewards of every kind compare text, and those that can read JSON get the structure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def is_truth(kind: pa.DataType) -> bool:
    """Whether a ground truth may have that type."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return is_truth(kind.value_type)
    if types.is_struct(kind):
        return all(is_truth(field.type) for field in kind)
    if _is_list(kind):
        return is_truth(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating)
    return any(test(kind) for test in (*tests, types.is_boolean, types.is_decimal, types.is_null))


def is_structured(kind: pa.DataType) -> bool:
    """Whether truths of that type become JSON text: lists and structs."""
    import pyarrow as pa

    return _is_list(kind) or bool(pa.types.is_struct(kind))


def as_text(array: pa.Array) -> pa.Array:
    """Each truth as text; null where there is none, or no number (NaN). Whole numbers have no decimals: 42.0 is "42".
    A list or struct is JSON."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if is_structured(array.type):
        values = array.to_pylist()
        return pa.array([None if value is None else _json(value) for value in values], pa.string())
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_finite(array), array, None)
    return array.cast(pa.string())


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # only decimals need `default`


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
