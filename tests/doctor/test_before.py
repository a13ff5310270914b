"""A healthy configuration is all ok; each planted fault is named, with what to do."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from atropos_exp.config.build import build
from atropos_exp.doctor.line import Level
from atropos_exp.doctor.programs import check_engine
from atropos_exp.doctor.slurm import check_slurm, minutes
from atropos_exp.doctor.versions import check_versions
from atropos_exp.parts.data.raw import make_row
from tests.helpers.paths import CONF, ROOT


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "atropos_exp.doctor", *arguments],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def write(path: Path, *rows: tuple[str, str]) -> Path:
    made = [
        make_row(data_source="toy", content=text, ability="toy", ground_truth=truth, split="train", index=index)
        for index, (text, truth) in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(made), path)
    return path


def on_rows(path: Path) -> list[str]:
    return ["data.prepare=null", f"data.parquet_paths={path}", "eval.num_prompts=0"]


def processor_seconds(
    run: Callable[[], subprocess.CompletedProcess[str]],
) -> tuple[subprocess.CompletedProcess[str], float]:
    """What `run` returns, and the seconds of computation of the processes that ended in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def healthy(folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The doctor on the default configuration."""
    return processor_seconds(lambda: command(f"output_dir={folder}"))


def test_the_default_configuration_is_healthy(healthy: tuple[subprocess.CompletedProcess[str], float]) -> None:
    done, _ = healthy
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    topics = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert {"python", "versions", "config", "model", "devices", "memory", "disk", "ports", "engine", "atropos"} <= {
        *topics
    }
    assert {"environment", "tracking", "tokenizer", "data", "reward"} <= {*topics}
    assert " 0 warn, 0 fail" in lines[-1]


@pytest.mark.slow
def test_the_default_configuration_is_examined_quickly(
    healthy: tuple[subprocess.CompletedProcess[str], float],
) -> None:
    # Seconds of computation, since other tests share the cores and nothing here waits for anything but its own work.
    # A ratio, since processors differ: 1.2 to 1.5 were seen.
    imports = [sys.executable, "-c", "import torch, transformers, verl"]
    _, of_imports = processor_seconds(lambda: subprocess.run(imports, text=True, check=True, timeout=240))
    assert healthy[1] < 2.5 * of_imports, (healthy[1], of_imports)


def test_the_program_ends_with_the_worst_and_says_what_to_type(tmp_path: Path) -> None:
    done = command(f"output_dir={tmp_path}", "group_size=1", "trainer.max_steps=0")
    assert done.returncode == 2
    assert "fail  group_size" in done.stdout and "[override 'group_size=1']" in done.stdout
    assert "fail  trainer" in done.stdout
    typo = command("advantage.epsilom=1")
    assert typo.returncode == 2 and "Did you mean 'advantage.epsilon'" in typo.stderr


def test_a_library_outside_its_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finding: Any) -> None:
    planted = tmp_path / "hydra_core-1.2.0.dist-info"
    planted.mkdir()
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: hydra-core\nVersion: 1.2.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = finding(check_versions(), "versions")
    assert "hydra-core is 1.2.0, expected <1.4,>=1.3.8" in line.text and "pip install" in line.remedy


def test_a_library_that_is_not_the_tested_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finding: Any) -> None:
    planted = tmp_path / "transformers-5.9.9.dist-info"
    planted.mkdir()
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "transformers 5.9.9 (tested: 5.10.4)" in finding(check_versions(), "versions", Level.warn).text


@pytest.mark.parametrize(
    ("overrides", "topic", "level", "said", "remedy"),
    [
        (["trainer.max_steps=1000000000"], "disk", Level.fail, "wanted", "output_dir"),
        (["output_dir=/proc/runs"], "disk", Level.fail, "cannot be written to", "output_dir"),
        (
            ["batch_size=65536", "group_size=64", "trainer.max_tokens_per_micro_batch=100000000"],
            "memory", Level.fail, "of it activations", "trainer.max_tokens_per_micro_batch",
        ),
        (
            ["batch_size=65536", "group_size=64", "engine.max_batch_tokens=1000000000"],
            "memory", Level.fail, "keys and values", "engine.max_batch_tokens",
        ),
        (["model=qwen3_0_6b"], "model", Level.fail, "Qwen/Qwen3-0.6B is not on this machine", "hf download"),
        (["max_prompt_length=5"], "data", Level.fail, "gives no prompt", "longer than max_prompt_length"),
        (["batch_size=8192", "group_size=2"], "data", Level.warn, "fewer prompts than a step has (8192)", "batch_size"),
        (["logger=wandb", "logger.mode=online"], "tracking", Level.fail, "without an API key", "wandb login"),
        (["logger=wandb", "logger.mode=offline"], "tracking", Level.warn, "offline", "wandb sync"),
        (["cluster.num_processes=64"], "devices", Level.warn, "64 trainer processes share", "cluster.num_processes"),
        (["data.prepare.builder=arithmetics"], "data", Level.fail, "arithmetics", "Did you mean"),
        (["engine=sglang"], "engine", Level.fail, "cannot import sglang", "engine.python"),
    ],
)  # fmt: skip
def test_planted_faults_of_the_configuration(
    overrides: list[str],
    topic: str,
    level: Level,
    said: str,
    remedy: str,
    folder: Path,
    doctor: Any,
    finding: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    line = finding(doctor(f"data.prepare.folder={folder / 'data'}", *overrides), topic, level)
    assert said in line.text
    assert remedy in line.remedy + line.text


def test_cuda_without_a_gpu(doctor: Any, finding: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    line = finding(doctor("device=cuda"), "device")
    assert "GPU" in line.text or "CPU build" in line.text


def test_a_port_that_is_taken(doctor: Any, finding: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = finding(doctor("rollout=auto", f"gateway.port={port}"), "ports")
    assert f"127.0.0.1:{port}" in line.text and "another port" in line.remedy


def test_a_file_without_verls_columns(doctor: Any, finding: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["1+1"], "answer": ["2"]}), tmp_path / "raw.parquet")
    assert "raw.parquet" in finding(doctor(*on_rows(tmp_path / "raw.parquet")), "data").text


def test_rows_that_the_reward_cannot_score(doctor: Any, finding: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "words.parquet", *((f"{at}+1=", f"word{'x' * at}") for at in range(20)))
    line = finding(doctor(*on_rows(path), "reward=numeric", "max_prompt_length=64", "batch_size=4"), "reward")
    assert "Numeric" in line.text and "choose the reward" in line.remedy


def test_answers_that_would_never_end(doctor: Any, finding: Any, changed_model: Any) -> None:
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    line = finding(doctor(f"model.path={changed_model(template=template)}"), "tokenizer")
    assert "sampling does not stop" in line.text and "eos_token_id" in line.remedy


def test_two_beginnings_of_sequence(doctor: Any, finding: Any, changed_model: Any) -> None:
    template = (
        "<|system|><|system|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    model = changed_model(template=template, tokenizer_config={"bos_token": "<|system|>"})
    line = finding(doctor(f"model.path={model}"), "tokenizer")
    assert "'<|system|>' twice" in line.text and "add_bos_token" in line.remedy


def test_a_tokenizer_of_another_model(doctor: Any, finding: Any, changed_model: Any) -> None:
    line = finding(doctor(f"model.path={changed_model(config={'vocab_size': 300})}"), "tokenizer")
    assert "no row among the model's 300" in line.text


def test_a_model_folder_without_weights(doctor: Any, finding: Any, changed_model: Any) -> None:
    model = changed_model()
    (model / "model.safetensors").unlink()
    assert "no model.safetensors" in finding(doctor(f"model.path={model}"), "model").text


def test_an_engine_in_an_empty_environment(doctor: Any, finding: Any, bare_python: Path) -> None:
    line = finding(doctor(f"engine.python={bare_python}"), "engine")
    assert "cannot import torch" in line.text and "name an interpreter" in line.remedy


def test_an_environment_in_an_empty_environment(doctor: Any, finding: Any, bare_python: Path, tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text("")
    line = finding(
        doctor("rollout=auto", "env=external", f"env.python={bare_python}", f"env.command=[{tmp_path / 'env.py'}]"),
        "environment",
    )
    assert "No module named 'atroposlib'" in line.text and "transformers<5" in line.remedy


@pytest.mark.parametrize(("rollout", "level"), [("atropos", Level.fail), ("auto", Level.warn)])
def test_no_atropos_api(rollout: str, level: Level, doctor: Any, finding: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    line = finding(doctor(f"rollout={rollout}", f"atropos.api_url={url}", "atropos.launch=false"), "atropos", level)
    assert "does not answer" in line.text and "run-api" in line.remedy


def test_something_else_at_the_address_of_the_api(doctor: Any, finding: Any) -> None:
    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"message": "hello"}')

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        lines = doctor("rollout=atropos", f"atropos.api_url={url}", "atropos.launch=false")
        server.shutdown()
    assert "no Atropos API" in finding(lines, "atropos").text


def test_slurm_is_asked_for_where_there_is_none(
    checked: Callable[..., Any], finding: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = checked()
    slurm = build(yaml.safe_load((CONF / "cluster" / "slurm.yaml").read_text()), "cluster")
    monkeypatch.setenv("PATH", str(tmp_path))
    line = finding(check_slurm(replace(run, parts=replace(run.parts, cluster=slurm))), "slurm")
    assert "sbatch" in line.text and "login node" in line.remedy


@pytest.mark.parametrize(("text", "expected"), [("1-02:30:00", 1590), ("00:05:00", 5), ("UNLIMITED", None)])
def test_slurms_times(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


def test_an_engine_of_ones_own_is_told_by_its_name(checked: Callable[..., Any]) -> None:
    class InProcess:
        """What a user's engine offers at least; it is no `ServerSettings`."""

        dtype, colocate, max_restarts = "float32", False, 0

    run = checked()
    (line,) = check_engine(replace(run, parts=replace(run.parts, engine=InProcess())))
    assert line.level is Level.ok and line.text == f"InProcess, run by {sys.executable}"
