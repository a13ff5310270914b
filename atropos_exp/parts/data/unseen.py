"""What a row holds that this program would not show to the model, although it is a part of the task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from atropos_exp.parts.data.schema import COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

MEDIA = ("image", "images", "video", "videos", "audio", "audios", "multi_modal_data", "multi_modal_inputs")
TOOLS = ("tools", "functions", "agent_name")  # columns of verl; the values of extra_info are below
TOOLS_INFO = ("need_tools_kwargs", "tools_kwargs", "interaction_kwargs")
SYSTEM = ("system", "system_prompt")
QUESTION = ("choices", "options", "context", "passage", "article", "documents", "input")  # of raw data sets
RAW = "raw."
WITHOUT_TOOLS = "single_turn_agent"  # verl's agent that has none


def raw_task_columns(schema: pa.Schema) -> list[str]:
    """The columns of a raw data set that no conversion uses and that are a part of the task. They go beside its rows in
    verl's schema as `RAW` + name."""
    return [field.name for field in schema if field.name.lower() in QUESTION or _is_task(field.name, field.type)]


def unused_columns(schema: pa.Schema) -> list[str]:
    """The columns of a file in verl's schema that have no meaning here, and none for the task either."""
    return [name for name in schema.names if name not in COLUMNS and not _is_task(name, schema.field(name).type)]


def unseen(table: pa.Table) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """What stands beside the prompts of a table in verl's schema and is a part of the task: a reason, and in which
    rows [N] there is such a thing."""
    import pyarrow.compute as pc

    for name in table.column_names:
        if name not in COLUMNS and _is_task(name, table.schema.field(name).type):
            column = table.column(name).combine_chunks()
            there = present(column)
            if name == "agent_name":
                there &= ~present(pc.if_else(pc.equal(column, WITHOUT_TOOLS), "", None))
            yield _reason(f"column {name.removeprefix(RAW)}", name.removeprefix(RAW)), there
    if "extra_info" in table.column_names:
        extra = table.column("extra_info").combine_chunks()
        for name in TOOLS_INFO:
            if hasattr(extra.type, "get_field_index") and extra.type.get_field_index(name) >= 0:
                yield _reason(f"extra_info.{name}", "tools"), present(pc.struct_field(extra, name))


def unseen_in_messages(messages: pa.Array) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The same for the fields of messages [M] besides role and content."""
    import pyarrow.compute as pc

    for field in messages.type:
        if field.name not in ("role", "content"):
            yield _reason(f"a message's {field.name}", field.name), present(pc.struct_field(messages, field.name))


def present(array: pa.Array) -> NDArray[np.bool_]:
    """Whether each entry [N] holds anything: no null, blank text, empty list, False, or struct of such."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, types = array.type, pa.types
    if types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if types.is_null(kind):
        return np.zeros(len(array), np.bool_)
    if types.is_struct(kind):
        there = np.zeros(len(array), np.bool_)
        for child in array.flatten():
            there |= present(child)
        return there
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        found = pc.greater(pc.list_value_length(array), 0)
    elif types.is_boolean(kind):
        found = array
    elif types.is_string(kind) or types.is_large_string(kind):
        found = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(array)), 0)
    elif types.is_binary(kind) or types.is_large_binary(kind):
        found = pc.greater(pc.binary_length(array), 0)
    else:
        found = pc.is_valid(array)
    return np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _is_task(name: str, kind: pa.DataType) -> bool:
    return name.startswith(RAW) or name.lower() in (*MEDIA, *TOOLS, *SYSTEM) or _is_media(kind)


def _is_media(kind: pa.DataType) -> bool:
    """Whether values are bytes, or Hugging Face's images and sounds: structs of bytes and a path."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0)
    if pa.types.is_list(kind):
        return _is_media(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _reason(what: str, name: str) -> str:
    if name.lower() in SYSTEM:
        return f"{what} is not empty; put it into prompt as a system message, or use data.system_prompt"
    if name.lower() in (*TOOLS, "tool_calls", "tool_call_id"):
        return f"{what} is not empty, and prompts are answered without tools; use an environment that has them"
    if name.lower() in QUESTION:
        return f"{what} is not empty, and is not a part of the prompt; write it into the prompt"
    return f"{what} is not empty, and prompts are text only: the model would not see it"
