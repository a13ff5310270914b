"""Draws against the distribution they must follow, and independence of the rows of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.parts.engine.hf.sampling import sample_tokens, support, uniforms
from atropos_exp.parts.engine.serving.seeds import row_keys

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draw(num_rows: int, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 3) -> Any:
    keys = row_keys(seed, np.zeros(num_rows, dtype=np.int64), np.arange(num_rows))
    return sample_tokens(
        LOGITS.expand(num_rows, -1),
        temperature_N=torch.full((num_rows,), temperature),
        top_p_N=torch.full((num_rows,), top_p),
        top_k_N=torch.full((num_rows,), top_k),
        uniform_N=torch.from_numpy(uniforms(keys, 1)[:, 0]),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    num_rows = 40_000
    tokens, logprobs = draw(num_rows, temperature=temperature)
    weights = np.exp(LOGITS.double().numpy() / temperature)
    expected = weights / weights.sum()
    counts = np.bincount(tokens.numpy(), minlength=6)
    chi_squared = float(((counts - num_rows * expected) ** 2 / (num_rows * expected)).sum())
    assert chi_squared < 20.52  # 99.9 % quantile of chi-squared with 5 degrees of freedom
    np.testing.assert_allclose(logprobs.numpy(), np.log(expected)[tokens.numpy()], atol=1e-6)


def test_draws_at_different_positions_are_independent() -> None:
    """Pairs of consecutive uniforms fill the 4 × 4 grid evenly, over samples, prompts and seeds."""
    for keys in (
        row_keys(0, np.zeros(4000, dtype=np.int64), np.arange(4000)),
        row_keys(0, np.arange(4000), np.zeros(4000, dtype=np.int64)),
        np.concatenate([row_keys(seed, np.zeros(1, dtype=np.int64), np.zeros(1, np.int64)) for seed in range(4000)]),
    ):
        assert len(set(keys.tolist())) == 4000
        pairs = uniforms(keys, 2)
        assert pairs.min() >= 0 and pairs.max() < 1
        cells = np.bincount((np.floor(pairs * 4) @ np.array([4, 1])).astype(int), minlength=16)
        assert float(((cells - 250) ** 2 / 250).sum()) < 37.7  # 99.9 %, 15 degrees of freedom
        neighbours = uniforms(keys, 1)[:, 0]
        assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.06


def test_prompt_and_sample_index_do_not_mix() -> None:
    one, two = np.array([1]), np.array([2])
    assert row_keys(5, one, two) != row_keys(5, two, one)


def test_top_k_and_top_p_supports() -> None:
    # softmax(LOGITS) = 0.5585 0.2055 0.1246 0.0756 0.0278 0.0038
    cases = {(1.0, 2): {0, 1}, (0.7, 0): {0, 1}, (0.8, 0): {0, 1, 2}, (0.5, 0): {0}, (0.95, 3): {0, 1, 2}}
    cases[(0.72, 3)] = {0, 1}  # of the renormalised three: 0.6285 0.2313 0.1402
    for (top_p, top_k), allowed in cases.items():
        tokens, logprobs = draw(3000, top_p=top_p, top_k=top_k)
        assert set(tokens.tolist()) == allowed, (top_p, top_k)
        full = torch.log_softmax(LOGITS, dim=-1)
        torch.testing.assert_close(logprobs, full[tokens])  # of the distribution before the filters


def test_support_keeps_the_best_token_and_its_equals() -> None:
    """Row by row: (weights, top_p, top_k, tokens left)."""
    rows: list[tuple[list[float], float, int, list[int]]] = [
        ([0.1, 0.6, 0.2, 0.1], 0.01, 0, [1]),
        ([0.1, 0.6, 0.2, 0.1], 1.0, 3, [0, 1, 2, 3]),  # the third and the fourth are equally likely
        ([0.1, 0.6, 0.2, 0.1], 0.85, 2, [1, 2]),  # 0.6 of 0.8 is 0.75
        ([0.1, 0.6, 0.2, 0.1], 0.7, 2, [1]),
        ([0.4, 0.0, 0.6, 0.0], 1.0, 3, [0, 2]),
        ([0.25, 0.25, 0.25, 0.25], 1.0, 4, [0, 1, 2, 3]),
    ]
    weights, top_p, top_k, _ = map(list, zip(*rows, strict=True))
    kept = support(torch.tensor(weights), torch.tensor(top_p), torch.tensor(top_k))
    assert [row.nonzero()[:, 0].tolist() for row in kept] == [left for *_, left in rows]


def test_temperature_zero_is_argmax_with_logprobs_at_one() -> None:
    tokens, logprobs = draw(5, temperature=0.0)
    assert tokens.tolist() == [0] * 5
    torch.testing.assert_close(logprobs, torch.log_softmax(LOGITS, dim=-1)[:1].expand(5))


def test_ends_of_the_unit_interval() -> None:
    """0 draws the first token that has weight, the largest uniform the last."""
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]] * 2)
    tokens, _ = sample_tokens(
        logits,
        temperature_N=torch.ones(2),
        top_p_N=torch.ones(2),
        top_k_N=torch.zeros(2),
        uniform_N=torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64),
    )
    assert tokens.tolist() == [1, 2]


def test_a_row_draws_alike_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 30, generator=generator)
    keys = row_keys(1, np.zeros(40, dtype=np.int64), np.arange(40))
    params = {
        "temperature_N": torch.tensor([1.0, 0.7, 0.0, 1.3] * 10),
        "top_p_N": torch.tensor([1.0, 0.8, 1.0, 1.0, 0.5] * 8),
        "top_k_N": torch.tensor([0, 5] * 20),
        "uniform_N": torch.from_numpy(uniforms(keys, 1)[:, 0]),
    }
    together, logprobs = sample_tokens(logits, **params)
    for row in range(40):
        alone, logprob = sample_tokens(logits[row : row + 1], **{k: v[row : row + 1] for k, v in params.items()})
        assert alone[0] == together[row] and logprob[0] == logprobs[row]
    monkeypatch.setattr("atropos_exp.parts.engine.hf.sampling.MAX_CDF_ELEMENTS", 7 * 30)  # 7 rows at a time
    in_parts, _ = sample_tokens(logits, **params)
    assert in_parts.tolist() == together.tolist()
