"""Files that do not fit their configuration are refused by name, before a missing tensor becomes random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atropos_exp.errors import UserError
from atropos_exp.parts.model.completeness import check_tensors
from tests.helpers.trainer_cases import write_model

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors; None takes one away. `__` in a name stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_whole_files_pass(folder: Path) -> None:
    assert check_tensors(folder, trust_remote_code=False).unused == []


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, **{NORM.replace(".", "__"): None})
    with pytest.raises(UserError, match=rf"1 tensors are missing \({NORM}\)"):
        check_tensors(folder, trust_remote_code=False)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    rewrite(folder, **{NORM.replace(".", "__"): torch.ones(3)})
    with pytest.raises(UserError, match=r"layers\.1\.input_layernorm"):
        check_tensors(folder, trust_remote_code=False)


def test_a_tensor_without_a_use_is_named(folder: Path) -> None:
    rewrite(folder, extra__weight=torch.ones(3))
    assert check_tensors(folder, trust_remote_code=False).unused == ["extra.weight"]
