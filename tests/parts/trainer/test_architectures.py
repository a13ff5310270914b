"""Architectures of transformers, one of each family and each peculiarity, through layout, decoder and real trainer."""

from __future__ import annotations

import pytest

from tests.helpers import architectures
from tests.helpers.paths import ROOT

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


@pytest.mark.parametrize("name", architectures.VARIANTS)
def test_a_setting_that_decides_what_is_exact(name: str) -> None:
    """What it becomes is in docs/models.md; here it must be right or refused with a reason, never fail."""
    row = architectures.try_architecture(name)
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert architectures.line(row) in page
