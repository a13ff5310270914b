"""How engine `hf` decodes an architecture: the fastest way that is exact, and planted faults are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.parts.engine.hf import cache, choose, decode
from atropos_exp.parts.engine.hf.choose import NAMES, choose_decoding
from tests.helpers.twins import write_twin

CASES = {
    "plain": ("qwen3", "one shared cache", "sdpa"),
    "learned positions": ("gpt2", "one shared cache", "sdpa"),
    "windows, in a nested configuration": ("gemma3", "one shared cache", "sdpa"),
    "soft caps, which sdpa drops": ("gemma2", "one shared cache", "eager"),
    "sinks": ("gpt_oss", "one shared cache", "eager"),
    "mixture of experts": ("qwen3_moe", "one shared cache", "sdpa"),
    "alibi": ("bloom", "the model's own cache", "eager"),
    "state space": ("mamba2", "the model's own cache", "eager"),
    "linear attention": ("qwen3_5_text", "the model's own cache", "sdpa"),
    "a cache that is not exact for every length": ("bamba", "no cache", "sdpa"),
}


@pytest.fixture(scope="module")
def twin_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(model_type: str, **config: Any) -> Path:
        return write_twin(tmp_path_factory.mktemp(model_type), model_type, **config)

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_fastest_exact_way_is_chosen(twin_of: Callable[..., Path], case: str) -> None:
    model_type, name, attention = CASES[case]
    way = choose_decoding(twin_of(model_type), device="cpu")
    assert (NAMES[way.decoder], way.attention) == (name, attention)


def test_a_cache_that_loses_a_token_is_not_chosen(
    twin_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cache gets wrong is seen in the tokens that were decoded with it, and only there."""
    make = cache.make_cache

    def broken(num_rows: int, num_positions: int) -> Any:
        made = make(num_rows, num_positions)
        update = made.update

        def lose(key: Any, value: Any, *rest: Any, **more: Any) -> Any:
            return update(key * 0.5 if key.shape[2] == 1 else key, value, *rest, **more)

        made.update = lose
        return made

    monkeypatch.setattr(decode, "make_cache", broken)
    assert NAMES[choose_decoding(twin_of("qwen3"), device="cpu").decoder] == "the model's own cache"


def test_a_cache_that_ignores_its_window_is_not_chosen(
    twin_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer gets the mask of full attention."""
    start = decode.Decoder.__init__

    def forget(self: decode.Decoder, *given: Any, **more: Any) -> None:
        start(self, *given, **more)
        self._full_only = True

    twin = twin_of("mistral", sliding_window=4096)
    assert NAMES[choose_decoding(twin, device="cpu").decoder] == "one shared cache"
    monkeypatch.setattr(decode.Decoder, "__init__", forget)
    assert NAMES[choose_decoding(twin, device="cpu").decoder] == "the model's own cache"


def test_where_no_way_is_exact_the_engine_says_by_how_much(
    twin_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"cannot decode Qwen3ForCausalLM exactly: one shared cache .* nats"):
        choose_decoding(twin_of("qwen3"), device="cpu")


def test_logprobs_that_are_not_finite_are_not_exact(
    twin_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = choose._gaps
    monkeypatch.setattr(choose, "_gaps", lambda *given: [*gaps(*given), float("nan")])
    with pytest.raises(ValueError, match=r"differ by up to nan nats"):
        choose_decoding(twin_of("qwen3"), device="cpu")
