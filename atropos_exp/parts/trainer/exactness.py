"""Which layout a model trains with: the fastest one that gives the logprobs and gradients of each sequence alone.

An architecture whose layers let packed sequences see each other, drop a mask that they do not know, or choose a rope
factor by the longest sequence trains without any error on wrong numbers. So the small twin of the model
(`parts/model/twin.py`) is tried in float32 before anything starts, as the trainer will run it, and compared with plain
transformers in evaluation mode, one sequence at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.attention import NAME
from atropos_exp.parts.trainer.layouts import Layout, model_input
from atropos_exp.parts.trainer.logprob_head import LogprobHead, LogprobRequest
from atropos_exp.parts.trainer.noise import evaluation_mode, override, without_noise
from atropos_exp.parts.trainer.packing import Kind, MicroBatch, make_micro_batch, scoring_batch

LENGTHS = (50, 37, 23)  # two longer and one shorter than any window, chunk or original rope length of a twin
TOLERANCE = 1e-4  # nats, of each token; rounding gives about 1e-6
GRADIENT_TOLERANCE = 1e-3  # of the norm of each weight's gradient
ROUNDING = 2.0  # times what plain transformers in 16 bits differs from float32
CONTEXT = 1e-2  # of the norm of all gradients is added to that, for weights that have hardly any


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layout to train with."""

    layout: Layout
    rejected: dict[Layout, str] = field(default_factory=dict)  # faster ones, and why not
    without_gradient: tuple[str, ...] = ()  # weights that no text trains

    def __str__(self) -> str:
        because = "".join(f"; not {layout}: {reason}" for layout, reason in self.rejected.items())
        return f"{self.layout}{because}"


def candidates(*, kind: str, attention: str, sp_size: int) -> list[Layout]:
    """What may be tried for `trainer.layout=kind` and `model.attn_implementation=attention`, the fastest first."""
    every: tuple[Kind, ...] = ("packed",) if sp_size > 1 else ("packed", "rows", "single")
    found = []
    for one in every:
        if kind not in ("auto", one):
            continue
        if attention in ("auto", "packed", NAME):
            names = [NAME] if one == "packed" else ["sdpa", "eager"]
        else:
            names = [attention]
        found += [Layout(kind=one, attention=name) for name in names]
    return found


def choose_layout(
    twin: Path,
    layouts: Sequence[Layout],
    *,
    device: torch.device,
    trust_remote_code: bool,
    gradient_checkpointing: bool = False,
    compute_dtype: str = "float32",
) -> Choice:
    """The first of `layouts` that is exact for the model in the folder `twin`.

    Raises UserError, with the reason of each, if none is, or if the model is not causal.
    """
    generator = torch.Generator().manual_seed(0)
    plain = load(twin, attention="eager", trust_remote_code=trust_remote_code, noise=True).to(device).eval()
    vocab_size = plain.config.get_text_config().vocab_size
    sequences = [torch.randint(2, vocab_size, (length,), generator=generator) for length in LENGTHS]
    batch = scoring_batch([ids.numpy() for ids in sequences], temperature=1.0)
    weights_M = torch.randn(sum(LENGTHS) - len(LENGTHS), generator=generator).to(device)
    expected_M = torch.cat([_plain_logprobs(plain, ids.to(device)) for ids in sequences])
    _check_causal(plain, sequences[0].to(device), expected_M.detach())
    gradients = _gradients(plain, (expected_M * weights_M).sum())

    rejected: dict[Layout, str] = {}
    for layout in layouts:
        groups = [range(len(LENGTHS))] if layout.kind != "single" else [[number] for number in range(len(LENGTHS))]
        micros = [make_micro_batch(batch, group, device=device) for group in groups]
        try:
            model = load(twin, attention=layout.attention, trust_remote_code=trust_remote_code).to(device)
            if gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            evaluation_mode(model)
            head = LogprobHead(model)
            got_M = torch.cat([forward(model, head, micro, layout.kind) for micro in micros])
            reason = _difference(expected_M, got_M, gradients, _gradients(model, (got_M * weights_M).sum()))
            if reason is None and compute_dtype != "float32" and device.type == "cuda":
                # There packed attention has a kernel of its own for 16 bits.
                model, plain = (part.to(getattr(torch, compute_dtype)) for part in (model, plain))
                rounded_M = torch.cat([_plain_logprobs(plain, ids.to(device)) for ids in sequences])
                got_M = torch.cat([forward(model, head, micro, layout.kind) for micro in micros])
                reason = _rounding_difference(expected_M, rounded_M, got_M, compute_dtype)
        except UserError as error:
            reason = str(error)
        except Exception as error:  # whatever an architecture raises for what it cannot do
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        if reason is None:
            without = tuple(name for name, gradient in gradients.items() if gradient is None)
            return Choice(layout=layout, rejected=rejected, without_gradient=without)
        rejected[layout] = reason
    raise UserError(
        f"{type(plain).__name__} cannot be trained exactly: "
        + "; ".join(f"{layout}: {reason}" for layout, reason in rejected.items())
        + ". Choose trainer.layout=auto and model.attn_implementation=auto, or another model."
    )


def forward(model: nn.Module, head: LogprobHead, micro: MicroBatch, kind: Kind) -> Tensor:
    """Logprobs [M] of the trained tokens of `micro`, on one rank and without sharding."""
    given = model_input(micro, kind)
    head.request = LogprobRequest(
        positions_M=given.positions_M,
        targets_M=micro.token_ids_S[micro.trained_M],
        temperature=micro.temperature,
        with_entropy=False,
    )
    try:
        logprobs_M: Tensor = model(**given.arguments, use_cache=False).logits[0, :, 0]
    finally:
        head.request = None
    return logprobs_M


def load(twin: Path, *, attention: str, trust_remote_code: bool, noise: bool = False) -> Any:
    """The model in `twin` in float32. Without `noise`, as in the trainer, nothing in it is random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(twin, trust_remote_code=trust_remote_code, local_files_only=True)
    if not noise:
        override(config, without_noise(config))
    model = AutoModelForCausalLM.from_pretrained(
        twin,
        config=config,
        dtype=torch.float32,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    )
    used = model.config.get_text_config()._attn_implementation
    if used != attention and attention != "eager":
        raise UserError(f"the model knows {used} attention only")
    return model


def _plain_logprobs(model: nn.Module, ids_T: Tensor) -> Tensor:
    logits = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, ids_T[1:, None])[:, 0]


def _check_causal(model: nn.Module, ids_T: Tensor, expected_M: Tensor) -> None:
    half = len(ids_T) // 2
    changed_T = ids_T.clone()
    changed_T[half:] = changed_T[half:].flip(0)
    with torch.no_grad():
        gap = float((_plain_logprobs(model, changed_T)[: half - 1] - expected_M[: half - 1]).abs().max())
    if not gap <= TOLERANCE:
        raise UserError(
            f"{type(model).__name__} is not causal as transformers computes it: later tokens change the logprobs of "
            f"earlier ones by {gap:.2g} nats. What it samples could not be scored again, so it cannot be trained; "
            "choose another model"
        )


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def _rounding_difference(exact_M: Tensor, plain_M: Tensor, got_M: Tensor, dtype: str) -> str | None:
    """Whether a layout in 16 bits is farther from the exact logprobs than plain transformers in 16 bits."""
    honest, gap = (float((values_M - exact_M).detach().abs().mean()) for values_M in (plain_M, got_M))
    if gap <= ROUNDING * honest + 0.01:
        return None
    return f"logprobs in {dtype} differ by {gap:.2g} nats in the mean, where rounding explains {honest:.2g}"


def _difference(
    expected_M: Tensor, got_M: Tensor, expected: dict[str, Tensor | None], got: dict[str, Tensor | None]
) -> str | None:
    """In what the logprobs or gradients differ; None if in nothing."""
    gap = float((expected_M - got_M).detach().abs().max())
    if not gap <= TOLERANCE:
        return f"logprobs differ by up to {gap:.2g} nats from those of each sequence alone"
    total = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values() if gradient is not None))
    worst, name = 0.0, ""
    for weight, want in expected.items():
        have = got.get(weight)
        if want is None and have is None:
            continue
        zero = torch.zeros_like(want if want is not None else have)  # type: ignore[arg-type]
        want, have = (zero if one is None else one for one in (want, have))
        share = float((want - have).norm()) / (float(want.norm()) + CONTEXT * total)
        if share > worst or math.isnan(share):
            worst, name = math.inf if math.isnan(share) else share, weight
    if worst <= GRADIENT_TOLERANCE:
        return None
    return f"the gradient of {name} differs by {worst:.2g} of its norm"
