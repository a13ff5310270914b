"""Decoding by transformers' own `generate`: slower than `decode.py`, and right for every model that it can decode.

Models with recurrent states, convolutions or caches of their own fit no cache of ours. Rows whose prompts have the
same length are decoded together, so that nothing is padded; each row's prompt is computed by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_exp.parts.engine.hf.decode import Decoded, Decoder, Rows
from atropos_exp.parts.engine.hf.sampling import sample_tokens, uniforms

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class GenerateDecoder(Decoder):
    """A `Decoder` that samples with `model.generate`, whose cache is the model's own."""

    use_cache = True

    def decode(self, rows: Rows) -> Decoded:
        """Sample every row up to its stop token or its limit."""
        num_rows, room = len(rows.prompt_N), int(rows.max_tokens_N.max())
        decoded = Decoded(
            token_ids_NR=np.zeros((num_rows, room), dtype=np.int32),
            logprobs_NR=np.zeros((num_rows, room), dtype=np.float32),
            length_N=np.zeros(num_rows, dtype=np.int64),
            stopped_N=np.zeros(num_rows, dtype=np.bool_),
        )
        length_N = np.array([len(rows.prompts[index]) for index in rows.prompt_N])
        for length in np.unique(length_N):
            chosen = np.flatnonzero(length_N == length)
            for part in np.array_split(chosen, -(-len(chosen) * int(length) // self._prefill_tokens)):
                self._generate(rows, part, decoded)
        return decoded

    def _generate(self, rows: Rows, chosen: NDArray[np.int64], decoded: Decoded) -> None:
        """Decode the rows `chosen`, whose prompts have one length, into `decoded`."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        def on_device(values: NDArray[Any]) -> Tensor:
            tensor: Tensor = torch.from_numpy(values[chosen]).to(self._model.device)
            return tensor

        prompts = np.stack([rows.prompts[index] for index in rows.prompt_N[chosen]]).astype(np.int64)
        room = int(rows.max_tokens_N[chosen].max())
        uniform_NR = torch.from_numpy(uniforms(rows.key_N[chosen], room)).to(self._model.device)
        temperature_N, top_p_N, top_k_N = (
            on_device(rows.temperature_N),
            on_device(rows.top_p_N),
            on_device(rows.top_k_N),
        )
        stop_N, limit_N = on_device(rows.stop_N), on_device(rows.max_tokens_N)
        stops_KV = self._stop_table(rows.stops, self._vocab_size)
        done_N = torch.zeros(len(chosen), dtype=torch.bool, device=self._model.device)
        tokens: list[Tensor] = []

        def choose(_: Tensor, logits_NV: Tensor) -> Tensor:
            """Draw the next tokens ourselves: all others are made impossible."""
            step = len(tokens)
            tokens_N, logprobs_N = sample_tokens(
                logits_NV,
                temperature_N=temperature_N,
                top_p_N=top_p_N,
                top_k_N=top_k_N,
                uniform_N=uniform_NR[:, step],
            )
            hit_N = stops_KV[stop_N, tokens_N]
            alive_N = (~done_N).cpu().numpy()
            running = chosen[alive_N]
            decoded.token_ids_NR[running, step] = tokens_N.cpu().numpy()[alive_N]
            decoded.logprobs_NR[running, step] = logprobs_N.cpu().numpy()[alive_N]
            decoded.length_N[running] = step + 1
            decoded.stopped_N[running] = hit_N.cpu().numpy()[alive_N]
            done_N.logical_or_(hit_N | (limit_N <= step + 1))
            tokens.append(tokens_N)
            self._on_step()
            return torch.full_like(logits_NV, -torch.inf).scatter_(1, tokens_N[:, None], 0.0)

        def is_done(*_: Any, **__: Any) -> Tensor:
            return done_N

        with torch.inference_mode():
            self._model.generate(
                input_ids=torch.from_numpy(prompts).to(self._model.device),
                attention_mask=torch.ones(prompts.shape, dtype=torch.int64, device=self._model.device),
                generation_config=GenerationConfig(
                    max_new_tokens=room, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=self.use_cache
                ),
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([is_done]),
            )


class RecomputingDecoder(GenerateDecoder):
    """Without any cache: every token costs a pass over the whole sequence, for models whose own cache is not exact."""

    use_cache = False
