"""Settings, and what preflight says before any process starts."""

from __future__ import annotations

import importlib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from atropos_exp.config_origin import CONF_DIR
from atropos_exp.types import UserError


def load(option: str, **changes: Any) -> Any:
    values = yaml.safe_load((CONF_DIR / f"engine/{option}.yaml").read_text())
    module, name = values.pop("_target_").rsplit(".", 1)
    settings = getattr(importlib.import_module(module), name)
    assert {field.name for field in fields(settings)} == set(values)
    return settings(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "engine.dtype must be one of auto, float32, bfloat16, float16; got 'int8'"),
        ({"transport": "nccl"}, "engine.transport must be one of shm, disk; got 'nccl'"),
        ({"max_batch_tokens": 0}, "engine.max_batch_tokens must be 1 or more; got 0"),
        ({"num_threads": 0}, "engine.num_threads must be 1 or more, or null for all cores; got 0"),
        ({"batching_wait_seconds": -1.0}, "engine.batching_wait_seconds must be 0 or more; got -1.0"),
        ({"health_timeout_seconds": 0.0}, "engine.health_timeout_seconds must be above 0 seconds; got 0.0"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load("hf", **changes)
    assert str(raised.value) == message


def test_hf_needs_nothing_more_here() -> None:
    assert load("hf").preflight(device="cpu") == []
    assert load("hf", python=sys.executable).preflight(device="cpu") == []


def test_another_interpreter_is_asked(tmp_path: Path) -> None:
    (problem,) = load("hf", python=str(tmp_path / "python")).preflight(device="cpu")
    assert "cannot serve engine=hf: it does not run" in problem
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # an interpreter without installed packages
    bare.chmod(0o755)
    (problem,) = load("hf", python=str(bare)).preflight(device="cpu")
    assert "it cannot import torch, transformers" in problem and "atropos_exp" not in problem.split(";")[0]


@pytest.mark.parametrize(("option", "title"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_engines_of_another_environment(option: str, title: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    (problem,) = load(option, python=str(bare)).preflight(device="cpu")
    assert problem.startswith(f"engine={option} needs an interpreter that can import {option}, but ")
    assert f"engine.python is {bare} and it cannot import {option}; set engine.python" in problem
    with pytest.raises(UserError, match=f"engine={option} is not driven by this version"):
        load(option).start(model_folder=tmp_path, device="cpu", log_folder=tmp_path, max_sequence_length=8)
