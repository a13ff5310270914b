"""Batched decoding with one model: each distinct prompt is prefilled once, then every step adds a token to each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from atropos_exp.parts.engine.hf.cache import make_cache
from atropos_exp.parts.engine.hf.sampling import sample_tokens, uniforms
from atropos_exp.types import Floats, Mask, TokenIds, TokenScores

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOGITS = 1 << 27  # elements of one scoring batch in float32: 512 MiB
COMPACT_BELOW = 0.75  # of the rows still running: move these together, so that finished ones cost nothing


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """N sequences to decode together. Rows may share a prompt."""

    prompts: Sequence[TokenIds]  # the distinct ones
    prompt_N: NDArray[np.int64]  # index into `prompts`
    key_N: NDArray[np.uint64]  # of the row's randomness
    temperature_N: Floats
    top_p_N: Floats
    top_k_N: NDArray[np.int64]
    max_tokens_N: NDArray[np.int64]
    stops: Sequence[tuple[int, ...]]  # the distinct sets of stop tokens
    stop_N: NDArray[np.int64]  # index into `stops`


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decoded:
    """The completions of N rows. R is the largest of their limits; entries from `length_N` on mean nothing."""

    token_ids_NR: NDArray[np.int32]
    logprobs_NR: Floats
    length_N: NDArray[np.int64]
    stopped_N: Mask


class Decoder:
    """Samples from a model and scores sequences with it.

        decoder = Decoder(model, prefill_tokens=1024, on_step=lambda: None)
        decoder.score([np.array([1, 2, 3], dtype=np.int32)], temperature=1.0)[0].logprobs  # 2 numbers

    It owns no weights: it reads `model` at every call and keeps no keys, values or tokens between calls.
    """

    def __init__(self, model: Any, *, prefill_tokens: int, on_step: Callable[[], None]) -> None:
        """`prefill_tokens` bounds the tokens of one forward pass over prompts. `on_step` is called between forward
        passes."""
        config = model.config.get_text_config()
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._on_step = on_step
        self._vocab_size = config.vocab_size
        # A ready 4D mask spares transformers' mask building, but it cannot tell sliding layers apart.
        kinds = set(vars(config).get("layer_types") or ["full_attention"])
        self._full_only = kinds == {"full_attention"} and not vars(config).get("sliding_window")

    def decode(self, rows: Rows) -> Decoded:
        """Sample every row up to its stop token or its limit."""
        import torch

        device = self._model.device
        num_rows, room = len(rows.prompt_N), int(rows.max_tokens_N.max())
        token_ids_NR = np.zeros((num_rows, room), dtype=np.int32)
        logprobs_NR = np.zeros((num_rows, room), dtype=np.float32)
        length_N = np.zeros(num_rows, dtype=np.int64)
        stopped_N = np.zeros(num_rows, dtype=np.bool_)

        def on_device(values: NDArray[Any]) -> Tensor:
            tensor: Tensor = torch.from_numpy(values).to(device)
            return tensor

        with torch.inference_mode():
            cache, logits_UV, pad_U = self._prefill(rows.prompts)
            prompt_M = on_device(rows.prompt_N)  # M: rows still in the batch
            logits_MV = logits_UV.index_select(0, prompt_M)
            pad_M = pad_U.index_select(0, prompt_M)
            padded = cache.get_seq_length()
            has_padding = any(len(prompt) < padded for prompt in rows.prompts)
            cache.take(prompt_M, padded + room - 1)  # the last token is never fed back

            row_M = np.arange(num_rows)
            alive_M = np.ones(num_rows, dtype=np.bool_)
            uniform_MR = on_device(uniforms(rows.key_N, room))
            temperature_M, top_p_M, top_k_M = (
                on_device(values) for values in (rows.temperature_N, rows.top_p_N, rows.top_k_N)
            )
            stops_KV = self._stop_table(rows.stops, logits_UV.shape[1])
            stop_M = on_device(rows.stop_N)
            for step in range(room):
                tokens_M, step_logprobs_M = sample_tokens(
                    logits_MV,
                    temperature_N=temperature_M,
                    top_p_N=top_p_M,
                    top_k_N=top_k_M,
                    uniform_N=uniform_MR[:, step],
                )
                running = row_M[alive_M]
                token_ids_NR[running, step] = tokens_M.cpu().numpy()[alive_M]
                logprobs_NR[running, step] = step_logprobs_M.cpu().numpy()[alive_M]
                length_N[running] = step + 1
                hit_M = stops_KV[stop_M, tokens_M].cpu().numpy()
                stopped_N[running] = hit_M[alive_M]
                alive_M &= ~hit_M & (rows.max_tokens_N[row_M] > step + 1)
                if not alive_M.any():
                    break
                self._on_step()
                if alive_M.sum() <= COMPACT_BELOW * len(alive_M):
                    keep_M = on_device(np.flatnonzero(alive_M))
                    row_M, alive_M = row_M[alive_M], alive_M[alive_M]
                    cache.take(keep_M, padded + int(rows.max_tokens_N[row_M].max()) - 1)
                    tokens_M, pad_M, uniform_MR, temperature_M, top_p_M, top_k_M, stop_M = (
                        values.index_select(0, keep_M)
                        for values in (tokens_M, pad_M, uniform_MR, temperature_M, top_p_M, top_k_M, stop_M)
                    )
                logits_MV = self._next_logits(tokens_M, pad_M if has_padding else None, padded + step, cache)
        return Decoded(token_ids_NR=token_ids_NR, logprobs_NR=logprobs_NR, length_N=length_N, stopped_N=stopped_N)

    def score(self, sequences: Sequence[TokenIds], *, temperature: float, num_top: int = 0) -> list[TokenScores]:
        """The logprobs of each sequence under softmax(logits / temperature), in nats, and the `num_top` likeliest
        tokens (at most the vocabulary) at each of its places."""
        import torch

        scored: dict[int, TokenScores] = {}
        order = sorted(range(len(sequences)), key=lambda index: (len(sequences[index]), index))
        tokens = max(1, min(self._prefill_tokens, MAX_LOGITS // self._vocab_size))
        with torch.inference_mode():
            for batch in _by_padded_size([len(sequences[index]) for index in order], tokens):
                chosen = [order[place] for place in batch]
                longest = max(len(sequences[index]) for index in chosen)
                token_ids_NT = np.zeros((len(chosen), longest), dtype=np.int64)
                for row, index in enumerate(chosen):
                    token_ids_NT[row, : len(sequences[index])] = sequences[index]
                # Padded on the right, where a causal model cannot see it: no mask needed.
                input_ids = torch.from_numpy(token_ids_NT).to(self._model.device)
                logits_NTV = self._model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
                logits_NTV /= temperature if temperature > 0 else 1.0
                logprobs_NTV = torch.log_softmax(logits_NTV, dim=-1)
                logprobs_NT = logprobs_NTV.gather(2, input_ids[:, 1:, None])[:, :, 0]
                top_NTK = logprobs_NTV.topk(min(num_top, logprobs_NTV.shape[2]), dim=-1)
                for row, index in enumerate(chosen):
                    places = len(sequences[index]) - 1
                    scored[index] = TokenScores(
                        logprobs=logprobs_NT[row, :places].cpu().numpy(),
                        top_token_ids=top_NTK.indices[row, :places].cpu().numpy().astype(np.int32),
                        top_logprobs=top_NTK.values[row, :places].cpu().numpy(),
                    )
                self._on_step()
        return [scored[index] for index in range(len(sequences))]

    def _prefill(self, prompts: Sequence[TokenIds]) -> tuple[Any, Tensor, Tensor]:
        """The cache of all prompts, padded on the left to the longest; logits [U, V] after each; its padding [U]."""
        import torch

        device = self._model.device
        longest = max(len(prompt) for prompt in prompts)
        caches, logits, pads = [], [], []
        for batch in _by_padded_size([longest] * len(prompts), self._prefill_tokens):
            token_ids_UP = np.zeros((len(batch), longest), dtype=np.int64)
            pad_U = np.array([longest - len(prompts[index]) for index in batch], dtype=np.int64)
            for row, index in enumerate(batch):
                token_ids_UP[row, pad_U[row] :] = prompts[index]
            mask_UP = np.arange(longest)[None, :] >= pad_U[:, None]
            position_UP = np.maximum(np.arange(longest)[None, :] - pad_U[:, None], 0)
            cache = make_cache(len(batch), longest)
            output = self._model(
                input_ids=torch.from_numpy(token_ids_UP).to(device),
                attention_mask=torch.from_numpy(mask_UP).to(device) if pad_U.any() else None,
                position_ids=torch.from_numpy(position_UP).to(device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            caches.append(cache)
            logits.append(output.logits[:, -1])
            pads.append(torch.from_numpy(pad_U).to(device))
            self._on_step()
        caches[0].append_rows(caches[1:])
        return caches[0], torch.cat(logits), torch.cat(pads)

    def _next_logits(self, tokens_M: Tensor, pad_M: Tensor | None, num_past: int, cache: Any) -> Tensor:
        """Feed one token per row; logits [M, V] of the next. Without padding no mask is needed."""
        import torch

        mask = None
        position_ids_M1 = torch.full_like(tokens_M[:, None], num_past)
        if pad_M is not None:
            position_ids_M1 -= pad_M[:, None]
            mask = torch.arange(num_past + 1, device=pad_M.device)[None, :] >= pad_M[:, None]
            mask = mask[:, None, None, :] if self._full_only else mask
        output = self._model(
            input_ids=tokens_M[:, None],
            attention_mask=mask,
            position_ids=position_ids_M1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _stop_table(self, stops: Sequence[tuple[int, ...]], vocab_size: int) -> Tensor:
        """Bool [K, V]: whether a token ends a row of stop set k."""
        import torch

        table_KV = torch.zeros(len(stops), vocab_size, dtype=torch.bool)
        for index, stop in enumerate(stops):
            table_KV[index, list(stop)] = True
        return table_KV.to(self._model.device)


def _by_padded_size(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Consecutive runs of items (sorted by length) whose padded size stays within `max_tokens`; at least one each."""
    batches = []
    start = 0
    for index in range(1, len(lengths) + 1):
        if index == len(lengths) or (index + 1 - start) * lengths[index] > max_tokens:
            batches.append(range(start, index))
            start = index
    return batches
