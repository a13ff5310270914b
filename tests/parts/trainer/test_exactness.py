"""Which layout a model gets, for architectures of every kind, and that faults planted in one are named.

The expected numbers are transformers' own, one sequence at a time and in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer import attention, exactness
from atropos_exp.parts.trainer.exactness import Choice, candidates, choose_layout
from atropos_exp.parts.trainer.layouts import Layout
from tests.helpers.twins import write_twin

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

# Architecture -> what its configuration says beside the defaults, and the layout that is exact.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": ("qwen3", {}, "packed"),
    "older, learned positions": ("gpt2", {}, "packed"),
    "dropout": ("gpt_neox", {"hidden_dropout": 0.1, "attention_dropout": 0.1}, "packed"),
    "noise of the router": ("mixtral", {"router_jitter_noise": 0.1}, "packed"),
    "a factor after the head": ("cohere", {"logit_scale": 0.0625}, "packed"),
    "a divisor after the head": ("granite", {"logits_scaling": 8.0}, "packed"),
    "soft caps": ("gemma2", {}, "rows"),
    "sinks": ("gpt_oss", {}, "rows"),
    "chunks": ("llama4_text", {}, "rows"),
    "latent attention": ("deepseek_v3", {}, "rows"),
    "linear attention": ("qwen3_5_text", {}, "rows"),
    "state space": ("mamba2", {}, "rows"),
    "alibi": ("bloom", {}, "rows"),
    "drops keyword arguments": ("stablelm", {}, "rows"),
    "a rope factor that the length switches": ("phi3", {"rope_parameters": LONG}, "single"),
}


@pytest.fixture(scope="module")
def twin_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The twin of a model of this type, of which only the configuration is there."""

    def make(model_type: str, **config: Any) -> Path:
        return write_twin(tmp_path_factory.mktemp(model_type), model_type, **config)

    return make


def choose(twin: Path, kind: str = "auto", implementation: str = "auto") -> Choice:
    attention.register()
    layouts = candidates(kind=kind, attention=implementation, sp_size=1)
    return choose_layout(twin, layouts, device=torch.device("cpu"), trust_remote_code=False)


@pytest.mark.parametrize("case", CASES)
def test_the_fastest_exact_layout_is_chosen(twin_of: Callable[..., Path], case: str) -> None:
    model_type, config, kind = CASES[case]
    choice = choose(twin_of(model_type, **config))
    assert choice.layout.kind == kind, choice
    assert all(choice.rejected.values())


def test_a_lost_window_is_found_and_packed_refused_by_name(twin_of: Callable[..., Path]) -> None:
    """transformers' mask function knows the window of Qwen2-MoE, its attention call does not."""
    twin = twin_of("qwen2_moe", use_sliding_window=True, sliding_window=4096, max_window_layers=1)
    assert choose(twin).layout == Layout(kind="rows", attention="sdpa")
    with pytest.raises(UserError, match=r"cannot be trained exactly: trainer.layout=packed .* nats"):
        choose(twin, kind="packed")


def test_a_lost_chunk_is_found_and_packed_refused_by_name(twin_of: Callable[..., Path]) -> None:
    """Llama 4 attends within chunks, of which the packed attention knows nothing."""
    with pytest.raises(UserError, match=r"cannot be trained exactly: trainer.layout=packed .* nats"):
        choose(twin_of("llama4_text", attention_chunk_size=8192), kind="packed")


def test_a_model_that_is_not_causal_is_refused(twin_of: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="BertLMHeadModel is not causal"):
        choose(twin_of("bert"))


def test_weights_that_text_does_not_train_are_named(twin_of: Callable[..., Path]) -> None:
    assert any("vision" in name for name in choose(twin_of("gemma3")).without_gradient)
    assert choose(twin_of("qwen3")).without_gradient == ()


class TestPlantedFaults:
    """Each would train, finish and pass a canary."""

    @pytest.fixture
    def twin(self, twin_of: Callable[..., Path]) -> Path:
        return twin_of("mistral", sliding_window=4096)

    def test_three_tokens_leak(self, twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first tokens of a sequence see the last three of the one before it."""
        padded = attention._padded

        def leak(query: Any, key: Any, value: Any, packing: Any, *rest: Any) -> Any:
            output = padded(query, key, value, packing, *rest).clone()
            start = packing.lengths[0]
            output[start : start + 3] += 0.1 * output[start - 3 : start]
            return output

        monkeypatch.setattr(attention, "_padded", leak)
        assert "nats" in choose(twin).rejected[Layout(kind="packed", attention=attention.NAME)]

    def test_a_window_is_ignored(self, twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        padded = attention._padded
        monkeypatch.setattr(attention, "_padded", lambda *given: padded(*given[:-1], None))
        assert choose(twin).layout.kind == "rows"

    def test_dropout_stays_on(self, twin_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exactness, "without_noise", lambda config: {})
        monkeypatch.setattr(exactness, "evaluation_mode", lambda model: model.train())
        with pytest.raises(UserError, match=r"layout=single .* nats"):
            choose(twin_of("starcoder2", embedding_dropout=0.1, residual_dropout=0.1))

    def test_a_gradient_is_lost(self, twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The logprobs are right, so no canary could see it."""
        padded = attention._padded
        monkeypatch.setattr(attention, "_padded", lambda *given: padded(given[0].detach(), *given[1:]))
        reason = choose(twin).rejected[Layout(kind="packed", attention=attention.NAME)]
        assert "the gradient of" in reason and "q_proj" in reason

    def test_a_gradient_is_not_finite(self, twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In one weight of many, with right logprobs."""
        padded = attention._padded

        def spoil(query: Any, *rest: Any) -> Any:
            query.register_hook(lambda gradient: gradient * float("nan"))
            return padded(query, *rest)

        monkeypatch.setattr(attention, "_padded", spoil)
        assert "differs by inf" in choose(twin).rejected[Layout(kind="packed", attention=attention.NAME)]
