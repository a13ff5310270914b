"""The decode loop against plain transformers: same tokens, same logprobs, whatever shares the batch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.parts.engine.hf.decode import Decoded, Decoder, Rows
from atropos_exp.parts.engine.serving.seeds import row_keys
from atropos_exp.types import TokenIds
from tests.helpers.random_models import VOCAB, completion_logprobs, greedy_tokens, random_model, random_prompts

MAX_TOKENS = 9


def rows_of(prompts: list[TokenIds], num_samples: int, **columns: Any) -> Rows:
    """`num_samples` rows of each prompt; `columns` override one value for all rows or give one per row."""
    count = len(prompts) * num_samples
    prompt_N = np.repeat(np.arange(len(prompts)), num_samples)

    def column(name: str, default: Any, dtype: Any) -> Any:
        return np.broadcast_to(np.array(columns.get(name, default), dtype=dtype), count).copy()

    return Rows(
        prompts=prompts,
        prompt_N=prompt_N,
        key_N=row_keys(columns.get("seed", 0), prompt_N, np.tile(np.arange(num_samples), len(prompts))),
        temperature_N=column("temperature", 1.0, np.float32),
        top_p_N=column("top_p", 1.0, np.float32),
        top_k_N=column("top_k", 0, np.int64),
        max_tokens_N=column("max_tokens", MAX_TOKENS, np.int64),
        stops=columns.get("stops", [()]),
        stop_N=column("stop", 0, np.int64),
    )


def completions(decoded: Decoded) -> list[list[int]]:
    pairs = zip(decoded.token_ids_NR, decoded.length_N, strict=True)
    return [tokens[:length].tolist() for tokens, length in pairs]


@pytest.fixture
def decoder(model: Any) -> Decoder:
    return Decoder(model, prefill_tokens=64, on_step=lambda: None)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral", "untied"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_plain_forward_pass(kind: str, temperature: float) -> None:
    """Prompts of different lengths (left padding), several rows a prompt, rows that end early (compaction).
    `mistral` has a sliding window shorter than the prompts."""
    tied = kind != "untied"
    model = random_model(tied=tied, kind="qwen2" if kind == "untied" else kind)
    prompts = random_prompts([3, 3, 7, 11])
    decoder = Decoder(model, prefill_tokens=16, on_step=lambda: None)
    rows = rows_of(prompts, 4, temperature=temperature, stops=[(1, 2, 3, 4, 5, 6)])
    decoded = decoder.decode(rows)
    assert len(set(decoded.length_N.tolist())) > 2
    exact = copy.deepcopy(model).double()  # a float32 reference has rounding errors of its own, of the same size
    for row, tokens in enumerate(completions(decoded)):
        expected = completion_logprobs(exact, prompts[row // 4], np.array(tokens, dtype=np.int32), temperature)
        np.testing.assert_allclose(decoded.logprobs_NR[row, : len(tokens)], expected, atol=1e-5)


def test_greedy_equals_transformers_generate(model: Any, decoder: Decoder) -> None:
    prompts = random_prompts([2, 5, 5, 9], seed=4)
    decoded = decoder.decode(rows_of(prompts, 1, temperature=0.0))
    for prompt, tokens in zip(prompts, completions(decoded), strict=True):
        assert tokens == greedy_tokens(model, prompt, MAX_TOKENS)


def test_stop_tokens_end_a_row_and_are_part_of_it(decoder: Decoder) -> None:
    prompts = random_prompts([4])
    free = completions(decoder.decode(rows_of(prompts, 32)))
    stop = (7, 30)
    stopped = decoder.decode(rows_of(prompts, 32, stops=[(), stop], stop=1))
    ended = 0
    for unbounded, tokens, flag in zip(free, completions(stopped), stopped.stopped_N, strict=True):
        place = next((index for index, token in enumerate(unbounded) if token in stop), None)
        assert flag == (place is not None)
        assert tokens == (unbounded if place is None else unbounded[: place + 1])
        ended += flag
    assert 0 < ended < 32


def test_each_row_has_its_own_limit(decoder: Decoder) -> None:
    limits = [1, 9, 4, 1, 2]
    decoded = decoder.decode(rows_of(random_prompts([6]), 5, max_tokens=limits))
    assert decoded.length_N.tolist() == limits
    assert not decoded.stopped_N.any()
    free = completions(decoder.decode(rows_of(random_prompts([6]), 5)))
    assert completions(decoded) == [tokens[:limit] for tokens, limit in zip(free, limits, strict=True)]


def test_company_does_not_change_a_row(decoder: Decoder) -> None:
    """The same rows alone, among longer prompts (more padding) and among filtered and greedy rows."""
    mine, others = random_prompts([4, 6]), random_prompts([1, 13, 13], seed=9)
    alone = completions(decoder.decode(rows_of(mine, 8)))
    rows = rows_of([*mine, *others], 8, top_p=[1.0] * 16 + [0.5] * 24, temperature=[1.0] * 32 + [0.0] * 8)
    assert completions(decoder.decode(rows))[:16] == alone
    assert len({tuple(tokens) for tokens in alone}) > 12  # and samples of a prompt differ


def test_probe_points_come_between_forward_passes(model: Any) -> None:
    calls = []
    decoder = Decoder(model, prefill_tokens=8, on_step=lambda: calls.append(1))
    decoder.decode(rows_of(random_prompts([4, 4, 4]), 1))
    assert len(calls) == 2 + MAX_TOKENS - 1  # two prefills (two prompts, one prompt), one per step but the last


def test_score_equals_a_plain_forward_pass(model: Any) -> None:
    sequences = random_prompts([5, 2, 17, 9, 1, 9], seed=2)
    for prefill_tokens in (8, 40, 4096):
        decoder = Decoder(model, prefill_tokens=prefill_tokens, on_step=lambda: None)
        for temperature in (1.0, 0.7):
            for sequence, scored in zip(sequences, decoder.score(sequences, temperature=temperature), strict=True):
                expected = completion_logprobs(model, sequence[:1], sequence[1:], temperature)
                assert scored.logprobs.dtype == np.float32
                np.testing.assert_allclose(scored.logprobs, expected, atol=1e-5)


def test_the_likeliest_tokens_of_every_place(model: Any) -> None:

    sequences = random_prompts([5, 1, 9], seed=2)
    decoder = Decoder(model, prefill_tokens=4096, on_step=lambda: None)
    for sequence, scored in zip(sequences, decoder.score(sequences, temperature=0.7, num_top=4), strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(sequence[None].astype(np.int64))).logits[0, :-1].double() / 0.7
        best = torch.log_softmax(logits, dim=-1).sort(dim=-1, descending=True)
        assert scored.top_token_ids.dtype == np.int32 and scored.top_logprobs.dtype == np.float32
        assert scored.top_token_ids.tolist() == best.indices[:, :4].tolist()
        np.testing.assert_allclose(scored.top_logprobs, best.values[:, :4].numpy(), atol=1e-5)
        (plain,) = decoder.score([sequence], temperature=0.7)
        np.testing.assert_allclose(scored.logprobs, plain.logprobs, atol=1e-5)  # alone and among others
    (everything,) = decoder.score(sequences[:1], temperature=1.0, num_top=10**6)
    assert everything.top_token_ids.shape == (4, VOCAB)
