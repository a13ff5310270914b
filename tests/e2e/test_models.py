"""Models of other architectures train from one command, every sync proven and every answer scored as it was sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from data_prep.tiny_model import write_tokenizer
from tests.helpers.experiments import metrics, run_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def write(folder: Path, model_type: str, **config: object) -> Path:
    """A random model with a tokenizer that has no chat template, as GPT-2 has none."""
    write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    made = CONFIG_MAPPING[model_type](vocab_size=len(tokenizer), **config, **ends)
    AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(folder)
    return folder


SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MODELS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "qwen3_5_text": {
        **SMALL, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "deepseek_v3": {
        **SMALL, "num_hidden_layers": 2, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
        "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
def test_it_trains(tmp_path: Path, model_type: str) -> None:
    folder = write(tmp_path / "model", model_type, **MODELS[model_type])
    _trains(tmp_path / "run", folder)


def test_lora_on_experts_trains(tmp_path: Path) -> None:
    experts = {"num_hidden_layers": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    folder = write(tmp_path / "model", "qwen3_moe", **SMALL, **experts)
    _trains(tmp_path / "run", folder, "model.lora.rank=4", "trainer.learning_rate=1e-2")


def _trains(run: Path, folder: Path, *more: str) -> None:
    """Sums of one digit, of which a random model meets some: there is something to learn."""
    found = run_here(
        run,
        *(
            f"model.path={folder}",
            "data.format=plain",
            "data.prepare.arguments.digits=1",
            "data.prepare.arguments.num_train=60",
            "data.prepare.arguments.num_test=5",
            "eval.num_prompts=4",
            "reward=numeric",
        ),
        *("group_size=32", "max_response_length=12", "trainer.max_steps=2", "trainer.learning_rate=1e-3"),
        *more,
    )
    assert found["sync"]["count"] == found["sync"]["verified"] == 3
    rows = [row for row in metrics(run) if row.get("grad/norm")]
    assert rows and max(row["policy/logprob_gap_max"] for row in rows) < 1e-4


CONFIGURATION = """
from transformers import Qwen2Config

class DoubledConfig(Qwen2Config):
    model_type = "doubled"
"""
MODELING = '''
from transformers import Qwen2ForCausalLM
from .configuration_doubled import DoubledConfig

class DoubledForCausalLM(Qwen2ForCausalLM):
    """Its embeddings count twice, which nobody knows without this code."""

    config_class = DoubledConfig

    def forward(self, input_ids=None, inputs_embeds=None, **more):
        if inputs_embeds is None:
            inputs_embeds = 2 * self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=inputs_embeds, **more)
'''


def test_code_that_comes_with_a_model_is_run_by_trainer_and_engine(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "qwen2", **SMALL, num_hidden_layers=2)
    (folder / "configuration_doubled.py").write_text(CONFIGURATION)
    (folder / "modeling_doubled.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"], config["architectures"] = "doubled", ["DoubledForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "configuration_doubled.DoubledConfig",
        "AutoModelForCausalLM": "modeling_doubled.DoubledForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _trains(tmp_path / "run", folder, "model.trust_remote_code=true", f"model.revision={'ab12' * 10}")
