"""One update against the same update by hand, with plain transformers code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer import logprob_head
from atropos_exp.types import TrainBatch
from tests.helpers.trainer_cases import (
    VOCAB,
    Lora,
    Model,
    WeightedLoss,
    full_weights,
    make_batch,
    plain_logprobs,
    plain_loss,
    plain_model,
    split,
    weights_after_step,
)


def assert_weights(actual: dict[str, Any], expected: dict[str, Any], atol: float = 2e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=atol, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("temperature", "cap"), [(1.0, 2.0), (0.7, None)])
def test_loss_and_gradient_are_those_of_plain_code(
    start: Any, model_folder: Path, untied_folder: Path, tied: bool, temperature: float, cap: float | None
) -> None:
    folder = model_folder if tied else untied_folder
    batch = make_batch(temperature=temperature)
    model = plain_model(folder)
    loss = plain_loss(model, batch, cap=cap)
    expected = weights_after_step(model, loss)
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))

    trainer = start(folder, importance_cap=cap)
    stats = trainer.update(batch)

    assert stats.loss == pytest.approx(loss.item(), abs=2e-6)
    assert stats.policy_loss == pytest.approx(loss.item(), abs=2e-6)
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
    assert_weights(full_weights(trainer), expected)
    assert (stats.num_tokens, stats.num_trained_tokens) == (int(batch.lengths_N.sum()), batch.num_trained_tokens)
    assert not stats.skipped


def test_statistics_by_hand(start: Any, model_folder: Path) -> None:
    batch = make_batch(behaviour="some", temperature=0.9)
    model = plain_model(model_folder)
    gaps, fresh_gaps, entropies = [], [], []
    facts = zip(split(batch), batch.has_behaviour_N.tolist(), batch.fresh_N.tolist(), strict=True)
    for sequence, known, fresh in facts:
        ids, trained = sequence["token_ids"], sequence["trained"][1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double() / 0.9
            probabilities = torch.softmax(logits, -1)
            entropies += (-(probabilities * probabilities.log()).sum(-1))[trained].tolist()
            if known:
                ours = plain_logprobs(model, ids, 0.9)[trained].double()
                gaps += (ours - sequence["behaviour_logprobs"][1:][trained]).tolist()
                fresh_gaps += gaps[-len(ours) :] if fresh else []
    gap = np.array(gaps)
    stats = start(importance_cap=1.5).update(batch)
    assert stats.entropy == pytest.approx(np.mean(entropies), rel=1e-5)
    assert stats.mismatch_kl == pytest.approx(np.mean(np.exp(gap) - 1 - gap), rel=1e-4)
    assert stats.logprob_gap_mean == pytest.approx(np.abs(gap).mean(), rel=1e-5)
    assert stats.logprob_gap_max == pytest.approx(np.abs(gap).max(), rel=1e-5)
    assert 0 < len(fresh_gaps) < len(gaps) and stats.num_fresh_tokens == len(fresh_gaps)
    assert stats.fresh_gap_mean == pytest.approx(np.abs(fresh_gaps).mean(), rel=1e-5)
    assert stats.importance_truncated_fraction == pytest.approx(np.mean(np.exp(gap) > 1.5))


def test_without_behaviour_logprobs_nothing_is_weighted(start: Any) -> None:
    loss = WeightedLoss()
    stats = start(loss=loss).update(make_batch(behaviour="none"))
    assert loss.calls[0]["importance_NR"] is None
    assert math.isnan(stats.mismatch_kl) and math.isnan(stats.logprob_gap_max)
    assert math.isnan(stats.fresh_gap_mean) and stats.num_fresh_tokens == 0
    assert stats.importance_truncated_fraction == 0


@pytest.mark.parametrize("changes", [{"max_tokens_per_micro_batch": 13}, {"max_tokens_per_micro_batch": 40}])
def test_gradient_does_not_depend_on_micro_batches(start: Any, changes: dict[str, int]) -> None:
    whole, parts = start(), start(**changes)
    batch = make_batch()
    one, many = whole.update(batch), parts.update(batch)
    assert one.num_micro_batches == 1
    assert many.num_micro_batches >= int(batch.lengths_N.sum()) / changes["max_tokens_per_micro_batch"]
    for name in ("loss", "grad_norm", "entropy", "mismatch_kl", "logprob_gap_mean", "logprob_gap_max"):
        assert getattr(many, name) == pytest.approx(getattr(one, name), rel=1e-5), name
    assert_weights(full_weights(parts), full_weights(whole), atol=1e-6)


def test_chunked_head_and_gradient_checkpointing_change_nothing(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(num_sequences=40)
    plain = start()
    expected = plain.update(batch)
    monkeypatch.setattr(logprob_head, "MAX_CHUNK_LOGITS", 64 * VOCAB)  # 64 tokens a chunk
    trainer = start(model=Model(gradient_checkpointing=True))
    assert batch.num_trained_tokens > 2 * 64
    assert trainer.update(batch).loss == pytest.approx(expected.loss, abs=1e-6)
    assert_weights(full_weights(trainer), full_weights(plain), atol=1e-6)


def test_rows_hold_trained_tokens_left_aligned(start: Any) -> None:
    loss = WeightedLoss()
    batch = make_batch()
    start(loss=loss).update(batch)
    call = loss.calls[0]
    for row, sequence in enumerate(split(batch)):
        expected = sequence["advantages"][sequence["trained"]]
        assert call["mask_NR"][row].tolist() == [True] * len(expected) + [False] * (
            call["mask_NR"].shape[1] - len(expected)
        )
        torch.testing.assert_close(call["advantages_NR"][row][: len(expected)], expected)
    assert (call["num_tokens"], call["num_sequences"], call["dp_size"]) == (batch.num_trained_tokens, 12, 1)


def test_only_a_shifted_loss_can_learn_a_bigram(start: Any) -> None:
    """The next token is a fixed permutation of the current one; the token itself says nothing about itself."""
    permutation = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))

    def chains(first: torch.Tensor, length: int) -> torch.Tensor:
        tokens = [first]
        for _ in range(length - 1):
            tokens.append(permutation[tokens[-1]])
        return torch.stack(tokens, 1)

    token_ids = chains(torch.arange(VOCAB), 6)
    trained = torch.zeros_like(token_ids, dtype=torch.bool)
    trained[:, 1:] = True
    no_N = torch.zeros(VOCAB, dtype=torch.bool)
    batch = TrainBatch(
        token_ids_S=token_ids.reshape(-1),
        lengths_N=torch.full((VOCAB,), 6),
        trained_S=trained.reshape(-1),
        advantages_S=trained.float().reshape(-1),
        behaviour_logprobs_S=torch.zeros(VOCAB * 6),
        has_behaviour_N=no_N,
        fresh_N=no_N,
        reference_logprobs_S=torch.zeros(VOCAB * 6),
        has_reference_N=no_N,
        supervised_N=no_N,
        temperature_N=torch.ones(VOCAB),
        num_trained_tokens=int(trained.sum()),
    )
    trainer = start(learning_rate=3e-3, adam_epsilon=1e-8, max_grad_norm=1.0)
    for _ in range(40):
        trainer.update(batch)
    scores = trainer.logprobs([ids.numpy() for ids in chains(torch.arange(5), 9)], temperature=1.0)
    assert np.mean(np.concatenate(scores)) > math.log(0.7)  # guessing: log(1 / 48)


def test_old_logprobs_are_those_before_the_update(start: Any, model_folder: Path) -> None:
    loss = WeightedLoss()
    batch = make_batch()
    trainer = start(loss=loss, num_mini_batches=2, learning_rate=0.1)
    trainer.update(batch)
    first, second = loss.calls
    assert [len(call["mask_NR"]) for call in loss.calls] == [6, 6]
    assert sum(call["num_tokens"] for call in loss.calls) == batch.num_trained_tokens
    torch.testing.assert_close(first["logprobs_NR"], first["old_logprobs_NR"], atol=1e-6, rtol=0)
    assert (second["logprobs_NR"] - second["old_logprobs_NR"]).abs().max() > 1e-2
    model = plain_model(model_folder)
    for row, sequence in enumerate(split(batch)[6:]):
        expected = plain_logprobs(model, sequence["token_ids"], 1.0)[sequence["trained"][1:]]
        torch.testing.assert_close(second["old_logprobs_NR"][row][: len(expected)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_reference_model_keeps_the_first_weights(start: Any, model_folder: Path, lora_rank: int) -> None:
    loss = WeightedLoss(kl_coef=0.5)
    batch = make_batch(behaviour="none")
    trainer = start(loss=loss, learning_rate=0.3, model=Model(lora=Lora(rank=lora_rank)))
    first = trainer.update(batch)
    for _ in range(2):
        last = trainer.update(batch)
    assert first.reference_kl == pytest.approx(0, abs=1e-9)
    assert last.reference_kl > 1e-4
    assert last.loss == pytest.approx(last.policy_loss + 0.5 * last.reference_kl, rel=1e-5)
    model = plain_model(model_folder)
    for row, sequence in enumerate(split(batch)):
        expected = plain_logprobs(model, sequence["token_ids"], 1.0)[sequence["trained"][1:]]
        torch.testing.assert_close(
            loss.calls[-1]["reference_logprobs_NR"][row][: len(expected)], expected, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_plain_code(start: Any, model_folder: Path, temperature: float) -> None:
    sequences = [part["token_ids"].numpy().astype(np.int32) for part in split(make_batch())]
    sequences.insert(3, np.array([5], dtype=np.int32))  # nothing to score
    model = plain_model(model_folder)
    scores = start(max_tokens_per_micro_batch=30).logprobs(sequences, temperature=temperature)
    assert len(scores) == len(sequences) and len(scores[3]) == 0
    for ids, score in zip(sequences, scores, strict=True):
        assert score.dtype == np.float32
        with torch.no_grad():
            expected = plain_logprobs(model, torch.from_numpy(ids.astype(np.int64)), temperature)
        np.testing.assert_allclose(score, expected.numpy(), atol=1e-5)


def test_bfloat16_computes_in_half_and_keeps_float32_masters(start: Any, model_folder: Path) -> None:
    trainer = start(model=Model(dtype="bfloat16"), learning_rate=1e-4, adam_epsilon=1e-8)
    before = full_weights(trainer)
    batch = make_batch()
    stats = trainer.update(batch)
    exact = plain_loss(plain_model(model_folder), batch).item()
    assert stats.loss == pytest.approx(exact, abs=0.05) and stats.loss != pytest.approx(exact, abs=1e-6)
    after = full_weights(trainer)
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert (tensor - before[name]).abs().max() <= 1.01e-4  # too small for bfloat16 weights of this size
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_sequence_longer_than_the_budget_is_refused(start: Any) -> None:
    with pytest.raises(UserError, match=r"13 tokens does not fit .* 12 tokens.*max_tokens_per_micro_batch"):
        start(max_tokens_per_micro_batch=12).update(make_batch())


def test_a_trained_first_token_is_refused(start: Any) -> None:
    batch = make_batch()
    batch.trained_S[0] = True
    with pytest.raises(ValueError, match="first token"):
        start().update(batch)
