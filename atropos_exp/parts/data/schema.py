"""verl's schema: which columns a file must have, and which types they may have.

    data_source string | prompt list<struct<role, content>> | ability string | reward_model struct<ground_truth, ...>
    | extra_info struct (optional; `split` and `index` make the prompt id)

A file without these columns is refused; `rows.py` says why a single row is bad.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atropos_exp.errors import UserError
from atropos_exp.parts.data.truth import is_truth

if TYPE_CHECKING:
    import pyarrow as pa

REQUIRED = ("data_source", "prompt", "reward_model")
COLUMNS = (*REQUIRED, "ability", "extra_info")
EXPECTED = (
    "data_source: string, prompt: list<struct<role: string, content: string>>, reward_model: struct<ground_truth>"
)


def check_columns(schema: pa.Schema, file: str) -> None:
    """Raise UserError, with all that is wrong, unless the columns are verl's."""
    import pyarrow as pa

    problems = []
    names = schema.names
    for name in REQUIRED:
        if names.count(name) != 1:
            problems.append(f"column {name} is {'missing' if name not in names else 'there twice'}")
    if not problems:
        kind = schema.field("prompt").type
        item = kind.value_type if hasattr(kind, "value_type") else None
        is_messages = item is not None and pa.types.is_struct(item)
        if not is_messages or not all(has_scalar(item, name) for name in ("role", "content")):
            problems.append(f"column prompt is {kind}")
        model = schema.field("reward_model").type
        if not pa.types.is_struct(model) or model.get_field_index("ground_truth") < 0:
            problems.append(f"column reward_model is {model}")
        elif not is_truth(model.field("ground_truth").type):
            problems.append(
                f"reward_model.ground_truth is {model.field('ground_truth').type}; expected text, a number, or a list "
                "or struct of them"
            )
        if "extra_info" in names:
            extra = schema.field("extra_info").type
            if not (pa.types.is_struct(extra) or pa.types.is_null(extra)):
                problems.append(f"column extra_info is {extra}; expected a struct")
        for name in ("data_source", "ability"):
            if name in names and not is_scalar(schema.field(name).type):
                problems.append(f"column {name} is {schema.field(name).type}")
    if problems:
        raise UserError(
            f"{file}: wrong schema: {'; '.join(problems)} (its columns: {', '.join(names) or 'none'}); expected "
            f"{EXPECTED}; python -m data_prep.<builder> writes it, and data.hf_datasets reads known raw data sets"
        )


def has_scalar(struct: pa.DataType, name: str) -> bool:
    """Whether the struct has that field, with `is_scalar` values."""
    return struct.get_field_index(name) >= 0 and is_scalar(struct.field(name).type)


def is_scalar(kind: pa.DataType) -> bool:
    """Whether values are strings, or integers to be written as such. Null is the type of a column without values."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_null)
    return any(test(kind) for test in tests)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionary encoding, at any depth, which differs from piece to piece of a file."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(plain_type(kind.value_type)))
    return kind
