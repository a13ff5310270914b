"""Weights as bytes: the layout of a bucket of tensors in one buffer, and the names and dtypes of tensors."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_exp.errors import WireError

if TYPE_CHECKING:
    from torch import Tensor, dtype

Kind = tuple[str, tuple[int, ...]]  # of a tensor: dtype such as "bfloat16", and shape
TENSOR_DTYPES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}  # name -> bytes of an element
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"  # after the name of the module that they adapt, as PEFT has it
ALIGNMENT = 64  # bytes; every tensor of a bucket starts at a multiple of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The place of one tensor in a bucket's buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * TENSOR_DTYPES[self.dtype]

    def to_message(self) -> list[Any]:
        """As a list of plain values, which `from_message` reads."""
        return [self.name, self.dtype, list(self.shape), self.offset]

    @staticmethod
    def from_message(item: Any, *, buffer_bytes: int) -> Piece:
        """The piece in a message. Raises WireError unless it fits a buffer of `buffer_bytes`."""
        match item:
            case [str(name), str(kind), list(shape), int(offset)] if kind in TENSOR_DTYPES and all(
                type(size) is int and size >= 0 for size in shape
            ):
                piece = Piece(name=name, dtype=kind, shape=tuple(shape), offset=offset)
            case _:
                raise WireError(f"not the place of a tensor: {item!r:.200}")
        if offset < 0 or offset % ALIGNMENT or offset + piece.num_bytes > buffer_bytes:
            raise WireError(f"{name} at byte {offset} does not fit a buffer of {buffer_bytes} bytes")
        return piece


def layout(bucket: Sequence[tuple[str, Tensor]]) -> tuple[list[Piece], int]:
    """The places of a bucket's tensors, one after the other, and the size of the whole buffer in bytes."""
    pieces: list[Piece] = []
    offset = 0
    for name, tensor in bucket:
        piece = Piece(name=name, dtype=dtype_name(tensor), shape=tuple(tensor.shape), offset=offset)
        pieces.append(piece)
        offset += -(-piece.num_bytes // ALIGNMENT) * ALIGNMENT
    return pieces, offset


def write_bucket(bucket: Sequence[tuple[str, Tensor]], pieces: Sequence[Piece], buffer: Any) -> None:
    """Copy the tensors, from any device, to their places in a writable buffer or a uint8 tensor."""
    import torch

    target = buffer if isinstance(buffer, torch.Tensor) else torch.frombuffer(buffer, dtype=torch.uint8)
    for (_, tensor), piece in zip(bucket, pieces, strict=True):
        read_piece(piece, target).copy_(tensor.detach())


def read_piece(piece: Piece, buffer: Any) -> Tensor:
    """The tensor at this place of a buffer or uint8 tensor, as a view: copy it before the buffer changes."""
    import torch

    whole = buffer if isinstance(buffer, torch.Tensor) else torch.frombuffer(buffer, dtype=torch.uint8)
    flat = whole[piece.offset : piece.offset + piece.num_bytes]
    return flat.view(torch_dtype(piece.dtype)).view(piece.shape)


def is_adapter(name: str) -> bool:
    """Whether this is the name of one of LoRA's matrices, as it is sent or as PEFT has it in the trainer, with the
    adapter's name inserted."""
    return ".lora_A." in name or ".lora_B." in name


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's dtype without "torch.", such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def torch_dtype(name: str) -> dtype:
    """The torch dtype with this name, such as "bfloat16"."""
    import torch

    kind = getattr(torch, name)
    assert isinstance(kind, torch.dtype), name
    return kind


def safetensors_header(path: Path) -> dict[str, Any]:
    """Of a safetensors file: tensor name -> its `dtype` ("F32", "BF16", ...), `shape` and `data_offsets`."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names for a message, and how many more there are: "a, b, c and 9 more"."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
