"""Architectures of transformers, one of each family and each peculiarity, through layout, decoder and real trainer."""

from __future__ import annotations

import pytest

from tests.helpers import architectures

# Name -> the layout that it is known to train in.
PACKED = (
    "llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma3", "gemma3_text",
    "gemma4_text", "phi", "phi3", "olmo2", "olmo3", "olmoe", "granite", "glm4", "glm4_moe", "ernie4_5",
    "ernie4_5_moe", "smollm3", "starcoder2", "gpt_neox", "gpt2", "minimax_m2", "exaone4", "cohere2", "opt",
)  # fmt: skip
ROWS = (
    "gemma2", "gpt_oss", "llama4_text", "deepseek_v3", "qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1",
    "bamba", "jamba", "mamba2", "granitemoehybrid", "stablelm", "bloom", "falcon", "nemotron",
    "recurrent_gemma", "olmo_hybrid",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("name", "kind"), [*((n, "packed") for n in PACKED), *((n, "rows") for n in ROWS)])
def test_an_architecture_is_right(name: str, kind: str) -> None:
    row = architectures.try_architecture(name)
    assert not row.refused and row.trained.startswith(f"{kind}, ")


VARIANTS = {
    "qwen2_moe, with a window": "rows",
    "phimoe, with a window": "rows",
    "phi3, longrope, sequences within the original length": "packed",
    "phi3, longrope, longer sequences": "refused: engine=hf cannot decode",
    "starcoder2, dropout 0.1": "packed",
    "phi, dropout 0.1": "packed",
    "mixtral, router noise": "packed",
    "cohere, logit scale": "packed",
    "granite, scaled logits": "packed",
    "falcon, alibi": "rows",
    "nemotron_h, no experts": "refused: NemotronHForCausalLM is not causal",
}


@pytest.mark.parametrize("name", architectures.VARIANTS)
def test_a_setting_that_decides_what_is_exact(name: str) -> None:
    row = architectures.try_architecture(name)
    found = f"refused: {row.refused}" if row.refused else row.trained
    assert found.startswith(VARIANTS[name]), row
