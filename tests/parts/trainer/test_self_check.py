"""The proof at start: it accepts what is right and finds what would be silently wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention

from atropos_exp.errors import UserError
from tests.helpers.trainer_cases import Model, full_weights, make_batch, write_model


@pytest.fixture
def leaky() -> str:
    """An attention that is causal over the whole packed row: each sequence sees the ones before it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(_: Any, query: Any, key: Any, value: Any, *__: Any, scaling: float, **___: Any) -> tuple[Any, None]:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("leaky", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("leaky", lambda *_, **__: None)
    return "leaky"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_attention_that_leaks_between_sequences_is_refused(start: Any, leaky: str, dtype: str) -> None:
    with pytest.raises(
        UserError, match=r"cannot be trained with trainer.layout=packed and leaky attention .* differ by .* nats"
    ):
        start(model=Model(attn_implementation=leaky, dtype=dtype))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attentions_of_transformers_train_the_same(start: Any, attention: str) -> None:
    ours, theirs = start(), start(model=Model(attn_implementation=attention))
    batch = make_batch()
    assert theirs.update(batch).loss == pytest.approx(ours.update(batch).loss, abs=1e-6)
    weights = full_weights(ours)
    for name, tensor in theirs.parameters():
        torch.testing.assert_close(tensor, weights[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_as_that(start: Any, tmp_path: Path, value: float) -> None:
    folder = write_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"NaN or infinity in 1 of its weights, the first is model.layers.1.mlp.up_proj"
    ):
        start(folder)
