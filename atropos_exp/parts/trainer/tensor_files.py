"""Named tensors in safetensors files of bounded size, with the file names and the index of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

MAX_FILE_BYTES = 2 << 30


class TensorWriter:
    """Writes tensors into `folder`, in the order of `num_bytes` (key -> size): each file as soon as it is full.

    Example: `TensorWriter(folder, "model", {"a": 8})` followed by `add("a", tensor)` writes model.safetensors.
    """

    def __init__(self, folder: Path, stem: str, num_bytes: Mapping[str, int]) -> None:
        self._folder = folder
        self._files = _file_names(stem, num_bytes)
        self._left = list(num_bytes)
        self._content: dict[str, Tensor] = {}
        if len(set(self._files.values())) > 1:
            index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": self._files}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    def add(self, key: str, tensor: Tensor) -> None:
        """Take the next tensor. Keys must come in the order given to the constructor."""
        from safetensors.torch import save_file

        assert key == self._left.pop(0)
        self._content[key] = tensor.detach().cpu().contiguous()
        file = self._files[key]
        if not self._left or self._files[self._left[0]] != file:
            save_file(self._content, self._folder / file, metadata={"format": "pt"})
            self._content = {}


class TensorReader:
    """Reads tensors by key, with one file open at a time."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder = folder
        self._files = _stored_files(folder, stem)
        self._open_file = ""
        self._handle: Any = None

    def get(self, key: str) -> Tensor:
        """The full tensor `key`, on the CPU."""
        from safetensors import safe_open

        if self._files[key] != self._open_file:
            self._open_file = self._files[key]
            self._handle = safe_open(self._folder / self._open_file, framework="pt")
        tensor: Tensor = self._handle.get_tensor(key)
        return tensor


def read_shapes(folder: Path, stem: str) -> dict[str, list[int]]:
    """The shapes of all stored tensors by key; empty if no file has that stem. Only headers are read."""
    from safetensors import safe_open

    shapes = {}
    for file in dict.fromkeys(_stored_files(folder, stem).values()):
        with safe_open(folder / file, framework="pt") as handle:
            shapes.update({key: list(handle.get_slice(key).get_shape()) for key in handle.keys()})  # noqa: SIM118
    return shapes


def _file_names(stem: str, num_bytes: Mapping[str, int]) -> dict[str, str]:
    """The file of each key; a new one begins before MAX_FILE_BYTES would be exceeded."""
    numbers, number, size = {}, 0, 0
    for key, length in num_bytes.items():
        if size and size + length > MAX_FILE_BYTES:
            number, size = number + 1, 0
        size += length
        numbers[key] = number
    if number == 0:
        return dict.fromkeys(numbers, f"{stem}.safetensors")
    return {key: f"{stem}-{n + 1:05d}-of-{number + 1:05d}.safetensors" for key, n in numbers.items()}


def _stored_files(folder: Path, stem: str) -> dict[str, str]:
    from safetensors import safe_open

    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return files
    if not single.is_file():
        return {}
    with safe_open(single, framework="pt") as handle:
        return dict.fromkeys(handle.keys(), single.name)
