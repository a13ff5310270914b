"""The receiver's side of a weight transport, in the engine's servers: finds a bucket and reads the tensors in it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_exp.errors import Refused, WireError
from atropos_exp.processes.wire import Message
from atropos_exp.weights.group import GroupSource
from atropos_exp.weights.tensors import LORA_A, LORA_B, Kind, Piece, read_piece, safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 1 << 50
NOT_PARAMETERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers in older checkpoints
SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class BucketSource:
    """Where buckets of weights arrive in this server: exactly one of the four ways.

        source = BucketSource(shm=None, folder=Path("log/weights_x1"), cuda_ipc=False, group=None)
        source.kinds({"file": "bucket.safetensors"})  # [("lm_head.weight", ("bfloat16", (49152, 576)))]
        for name, tensor in source.read({"file": "bucket.safetensors"}):
            ...  # copy it: the next bucket overwrites it

    It can be sent to a worker process of the server, where the paths open the same files.
    """

    shm: str | None  # of an inherited memory file, as /proc/<pid>/fd/<n>
    folder: Path | None
    cuda_ipc: bool
    group: GroupSource | None

    @property
    def on_device(self) -> bool:
        """Whether buckets arrive in device memory."""
        return self.cuda_ipc or (self.group is not None and self.group.backend == "nccl")

    def kinds(self, message: Message) -> list[tuple[str, Kind]]:
        """Name, dtype and shape of the bucket's tensors, without reading them. Raises Refused or WireError."""
        self._check(message)
        if self.folder is not None:
            return safetensors_kinds(self._file(message))
        pieces, _ = self._pieces(message)
        return [(piece.name, (piece.dtype, piece.shape)) for piece in pieces]

    def read(self, message: Message, *, receiver: int = 0) -> Iterator[tuple[str, Tensor]]:
        """The bucket's tensors, as views that the next bucket overwrites. `receiver`: the number of this process among
        those of the server that receive weights. Raises Refused or WireError."""
        self._check(message)
        if self.folder is not None:
            from safetensors.torch import load_file

            yield from load_file(self._file(message)).items()
            return
        pieces, size = self._pieces(message)
        buffer: Any
        if self.group is not None:
            buffer = self.group.receive(message["group"], size, receiver=receiver)
        else:
            buffer = open_cuda(message["cuda"], size) if self.cuda_ipc else self._map(size)
        for piece in pieces:
            yield piece.name, read_piece(piece, buffer)

    def _check(self, message: Message) -> None:
        """Refuse a message of another transport than the one this server was started with."""
        ways = {"group": self.group, "cuda": self.cuda_ipc, "file": self.folder, "shm": self.shm}
        if not any(ways[key] for key in ways.keys() & message):
            got = ", ".join(sorted(message))
            raise Refused(400, f"this server was started for another weight transport; got {got}")

    def _file(self, message: Message) -> Path:
        assert self.folder is not None
        name = str(message["file"])
        if Path(name).name != name:
            raise Refused(400, f"not a file name: {name!r}")
        return self.folder / name

    def _pieces(self, message: Message) -> tuple[list[Piece], int]:
        """The tensors in the bucket's buffer, and its size in bytes."""
        size = message["num_bytes"]
        if type(size) is not int or not 0 <= size <= MAX_BYTES:
            raise Refused(400, f"num_bytes must be a number from 0 to {MAX_BYTES}; got {size!r}")
        return [Piece.from_message(item, buffer_bytes=size) for item in message["pieces"]], size

    def _map(self, size: int) -> mmap.mmap:
        assert self.shm is not None
        fd = os.open(self.shm, os.O_RDWR)
        try:
            return mmap.mmap(fd, max(size, 1))  # unmapped when the last view of it is gone
        finally:
            os.close(fd)


def safetensors_kinds(path: Path) -> list[tuple[str, Kind]]:
    """Name, dtype and shape of the floating-point tensors in a file, read from its header."""
    return [
        (name, (SAFETENSORS_DTYPES[item["dtype"]], tuple(item["shape"])))
        for name, item in safetensors_header(path).items()
        if item["dtype"] in SAFETENSORS_DTYPES
    ]


def expected_tensors(folder: Path, *, dtype: str, is_tied: bool) -> dict[str, Kind]:
    """The tensors that an update must bring to a server of the model in `folder`, by the checkpoint's names: all of its
    floating-point tensors in the served `dtype`, a tied head once. Ends the process if there are none."""
    found: dict[str, Kind] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, (_, shape) in safetensors_kinds(path):
            if not name.endswith(NOT_PARAMETERS) and not (name == "lm_head.weight" and is_tied):
                found[name] = (dtype, shape)
    if not found:
        raise SystemExit(f"no weights in {folder}: this engine needs them as *.safetensors")
    return found


def adapter_tensors(base: Mapping[str, Kind], *, rank: int, target_modules: Sequence[str]) -> dict[str, Kind]:
    """The LoRA matrices of a model with the tensors `base`: A [rank, in] and B [out, rank] for every linear layer whose
    name ends with a target, as in PEFT."""
    found: dict[str, Kind] = {}
    for name, (dtype, shape) in base.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module != name and module.endswith(tuple(f".{target}" for target in target_modules)):
            found[module + LORA_A] = (dtype, (rank, shape[1]))
            found[module + LORA_B] = (dtype, (shape[0], rank))
    return found


def inherited(fd: int | None) -> str | None:
    """The path of a file descriptor that this process inherited, which its worker processes can open too."""
    return None if fd is None else f"/proc/{os.getpid()}/fd/{fd}"


def share_cuda(buffer: Tensor) -> list[Any]:
    """A handle with which a process on the same GPU opens a device buffer: numbers and bytes, no pickle."""
    return list(buffer.untyped_storage()._share_cuda_())


_opened: dict[tuple[Any, ...], Any] = {}  # handle -> storage: the sender uses one buffer again and again


def open_cuda(handle: Any, size: int) -> Tensor:
    """The sender's device buffer in this process, as `size` bytes. Opening a handle runs no code. Raises WireError."""
    import torch

    match handle:
        case [int(), bytes(memory), int(length), int(start), bytes(), int(), bytes(), bool()]:
            key = (memory, length, start)
        case _:
            raise WireError(f"not a CUDA handle: {handle!r:.100}")
    if key not in _opened:
        _opened.clear()
        arguments = [torch.cuda.current_device(), *handle[1:]]  # the sender's number of the GPU may be another
        _opened[key] = torch.UntypedStorage._new_shared_cuda(*arguments)
    storage = _opened[key]
    if size > storage.nbytes():
        raise WireError(f"a bucket of {size} bytes in a buffer of {storage.nbytes()}")
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[:size]
