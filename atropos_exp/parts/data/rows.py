"""Which rows of a table in verl's schema are good, and why the others are bad. All checks work on whole columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_exp.parts.data.schema import check_columns, has_scalar, plain_type
from atropos_exp.parts.data.truth import as_text, is_structured
from atropos_exp.parts.data.unseen import unseen, unseen_in_messages

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

NO_TRUTH = "reward_model.ground_truth is missing"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that is left out: one line of quarantine.jsonl."""

    file: str
    row: int  # from 0
    reason: str
    content: Any  # the row as far as it can be read


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GoodRows:
    """The good rows of one file, or of a piece of it, as columns."""

    table: pa.Table  # data_source, prompt, ability, ground_truth, text, key, prompt_id: no nulls; row: int64
    extra_info: pa.Array | None  # struct, row by row beside `table`
    is_structured: bool  # ground truths are JSON


def check_rows(
    table: pa.Table, file: str, *, split: str, first_row: int = 0, no_truth: str = NO_TRUTH
) -> tuple[GoodRows, list[BadRow]]:
    """Split a file's rows into good and bad. `split`: used in prompt ids where extra_info names none. `first_row`: the
    number of the first one. `no_truth`: what to say of a row without a ground truth.

    Raises UserError if the columns are not verl's.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    check_columns(table.schema, file)
    bad = _undecodable(table, file, first_row)
    row = np.setdiff1d(np.arange(first_row, first_row + table.num_rows), [one.row for one in bad])
    if bad:
        table = table.take(pa.array(row - first_row))
    prompt = table.column("prompt").combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(prompt), 0).to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    messages = prompt.flatten()
    roles = _text(pc.struct_field(messages, "role"))
    contents = _text(pc.struct_field(messages, "content"))
    data_source = _text(table.column("data_source").combine_chunks())
    truth = pc.struct_field(table.column("reward_model").combine_chunks(), "ground_truth")
    ground_truth = as_text(truth)
    is_user = _flags(pc.equal(roles, "user"))
    last = np.maximum(offsets[1:] - 1, 0)
    reasons = {
        "data_source is missing": _blank(data_source),
        "prompt has no messages": lengths == 0,
        f"a message's role is none of {', '.join(ROLES)}": _any(~_flags(pc.is_in(roles, pa.array(ROLES))), offsets),
        "a message has no content": _any(_blank(contents), offsets),
        "the last message is not the user's": ~is_user[last] if len(messages) else np.ones(table.num_rows, np.bool_),
        **dict(unseen(table)),
        **{reason: _any(there, offsets) for reason, there in unseen_in_messages(messages)},
        no_truth: _blank(ground_truth),
    }
    first = np.full(table.num_rows, "", dtype=object)
    for reason, mask in reversed(reasons.items()):  # the first of the list wins
        first[mask] = reason
    for index in np.flatnonzero(first != ""):
        content = table.slice(int(index), 1).to_pylist()[0]
        bad.append(BadRow(file=file, row=int(row[index]), reason=str(first[index]), content=content))

    good = pa.array(np.flatnonzero(first == ""))
    extra = table.column("extra_info").combine_chunks() if "extra_info" in table.column_names else None
    if extra is not None and pa.types.is_null(extra.type):
        extra = None
    clean = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    conversation = pc.if_else(pc.equal(roles, "system"), "", contents)
    columns = {
        "data_source": data_source,
        "prompt": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), clean),
        "ability": pc.fill_null(_text(table.column("ability").combine_chunks()), "")
        if "ability" in table.column_names
        else pa.array([""] * table.num_rows, pa.string()),
        "ground_truth": ground_truth,
        "text": contents.take(pa.array(last)) if len(contents) else pa.nulls(table.num_rows, pa.string()),
        "key": _normalised(_joined(offsets, conversation)),
        "prompt_id": _prompt_ids(data_source, extra, split, row),
        "row": pa.array(row, pa.int64()),
    }
    bad.sort(key=lambda one: one.row)
    rows = GoodRows(
        table=pa.table(columns).take(good),
        extra_info=None if extra is None else extra.take(good).cast(plain_type(extra.type)),
        is_structured=is_structured(truth.type),
    )
    return rows, bad


def _normalised(texts: pa.Array) -> pa.Array:
    """The form in which prompts are compared: lower case, runs of white space as one space, none at the ends."""
    import pyarrow.compute as pc

    return pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts), r"\s+", " "))


def _undecodable(table: pa.Table, file: str, first_row: int) -> list[BadRow]:
    """The rows whose text is no valid UTF-8. Rows are only looked at one by one if the table has such text."""
    import pyarrow as pa

    try:
        table.validate(full=True)
        return []
    except pa.ArrowInvalid:
        pass
    bad = []
    for row in range(table.num_rows):
        one = table.take([row])  # a copy: a slice would be validated with all that lies behind it
        try:
            one.validate(full=True)
        except pa.ArrowInvalid as error:
            bad.append(
                BadRow(file=file, row=first_row + row, reason=f"text is not valid UTF-8 ({error})", content=str(one))
            )
    return bad


def _text(array: pa.Array) -> pa.Array:
    import pyarrow as pa

    return array.cast(pa.string())


def _flags(array: Any) -> NDArray[np.bool_]:
    import pyarrow.compute as pc

    return np.asarray(pc.fill_null(array, False).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _blank(array: pa.Array) -> NDArray[np.bool_]:
    import pyarrow.compute as pc

    return ~_flags(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(array)), 0))


def _any(flags: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each row, whether any of its messages is flagged."""
    counts = np.concatenate([[0], np.cumsum(flags)])
    return np.asarray(counts[offsets[1:]] > counts[offsets[:-1]], dtype=np.bool_)


def _joined(offsets: NDArray[np.int64], contents: pa.Array) -> pa.Array:
    """The contents of each row's messages, with spaces between them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    filled = pc.fill_null(contents, "")
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), filled), " ")


def _prompt_ids(data_source: pa.Array, extra: pa.Array | None, split: str, row: NDArray[np.int64]) -> pa.Array:
    """Prompt ids <data_source>/<split>/<index>; split and index come from extra_info if it has them, else the file."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = {"split": pa.array([split] * len(row), pa.string()), "index": _text(pa.array(row))}
    for name in parts:
        if extra is not None and has_scalar(extra.type, name):
            parts[name] = pc.coalesce(_text(pc.struct_field(extra, name)), parts[name])
    return pc.binary_join_element_wise(pc.fill_null(data_source, ""), *parts.values(), "/")
