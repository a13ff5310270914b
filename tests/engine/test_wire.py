"""The wire format: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atropos_exp.wire import ARRAY_DTYPES, WireError, flatten, pack, split, unpack
from atropos_exp.wire_tensors import Piece, digest, layout, read_piece, write_bucket


@pytest.mark.parametrize("dtype", ARRAY_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_arrays_travel_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 2, size=(*shape, np.dtype(dtype).itemsize)).astype(np.uint8)
    array = np.frombuffer(raw.tobytes(), dtype=dtype).reshape(shape)
    got = unpack(pack({"array": array.T, "text": "é", "raw": b"\x00", "nested": [1, {"x": None}]}))
    assert got["array"].dtype == array.dtype and got["array"].shape == array.T.shape
    assert got["array"].tobytes() == array.T.tobytes()
    assert got["text"] == "é" and got["raw"] == b"\x00" and got["nested"] == [1, {"x": None}]


def test_objects_do_not_travel() -> None:
    for value in (np.array([object()]), np.array(["a"]), {1, 2}, object()):
        with pytest.raises(TypeError, match="cannot carry"):
            pack({"x": value})


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_do_more_than_fail(raw: bytes) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(unpack(raw), dict)


@settings(deadline=None)
@given(st.data())
def test_damaged_messages_never_do_more_than_fail(data: Any) -> None:
    raw = bytearray(pack({"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": [1.5, "x"], "c": True}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        unpack(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


def test_rows_of_different_lengths() -> None:
    rows = [np.array(row, dtype=np.int32) for row in ([1, 2], [], [3])]
    flat, lengths = flatten(rows, np.int32)
    assert flat.tolist() == [1, 2, 3] and lengths.tolist() == [2, 0, 1]
    assert [row.tolist() for row in split(flat, lengths)] == [[1, 2], [], [3]]
    assert split(flat[:0], lengths[:0]) == []
    for wrong in ([2, 2], [-1, 4]):
        with pytest.raises(WireError, match="do not split"):
            split(flat, np.array(wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bucket_of_tensors(dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, 5), torch.randn(4, 4).T, torch.tensor(float("nan")), torch.randn(0, 3), torch.randn(7)]
    bucket = [(f"t{index}", tensor.to(dtype)) for index, tensor in enumerate(tensors)]
    pieces, num_bytes = layout(bucket)
    buffer = bytearray(num_bytes)
    write_bucket(bucket, pieces, buffer)
    for (name, tensor), piece in zip(bucket, pieces, strict=True):
        assert Piece.from_message(piece.to_message(), buffer_bytes=num_bytes) == piece
        got = read_piece(piece, buffer)
        assert piece.name == name and got.dtype == dtype and got.shape == tensor.shape
        assert digest(got) == digest(tensor)


def test_a_digest_sees_every_bit() -> None:
    square = torch.arange(16.0).reshape(4, 4)
    assert digest(square) != digest(square.T) and digest(square.T) == digest(square.T.contiguous())
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


@pytest.mark.parametrize(
    "item",
    [
        ["a", "float32", [2], 60],
        ["a", "float32", [2], -64],
        ["a", "float32", [2], 64],
        ["a", "float32", [1 << 40, 1 << 40], 0],
        ["a", "float32", [-1], 0],
        ["a", "float32", [True], 0],
        ["a", "object", [1], 0],
        ["a", "float32", [1]],
        [1, "float32", [1], 0],
        None,
    ],
)
def test_places_outside_the_buffer_are_refused(item: Any) -> None:
    with pytest.raises(WireError):
        Piece.from_message(item, buffer_bytes=64)
