"""What users type first: each trains for real, with every sync proven."""

import shutil
import subprocess
import sys

import pytest

from atropos_exp.errors import UserError
from atropos_exp.runs.folder import IDENTITY
from tests.helpers.experiments import command, environment, metrics, run_here, summary

NAMES = (
    "reward/mean",
    "loss/policy",
    "grad/norm",
    "policy/entropy",
    "length/response_mean",
    "eval/arithmetic/accuracy",
)


def assert_it_trained(folder):
    """Two steps, every sync proven, the trainer's logprobs those of the engine."""
    found, rows = summary(folder), metrics(folder)
    assert (found["status"], found["steps"], found["policy_version"]) == ("finished", 2, 2)
    assert found["sync"]["count"] == found["sync"]["verified"] == 3
    assert found["sync"]["canary_gap_max"] < 1e-4
    assert found["rollouts"]["local"] == 2 * 16
    assert any((row.get("grad/norm") or 0.0) > 0.0 for row in rows)
    assert max(row.get("policy/logprob_gap_max") or 0.0 for row in rows) < 1e-4
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run with one rank and one server."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run_here(folder, "trainer.max_steps=2")
    return folder


def test_a_local_run_trains(one):
    assert_it_trained(one)


def test_the_summary_keeps_its_contract(one):
    found = summary(one)
    assert set(found) == {
        "status", "error", "steps", "policy_version", "reward_first", "reward_last", "eval_first", "eval_last",
        "wall_seconds", "tokens_per_second", "rollouts", "sync", "resumed_from", "seed", "git", "versions",
        "config_hash",
    }  # fmt: skip
    assert set(found["rollouts"]) == {"atropos", "local", "dropped"}
    assert set(found["sync"]) == {"count", "verified", "seconds_mean", "bytes", "canary_gap_max"}
    assert found["versions"]["engine: transformers"] == found["versions"]["transformers"]  # the same environment
    assert found["error"] is None


def test_what_cannot_be_continued_is_left_as_it_was(one):
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    refusals = {
        ("seed=1", f"resume={one}"): "^This run cannot start:\n  resume: .* is finished after 2 .*\n  seed: got 1, but",
        (
            "trainer.max_steps=3",
            f"resume={one}",
            "model.lora.rank=4",
        ): "lora.rank: got 4, but the checkpoint .* 0;",
        ("trainer.max_steps=3", f"resume={one}", "data.prepare.arguments.seed=1"): "changed since the checkpoint",
        (f"resume={one / 'checkpoints' / 'step_000002'}",): f"is a checkpoint; resume={one} continues its run",
    }
    for overrides, message in refusals.items():
        with pytest.raises(UserError, match=message):
            run_here(one, "trainer.max_steps=2", *overrides)
        now = {path: path.read_bytes() for path in one.rglob("*") if path.is_file() and path.parent.name != "log"}
        assert now == {path: content for path, content in before.items() if path.parent.name != "log"}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_run_that_is_refused_late_leaves_no_folder(tmp_path, is_there, capsys):
    folder = tmp_path / "new" / "run"
    if is_there:
        folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"target_modules: got q_porj, .* Did you mean q_proj\?"):
        run_here(folder, "model.lora.rank=4", "model.lora.target_modules=[q_porj]")
    assert list(tmp_path.rglob("*")) == ([folder.parent, folder] if is_there else [])
    assert "q_porj" not in "".join(capsys.readouterr()), "it is said once, by who catches it"


def test_what_is_hardly_meant_is_said(one, capsys, tmp_path):
    shutil.copytree(one.parent / "data", tmp_path / "data")
    train = next((tmp_path / "data").glob("*/train.parquet"))
    run_here(
        tmp_path / "run", "trainer.max_steps=1", "trainer.warmup_steps=1000", "data.prepare=null",
        f"data.parquet_paths={train}",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("only 1 steps: the learning rate ends at 0.001 of trainer.learning_rate") == 1
    assert said.count("data.eval_paths is empty: nothing is evaluated") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        [
            "advantage=dr_grpo",
            "loss=dr_grpo",
            "engine.transport=disk",
            "reward=numeric",
            "data.prepare.arguments.operations='+-'",
        ],
        ["advantage=rloo", "loss=advantage_weighted_sft"],
        ["advantage=reinforce_plus_plus_baseline", "loss=gspo", "model.lora.rank=8", "loss.kl_coef=0.01"],
        ["advantage=opo", "loss=cispo", "trainer.num_mini_batches=2"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_it_trains(overrides, tmp_path):
    run_here(tmp_path / "run", "trainer.max_steps=2", *overrides)
    assert_it_trained(tmp_path / "run")


@pytest.mark.slow
def test_two_ranks_end_where_one_ends(one, tmp_path):
    """On the same rollouts: the second run, started by torchrun, finds the first one's journal in its folder."""
    two = tmp_path / "two"
    shutil.copytree(one / "rollouts", two / "rollouts")
    shutil.copy(one / IDENTITY, two)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*start, *command(two, "trainer.max_steps=2")[2:]],
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(two)["status"] == "finished"
    assert "data-parallel 2" in done.stdout
    rows = list(zip(metrics(one), metrics(two), strict=True))
    assert len(rows) == 3
    for left, right in rows:
        for name in ("reward/mean", "loss/policy", "grad/norm", "policy/entropy", "eval/arithmetic/accuracy"):
            if left.get(name) is None:
                assert right.get(name) is None, name
            else:
                assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-7), name


@pytest.mark.slow
def test_two_servers_give_the_numbers_of_one(one, tmp_path):
    two = tmp_path / "two"
    found = run_here(two, "trainer.max_steps=2", "engine.data_parallel_size=2", "engine.transport=gloo")
    assert (found["status"], found["sync"]["count"], found["sync"]["verified"]) == ("finished", 3, 3)
    assert found["sync"]["bytes"] == summary(one)["sync"]["bytes"] and found["sync"]["canary_gap_max"] < 1e-4
    for left, right in zip(metrics(one), metrics(two), strict=True):
        for name in NAMES:
            expected = left.get(name)
            assert right.get(name) == (expected if expected is None else pytest.approx(expected, rel=1e-3, abs=1e-6)), (
                name
            )
    assert {path.name for path in (two / "log").glob("engine*")} == {"engine_0.log", "engine_1.log"}
