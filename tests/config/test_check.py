"""Which classes may be built, ranges, derived sizes, places of mistakes, hashing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from atropos_exp.assembly.sizes import check_sizes, describe
from atropos_exp.config.build import build, find_class
from atropos_exp.config.freeze import config_hash, save_config
from atropos_exp.config.origin import Origin
from atropos_exp.config.root import CheckpointConfig, RunConfig, SyncConfig
from atropos_exp.config.typed import Mistake
from atropos_exp.errors import UserError
from atropos_exp.parts.cluster.local import Local


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "atropos_expanded.cluster.local.Local",
        "atropos_exp",
        "atropos_exp.parts.cluster.local.Local()",
        "atropos_exp.parts.cluster..local.Local",
        "atropos_exp.parts.cluster.local.subprocess.Popen",
        "atropos_exp.parts.cluster.local.UserError",
        "atropos_exp.parts.cluster.local.os",
        "atropos_exp.parts.cluster.local._start",
        "atropos_exp.parts.cluster.nowhere.Local",
        "atropos_exp.config.root.Mistake",  # a dataclass of ours, by another name than its own
        "",
        None,
        7,
    ],
)
def test_a_target_outside_the_parts_is_refused(target: object) -> None:
    with pytest.raises(UserError):
        build({"_target_": target, "num_processes": 1})
    with pytest.raises(UserError):
        find_class("atropos_exp.config.root.RunConfig", "cluster")


def test_build_makes_the_object_or_says_everything() -> None:
    node = OmegaConf.create({"_target_": "atropos_exp.parts.cluster.local.Local", "num_processes": 2})
    assert build(node, "cluster") == Local(num_processes=2)
    with pytest.raises(UserError, match=r"cluster\.num_processes: got 0, expected at least 1"):
        build({**node, "num_processes": 0}, "cluster")
    with pytest.raises(UserError, match=r"(?s)cluster\.processes: unknown key.*\n.*num_processes: missing"):
        build({"_target_": "atropos_exp.parts.cluster.local.Local", "processes": 0}, "cluster")


def run_config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "x",
        "seed": 0,
        "device": "cpu",
        "batch_size": 6,
        "group_size": 5,
        "max_prompt_length": 10,
        "max_response_length": 22,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "output_dir": "outputs",
        "run_dir": None,
        "resume": "auto",
        "checkpoint": CheckpointConfig(every=1, keep=1),
        "sync": SyncConfig(bucket_mb=1, canary_prompts=1, tolerance=None, max_gap=None, recheck="auto"),
    }
    return RunConfig(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a/b"},
        {"name": ""},
        {"seed": -1},
        {"device": "tpu"},
        {"batch_size": 0},
        {"max_response_length": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"output_dir": ""},
        {"resume": ""},
    ],
)
def test_ranges_of_the_root(changes: dict[str, Any]) -> None:
    run_config()
    with pytest.raises(UserError, match=f"^{next(iter(changes))}"):
        run_config(**changes)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (CheckpointConfig, {"every": -1, "keep": 0}),
        (SyncConfig, {"bucket_mb": 0, "canary_prompts": 0, "tolerance": -1.0, "max_gap": 0.0, "recheck": "on"}),
        (
            SyncConfig,
            {
                "bucket_mb": 65537,
                "canary_prompts": -1,
                "tolerance": float("nan"),
                "max_gap": float("inf"),
                "recheck": 2,
            },
        ),
    ],
)
def test_ranges_of_a_section(section: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        section(**changes)
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == list(changes)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    max_tokens_per_micro_batch: int
    sequence_parallel_size: int = 1
    num_mini_batches: int = 1


def sized(world_size: int, trainer: Trainer | None = None, **changes: Any) -> tuple[Any, list[str]]:
    mistakes: list[Mistake] = []
    sizes = check_sizes(
        run_config(**changes), None, trainer, None,
        device="cpu", environ={"WORLD_SIZE": str(world_size)}, mistakes=mistakes,
    )  # fmt: skip
    return sizes, [f"{mistake.path}: {mistake.message}" for mistake in mistakes]


def test_derived_sizes() -> None:
    trainer = Trainer(max_tokens_per_micro_batch=100, sequence_parallel_size=2)
    sizes, mistakes = sized(4, trainer)
    assert mistakes == []
    # 6 prompts x 5 = 30 sequences over 4 / 2 = 2 ranks; 32 tokens each, so 3 fit in 100 and 15 need 5 micro-batches
    assert (sizes.sequences, sizes.data_parallel, sizes.sequences_per_rank) == (30, 2, 15)
    assert (sizes.tokens_per_sequence, sizes.trained_tokens, sizes.micro_batches) == (32, 30 * 22, 5)
    # 15 in 5 mini-batches: 3 each, which fit in one micro-batch
    halved = Trainer(max_tokens_per_micro_batch=100, sequence_parallel_size=2, num_mini_batches=5)
    assert sized(4, halved)[0].micro_batches == 5
    assert sized(4, Trainer(max_tokens_per_micro_batch=40, num_mini_batches=1), group_size=6)[0].micro_batches == 9
    table = describe(sizes)
    for shown in ("30 (15 a rank)", "660 at most", "4 (data-parallel 2)", "cpu"):
        assert shown in table


def test_sizes_that_do_not_divide_name_the_nearest_that_do() -> None:
    _, mistakes = sized(4)  # 30 sequences over 4 ranks
    assert len(mistakes) == 1
    assert "30 sequences do not divide over 4 ranks" in mistakes[0]
    assert "use batch_size=4 or 8, or group_size=4 or 6" in mistakes[0]  # 4*5=20, 8*5=40, 6*4=24, 6*6=36
    _, mistakes = sized(3, Trainer(max_tokens_per_micro_batch=100, sequence_parallel_size=2))
    assert any("2, which does not divide the 3 trainer processes" in text for text in mistakes)
    _, mistakes = sized(2, Trainer(max_tokens_per_micro_batch=100, num_mini_batches=4))  # 30 over 8
    assert len(mistakes) == 1
    assert "2 ranks x 4 mini-batches (trainer.num_mini_batches); use batch_size=8, or group_size=4 or 8" in mistakes[0]


def test_a_sequence_must_fit_a_micro_batch() -> None:
    assert sized(1, Trainer(max_tokens_per_micro_batch=32))[1] == []
    _, mistakes = sized(1, Trainer(max_tokens_per_micro_batch=31))
    assert len(mistakes) == 1
    assert "10 + 22 = 32 tokens" in mistakes[0]


def test_the_place_of_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "experiment").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("seed: 0\ncheckpoint:\n  keep: x\n")
    (tmp_path / "conf" / "loss" / "sgd.yaml").write_text("_target_: a\nclip:\n  low: 1\n  high: 2\n")
    (tmp_path / "conf" / "experiment" / "e.yaml").write_text("# @package _global_\nseed: 3\nloss:\n  clip: {low: 7}\n")
    choices = {"loss": "sgd", "experiment": "e"}
    origin = Origin(
        overrides=("loss=sgd", "loss.kl=1", "+a.b=2", "sync={x: 1}"), choices=choices, folders=(tmp_path / "conf",)
    )
    assert origin.of("loss.clip.high") == "conf/loss/sgd.yaml line 4"
    assert origin.of("loss.clip.low") == "conf/experiment/e.yaml line 4"
    assert origin.of("seed") == "conf/experiment/e.yaml line 2"
    assert origin.of("checkpoint.keep") == "conf/config.yaml line 3"
    assert origin.of("loss.kl") == "override 'loss.kl=1'"
    assert origin.of("a.b") == "override '+a.b=2'"
    assert origin.of("loss.gone") == "conf/loss/sgd.yaml"
    assert origin.of("loss") == "override 'loss=sgd'"
    assert origin.of("sync.x") == "override 'sync={x: 1}'"


def test_hash_ignores_where_and_sees_what() -> None:
    base = {"seed": 0, "name": "a", "loss": {"kl": 0.0}, "logger": {"x": 1}, "output_dir": "o", "run_dir": None}
    first = config_hash(OmegaConf.create(base))
    assert len(first) == 64
    same = {**base, "name": "b", "logger": {}, "output_dir": "p", "run_dir": "q", "loss": {"kl": 0}}
    assert config_hash(OmegaConf.create(same)) == first
    assert config_hash(OmegaConf.create({**base, "seed": 1})) != first
    assert config_hash(OmegaConf.create({**base, "loss": {"kl": 0.5}})) != first
    assert config_hash(OmegaConf.create({**base, "loss": {"kl": "${seed}"}})) == first
    refers = OmegaConf.create({**base, "data": {"folder": "${output_dir}/data"}})
    moved = OmegaConf.create({**base, "output_dir": "p", "data": {"folder": "${output_dir}/data"}})
    assert config_hash(refers) == config_hash(moved) != first
    assert refers.output_dir == "o"
    caches = [OmegaConf.create({**base, "data": {"cache": place, "max": 1}}) for place in ("c", "${output_dir}/d", "e")]
    assert len({config_hash(one) for one in caches}) == 1 and caches[0].data.cache == "c"


def test_saved_configuration_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t-value-1")
    config = OmegaConf.create(
        {
            "logger": {"api_key": "abc", "token": "t0k", "password": None, "url": "http://u:s3cr3t-value-1@host"},
            "stop_token_ids": [1, 2],
            "max_tokens": 7,
            "tokenizer": "plain",
            "seed": "${max_tokens}",
        }
    )
    save_config(config, tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["logger"]["api_key"] == saved["logger"]["token"] == "<redacted>"
    assert saved["logger"]["password"] is None
    assert "s3cr3t" not in saved["logger"]["url"]
    assert saved["seed"] == 7
    assert (saved["stop_token_ids"], saved["tokenizer"]) == ([1, 2], "plain")
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
