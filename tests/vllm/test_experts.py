"""Mixtures of experts, whose tensors transformers fuses and vLLM packs anew: whole runs, and their exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from atropos_exp.export import export
from atropos_exp.parts.model.hf_folder import copy_description
from atropos_exp.parts.model.tiny import WEIGHTS
from tests.helpers.engines import start_engine
from tests.helpers.experiments import metrics, run_here
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import plain_logprobs, random_model, random_prompts

pytestmark = pytest.mark.vllm

VOCAB = 384  # rows of the embedding that fit the tokenizer of model=tiny


def write_experts(folder: Path, kind: str) -> Path:
    """A small random mixture of experts with the tokenizer of model=tiny."""
    copy_description(WEIGHTS, folder)
    model = random_model(kind=kind, tied=False, vocab=VOCAB)
    model.config.update({"eos_token_id": 1, "pad_token_id": 0})
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    return folder


def write_prompts(path: Path) -> Path:
    """Right is an answer with an "a" in it, as some answers of a random model are."""
    row = {
        "data_source": "letters", "prompt": [{"role": "user", "content": "Say a."}], "ability": "letters",
        "reward_model": {"style": "rule", "ground_truth": "a"}, "extra_info": {"index": 0},
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row] * 8), path)
    return path


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return set(opened.keys())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_run_and_its_export(tmp_path: Path, kind: str) -> None:
    """Every sync is proven, and the logprobs of what was sampled are the trainer's. vLLM then loads the export,
    computes with it as transformers does, and takes further updates."""
    model = write_experts(tmp_path / "model", kind)
    found = run_here(
        tmp_path / "run", "engine=vllm", "engine.num_threads=1", "engine.kv_cache_gb=0.25", f"model.path={model}",
        "trainer.max_steps=2", "trainer.learning_rate=1e-2", "eval.num_prompts=0", "data.prepare=null",
        f"data.parquet_paths={write_prompts(tmp_path / 'letters.parquet')}", "reward.extract='a'",
        "max_prompt_length=64", "max_response_length=64", "group_size=16",
    )  # fmt: skip
    assert (found["status"], found["sync"]["count"], found["sync"]["verified"]) == ("finished", 3, 3)
    assert found["sync"]["canary_gap_max"] < 1e-4
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2] and all(row["grad/norm"] for row in rows[1:]), rows
    # In the mean: where two experts tie, rounding may choose the other one for a token.
    assert max(row["policy/logprob_gap_mean"] for row in rows[1:]) < 2e-3

    out = tmp_path / "out"
    export(tmp_path / "run", out, "float32")
    assert names(out) == names(model)
    trained = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if not tensor.equal(start[name])}
    assert any("experts.down_proj" in name for name in changed)
    engine = start_engine("vllm", tmp_path, out, max_length=300, dtype="float32", kv_cache_gb=0.25)
    try:
        prompts = random_prompts([5, 9, 30])
        for prompt, theirs in zip(prompts, engine.score(prompts, temperature=1.0), strict=True):
            np.testing.assert_allclose(theirs, plain_logprobs(trained, prompt), atol=1e-4)
        held = HeldModel(trained.eval())
        for bucket_bytes in (1, 1 << 30):  # a tensor a bucket, all in one
            held.disturb()
            stats = manage(held, engine, bucket_bytes=bucket_bytes).publish(engine.version() + 1)
            assert stats.num_tensors == stats.digests_compared == len(names(model))
            assert stats.canary_gap_max < 1e-4
    finally:
        engine.stop()
