"""What travels between a trainer process and an engine process: msgpack messages with raw arrays, and errors.

No pickle (a message can never run code) and no JSON (a number per character is the cost of logprobs).
An array is a msgpack extension: its dtype and shape, then its bytes as they lie in memory (little endian).
"""

import math
import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from atropos_exp.errors import WireError

Scalar = TypeVar("Scalar", bound=np.generic)

ARRAY_EXTENSION = 1
ARRAY_DTYPES = ("bool", "uint8", "int32", "int64", "uint64", "float32", "float64")
MAX_DIMENSIONS = 8
MAX_MESSAGE_BYTES = 1 << 30

# Between a request and its answer the server sends one of these now and then, so that the client can tell a long
# computation from a stopped process. It is msgpack's nil, which no message starts with.
HEARTBEAT = b"\xc0"


def pack(message: dict[str, Any]) -> bytes:
    """Encode a message as bytes. Values: None, bool, int, float, str, bytes, lists and dicts of these, NumPy arrays."""
    import msgpack  # type: ignore[import-untyped]

    packed: bytes = msgpack.packb(message, default=_pack_array, use_bin_type=True)
    return packed


def unpack(raw: bytes) -> dict[str, Any]:
    """Decode what `pack` has encoded. Arrays are read-only views. Raises WireError for anything malformed."""
    import msgpack

    if len(raw) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message has at most {MAX_MESSAGE_BYTES} bytes; got {len(raw)}")
    try:
        message = msgpack.unpackb(raw, ext_hook=_unpack_array, raw=False)  # no item can be longer than `raw`
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"not a message: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"a message is a map; got {type(message).__name__}")
    return message


def flatten(rows: Sequence[NDArray[Scalar]], dtype: type[Scalar]) -> tuple[NDArray[Scalar], NDArray[np.int64]]:
    """Concatenate rows of different lengths: one array [sum of the lengths], and the lengths [N]."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.zeros(0, dtype=dtype)
    return flat, lengths


def split(flat: NDArray[Scalar], lengths: NDArray[np.int64]) -> list[NDArray[Scalar]]:
    """Undo `flatten`. Raises WireError if the lengths do not add up to the array's."""
    if flat.ndim != 1 or lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum()) != len(flat):
        raise WireError(f"{len(flat)} entries do not split into rows of lengths {lengths.tolist()[:8]}")
    return np.split(flat, np.cumsum(lengths))[:-1]  # after the last row comes nothing


def _pack_array(value: object) -> Any:
    import msgpack

    if not isinstance(value, np.ndarray):
        raise TypeError(f"a message cannot carry {type(value).__name__}")
    if value.dtype.name not in ARRAY_DTYPES:
        raise TypeError(f"a message cannot carry an array of {value.dtype}; one of {', '.join(ARRAY_DTYPES)}")
    header = struct.pack(f"<BB{value.ndim}Q", ARRAY_DTYPES.index(value.dtype.name), value.ndim, *value.shape)
    return msgpack.ExtType(ARRAY_EXTENSION, header + np.ascontiguousarray(value).tobytes())


def _unpack_array(code: int, data: bytes) -> NDArray[Any]:
    if code != ARRAY_EXTENSION or len(data) < 2:
        raise WireError(f"unknown extension {code} of {len(data)} bytes")
    kind, num_dimensions = data[0], data[1]
    start = 2 + 8 * num_dimensions
    if kind >= len(ARRAY_DTYPES) or num_dimensions > MAX_DIMENSIONS or len(data) < start:
        raise WireError("malformed array header")
    shape = struct.unpack_from(f"<{num_dimensions}Q", data, 2)
    dtype = np.dtype(ARRAY_DTYPES[kind])
    if math.prod(shape) * dtype.itemsize != len(data) - start:
        raise WireError(f"an array of {dtype} {list(shape)} does not have {len(data) - start} bytes")
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape)


Message = dict[str, Any]
