"""How engine `hf` decodes a model: the fastest way whose logprobs are those of a plain pass over the finished answer.

A cache that ignores a window, a padding that is attended to, or a soft cap that an attention drops answers without
any error, and a score of whole sequences does not see it. So the small twin of the model samples before the model
itself is loaded, and what it sampled is computed again, one answer at a time, without any cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atropos_exp.parts.engine.hf.decode import Decoder, Rows
from atropos_exp.parts.engine.hf.generate import GenerateDecoder, RecomputingDecoder

PROMPT_LENGTHS = (41, 23)  # tokens; longer than any window of a twin, and so that one is padded
NUM_TOKENS = 16
TOLERANCE = 1e-3  # nats, of each token; rounding gives about 1e-5


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One way to decode."""

    decoder: type[Decoder]
    attention: str  # transformers' name of it

    def __str__(self) -> str:
        return f"{NAMES[self.decoder]} and {self.attention} attention"


NAMES = {Decoder: "one shared cache", GenerateDecoder: "the model's own cache", RecomputingDecoder: "no cache"}
WAYS = [Decoding(decoder=decoder, attention=attention) for decoder in NAMES for attention in ("sdpa", "eager")]


def untried_decoding(folder: Path, *, trust_remote_code: bool = False) -> Decoding:
    """How to decode a model without a twin: with a shared cache only what has attention layers alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code
    ).get_text_config()
    kinds = set(vars(config).get("layer_types") or ["full_attention"])
    return WAYS[0] if kinds <= {"full_attention", "sliding_attention"} else WAYS[-1]


def choose_decoding(twin: Path, *, device: str, trust_remote_code: bool = False) -> Decoding:
    """The first of `WAYS` that is exact for the small model in the folder `twin`. Raises ValueError if none is."""
    import torch

    load = partial(load_model, twin, device=device, dtype="float32", trust_remote_code=trust_remote_code)
    plain = load(attention="eager")
    reasons = []
    for way in WAYS:
        try:
            with torch.inference_mode():
                model = load(attention=way.attention)
                gap = np.max(
                    list(_gaps(way.decoder(model, prefill_tokens=64, on_step=lambda: None), plain))
                )  # NaN stays
        except Exception as error:  # whatever an architecture raises for what it cannot do
            reasons.append(f"{way}: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
            continue
        if gap <= TOLERANCE:
            return way
        reasons.append(f"{way}: logprobs differ by up to {gap:.2g} nats from those of the finished answer")
    raise ValueError(f"engine=hf cannot decode {type(plain).__name__} exactly: " + "; ".join(reasons))


def load_model(
    folder: Path, *, device: str, dtype: str, attention: str = "sdpa", trust_remote_code: bool = False
) -> Any:
    """The model of a Hugging Face folder, for inference. Only files of the folder are read, and code from it is run
    only if it is trusted."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    model.generation_config = GenerationConfig()  # a request says all that there is to say
    return model.to(device).eval().requires_grad_(False)


def _gaps(decoder: Decoder, plain: Any) -> Iterator[float]:
    """By how much the logprobs of sampled and of scored tokens differ from those of `plain`, in nats."""
    import torch

    vocab_size = plain.config.get_text_config().vocab_size
    random = np.random.default_rng(0)
    prompts = [random.integers(2, vocab_size, length).astype(np.int32) for length in PROMPT_LENGTHS]
    rows = 2 * len(prompts)
    decoded = decoder.decode(
        Rows(
            prompts=prompts,
            prompt_N=np.repeat(np.arange(len(prompts)), 2),
            key_N=np.arange(rows, dtype=np.uint64),
            temperature_N=np.ones(rows, dtype=np.float32),
            top_p_N=np.ones(rows, dtype=np.float32),
            top_k_N=np.zeros(rows, dtype=np.int64),
            max_tokens_N=np.array([NUM_TOKENS, NUM_TOKENS // 2] * len(prompts)),
            stops=[()],
            stop_N=np.zeros(rows, dtype=np.int64),
        )
    )
    answers = []
    for row in range(rows):
        length, prompt = int(decoded.length_N[row]), prompts[row // 2]
        whole = np.concatenate([prompt, decoded.token_ids_NR[row, :length]])
        ids = torch.from_numpy(whole.astype(np.int64)).to(plain.device)[None]
        logits = plain(input_ids=ids, use_cache=False).logits[0, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0].cpu().numpy()
        answers.append((whole, logprobs))
        yield float(np.abs(logprobs[len(prompt) - 1 :] - decoded.logprobs_NR[row, :length]).max())
    scores = decoder.score([whole for whole, _ in answers], temperature=1.0)
    for score, (_, logprobs) in zip(scores, answers, strict=True):
        yield float(np.abs(score.logprobs - logprobs).max())
