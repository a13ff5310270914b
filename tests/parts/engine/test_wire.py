"""The wire format: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atropos_exp.errors import WireError
from atropos_exp.processes.wire import ARRAY_DTYPES, flatten, pack, split, unpack
from atropos_exp.weights.digest import digest
from atropos_exp.weights.tensors import Piece, layout, read_piece, write_bucket


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


def device_digest(tensor: Any) -> str:
    from atropos_exp.weights.digest import digest_lanes, resolve_lanes

    return resolve_lanes(digest_lanes([tensor]))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 3, 8, 1001])
def test_the_digest_of_a_device_sees_every_change(dtype: str, size: int) -> None:
    """It is arithmetic, so it can be tried on the host: every bit flipped, neighbours swapped, another alignment."""
    import torch

    generator = torch.Generator().manual_seed(size)
    tensor = torch.randn(size, generator=generator).to(getattr(torch, dtype))
    want = device_digest(tensor)
    assert device_digest(tensor.clone()) == want and len(want) == 32
    padded = torch.cat([tensor[:1], tensor])  # the same elements, at an address that is no multiple of 8
    assert device_digest(padded[1:]) == want
    if size == 1001:
        assert device_digest(tensor.view(7, 143)) == want
        assert device_digest(tensor.view(7, 143).T.contiguous()) != want
    seen = {want}
    raw = tensor.view(torch.uint8)
    for place in range(0, len(raw), max(1, len(raw) // 16)):
        for bit in range(8):
            raw[place] ^= 1 << bit
            seen.add(device_digest(tensor))
            raw[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(range(0, len(raw), max(1, len(raw) // 16))), "each has a digest of its own"
    if size > 1:
        swapped = tensor.clone()
        swapped[[0, 1]] = tensor[[1, 0]]
        assert device_digest(swapped) not in seen


def test_the_digest_of_a_device_by_hand() -> None:
    """Of two words, in Python's own integers."""
    import torch

    words = [0x0123456789ABCDEF, -2]
    mask = (1 << 64) - 1

    def signed_shift(value: int, bits: int) -> int:
        value &= mask
        return ((value - (1 << 64) if value >> 63 else value) >> bits) & mask

    first = second = 0
    for index, word in enumerate(words):
        weight = (index + 1) * 0x9E3779B97F4A7C15 & mask
        weight = (weight ^ signed_shift(weight, 30)) * 0xBF58476D1CE4E5B9 & mask
        first += word * (weight | 1)
        second += ((word & mask) ^ signed_shift(word, 32)) * ((weight ^ signed_shift(weight, 27)) | 1)
    expected = f"{first & mask:016x}{second & mask:016x}"
    assert device_digest(torch.tensor(words).view(torch.float32)) == expected


def test_many_digests_at_once_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, odd, empty and cut in two by the end of a chunk."""
    import torch

    from atropos_exp.weights import digest as lanes

    generator = torch.Generator().manual_seed(0)
    sizes = (1001, 3, 0, 64, 1, 700, 2)
    tensors = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    alone = [device_digest(tensor) for tensor in tensors]
    assert len(set(alone)) == len(alone)
    for chunk in (1 << 22, 100, 7):
        monkeypatch.setattr(lanes, "_DIGEST_CHUNK", chunk)
        assert lanes.resolve_lanes(lanes.digest_lanes(tensors)) == alone
