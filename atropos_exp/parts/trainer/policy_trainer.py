"""The trainer itself: splits a batch into optimizer steps and micro-batches, and runs them."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from atropos_exp.errors import UserError
from atropos_exp.interfaces import PolicyLoss
from atropos_exp.parts.trainer import state, weights
from atropos_exp.parts.trainer.adapters import plain_name
from atropos_exp.parts.trainer.flops import UpdateFlops
from atropos_exp.parts.trainer.hub_names import HubNames
from atropos_exp.parts.trainer.packing import MicroBatch, make_micro_batch, plan_micro_batches, scoring_batch
from atropos_exp.parts.trainer.schedule import learning_rate_factor
from atropos_exp.parts.trainer.settings import TrainerSettings
from atropos_exp.parts.trainer.statistics import Sums, importance_weights
from atropos_exp.parts.trainer.verl_backend import PackedBackend
from atropos_exp.types import Floats, TokenIds, TrainBatch, UpdateStats
from atropos_exp.weights.tensors import is_adapter


@dataclass
class TrainerCounters:
    """The trainer's counters, which a checkpoint carries."""

    updates: int = 0  # calls of `update`, skipped ones included
    optimizer_steps: int = 0  # applied
    bad_steps: int = 0  # skipped in a row until now


class FSDP2Trainer:
    """A `PolicyTrainer`. Every method is collective: all ranks call it with equal arguments."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        backend: PackedBackend,
        reference: PackedBackend | None,
        loss: PolicyLoss,
        device: torch.device,
        dump_folder: Path,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._reference = reference
        self._loss = loss
        self._device = device
        self._dump_folder = dump_folder
        self._dumps: list[Path] = []
        self._progress = TrainerCounters()
        self._flops = UpdateFlops(backend.module, backend.text_config, lora=backend.lora_facts is not None)
        self._dp_size = int(backend.get_data_parallel_size())
        self._dp_rank = int(backend.get_data_parallel_rank())

    def update(self, batch: TrainBatch) -> UpdateStats:
        """One pass over `batch` in `num_mini_batches` optimizer steps.

        The gradient does not depend on the size of the micro-batches or the number of ranks. A non-finite loss or
        gradient applies nothing and ends the update; after `max_bad_steps` such updates in a row, RuntimeError.
        """
        num_mini_batches = self._settings.num_mini_batches
        if len(batch.lengths_N) < num_mini_batches:
            raise UserError(
                f"a batch of {len(batch.lengths_N)} sequences cannot make trainer.num_mini_batches={num_mini_batches}"
            )
        groups = [part.tolist() for part in np.array_split(np.arange(len(batch.lengths_N)), num_mini_batches)]
        mini_batches = [[self._pack(batch, micro) for micro in self._plan(batch, group)] for group in groups]
        every = [micro for micros in mini_batches for micro in micros]
        # With one optimizer step the old policy is the current one; no extra pass is needed.
        old = iter(_score(self._backend, every) if num_mini_batches > 1 else [None] * len(every))
        reference = iter(self._reference_logprobs(every, batch))

        sums = Sums(self._device)
        losses: list[dict[str, float]] = []
        grad_norms: list[float] = []
        learning_rate, skipped = 0.0, False
        with self._backend.training():
            for group, micros in zip(groups, mini_batches, strict=True):
                num_tokens = self._num_trained(batch, group)
                for number, micro in enumerate(micros):
                    loss = self._forward(
                        micro,
                        batch,
                        old_M=next(old),
                        reference_M=next(reference),
                        num_tokens=num_tokens,
                        num_sequences=len(group),
                        sums=sums,
                    )
                    self._backend.backward(loss, last=number == len(micros) - 1)
                losses.append(sums.collect_losses(dist.get_world_size()))
                grad_norms.append(self._backend.grad_norm())
                learning_rate = self._learning_rate()
                if not (math.isfinite(losses[-1]["loss"]) and math.isfinite(grad_norms[-1])):
                    skipped = True
                    self._backend.optimizer_zero_grad()
                    break
                self._backend.step(learning_rate=learning_rate, grad_norm=grad_norms[-1])
                self._progress.optimizer_steps += 1

        num_trained = int(batch.trained_S.sum())
        fresh_S = batch.fresh_N.repeat_interleave(batch.lengths_N)
        mean = {name: math.fsum(part[name] for part in losses) / len(losses) for name in Sums.LOSSES}
        stats = UpdateStats(
            **mean,
            grad_norm=math.fsum(grad_norms) / len(grad_norms),
            learning_rate=learning_rate,
            **sums.collect_tokens(),
            num_fresh_tokens=int((batch.trained_S & fresh_S).sum()),
            num_tokens=int(batch.lengths_N.sum()),
            num_trained_tokens=num_trained,
            num_micro_batches=len(every),
            peak_seconds=self._flops.peak_seconds(batch.lengths_N.tolist(), num_trained, self._device),
            skipped=skipped,
        )
        self._progress.updates += 1
        self._progress.bad_steps = self._progress.bad_steps + 1 if skipped else 0
        if skipped:
            self._report_bad_batch(batch, stats)
        return stats

    def logprobs(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        """For each sequence [T] the logprobs [T - 1] of all tokens but the first, nats, under the current weights."""
        lengths = [len(ids) - 1 for ids in sequences]
        ends = np.cumsum(lengths)
        flat = torch.zeros(int(ends[-1]), dtype=torch.float32)
        batch = scoring_batch(sequences, temperature)
        plan = self._plan(batch, range(len(sequences)))
        scores = _score(self._backend, [self._pack(batch, micro) for micro in plan])
        for micro, values in zip(plan, scores, strict=True):
            if micro and self._backend.is_mp_src_rank_with_outputs():
                where = torch.cat([torch.arange(ends[i] - lengths[i], ends[i]) for i in micro])
                flat[where] = values[: len(where)].cpu()  # a stand-in has more
        dist.all_reduce(flat)  # each position is set on one rank and 0 on the others
        return np.split(flat.numpy(), ends[:-1])

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """See `PolicyTrainer.parameters`; float32, and empty tensors on other ranks than 0."""
        return weights.full_parameters(self._backend.module, self._device)

    def adapter(self, *, with_base: bool) -> Iterator[tuple[str, Tensor]]:
        """See `PolicyTrainer.adapter`; float32, and empty tensors on other ranks than 0."""
        return weights.adapter_parameters(self._backend.module, self._device, with_base=with_base)

    def on_hub(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """See `PolicyTrainer.on_hub`."""
        given = weights.named_tensors(self._backend.module)
        names = [plain_name(name) for name in given if not is_adapter(name)]
        return HubNames(self._backend.plain_model, names).convert(tensors)

    def save(self, folder: Path) -> None:
        """Write weights, optimizer, counters and random streams to `folder` (safetensors and JSON). Rank 0 writes."""
        state.save(folder, self._backend, vars(self._progress), self._device)

    def load(self, folder: Path) -> None:
        """Continue exactly after `save`, with any number of ranks. Raises UserError if the checkpoint does not fit."""
        self._progress = TrainerCounters(**state.load(folder, self._backend, self._device))

    def _plan(self, batch: TrainBatch, sequences: Sequence[int]) -> list[list[int]]:
        """The indices of the sequences in each micro-batch of this data-parallel rank."""
        lengths = batch.lengths_N.tolist()
        plan = plan_micro_batches(
            [lengths[index] for index in sequences],
            dp_size=self._dp_size,
            max_tokens=self._settings.max_tokens_per_micro_batch,
            kind=self._backend.options.layout.kind,
        )
        return [[sequences[i] for i in micro] for micro in plan[self._dp_rank]]

    def _pack(self, batch: TrainBatch, sequences: Sequence[int]) -> MicroBatch:
        return make_micro_batch(batch, sequences, device=self._device, sp_size=self._backend.sp_size)

    def _num_trained(self, batch: TrainBatch, sequences: Sequence[int]) -> int:
        """The number of trained tokens of a mini-batch, over all ranks."""
        if len(sequences) == len(batch.lengths_N):
            return batch.num_trained_tokens
        owner_S = torch.repeat_interleave(torch.arange(len(batch.lengths_N)), batch.lengths_N)
        return int((batch.trained_S & torch.isin(owner_S, torch.tensor(sequences))).sum())

    def _reference_logprobs(self, micros: Sequence[MicroBatch], batch: TrainBatch) -> Sequence[Tensor | None]:
        """Reference logprobs [M] of each micro-batch, from the batch or else computed; None without a KL term."""
        if self._loss.kl_coef == 0:
            return [None] * len(micros)
        if bool((batch.has_reference_N | batch.supervised_N).all()):  # the same on every rank
            return [micro.reference_M for micro in micros]
        if self._reference is None:
            computed = _score(self._backend, micros, adapters=False)
        else:
            computed = _score(self._reference, micros)
        return [
            torch.where(micro.has_reference_M, micro.reference_M, values_M)
            for micro, values_M in zip(micros, computed, strict=True)
        ]

    def _forward(
        self,
        micro: MicroBatch,
        batch: TrainBatch,
        *,
        old_M: Tensor | None,
        reference_M: Tensor | None,
        num_tokens: int,
        num_sequences: int,
        sums: Sums,
    ) -> Tensor:
        """The loss of one micro-batch, ready for `backward`."""
        logprobs_M, entropy_M = self._backend.forward(micro, with_entropy=True)
        if micro.empty:
            return (logprobs_M * 0.0).sum()
        old_M = logprobs_M.detach() if old_M is None else old_M
        log_ratio_M = old_M - micro.behaviour_M
        cap = self._settings.importance_cap
        sums.add_tokens(entropy_M, log_ratio_M, micro.has_behaviour_M, micro.fresh_M, cap)
        importance_NR = None
        if cap is not None and bool(batch.has_behaviour_N.any()):
            importance_NR = micro.rows(importance_weights(log_ratio_M, micro.has_behaviour_M, cap))
        loss, parts = self._loss(
            logprobs_NR=micro.rows(logprobs_M),
            old_logprobs_NR=micro.rows(old_M),
            advantages_NR=micro.rows(micro.advantages_M),
            mask_NR=micro.mask(),
            importance_NR=importance_NR,
            reference_logprobs_NR=None if reference_M is None else micro.rows(reference_M),
            supervised_NR=micro.rows(micro.supervised_M) if bool(batch.supervised_N.any()) else None,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            dp_size=self._dp_size,
        )
        sums.add_losses(loss, parts)
        return loss

    def _learning_rate(self) -> float:
        settings = self._settings
        return settings.learning_rate * learning_rate_factor(
            self._progress.optimizer_steps,
            scheduler=settings.scheduler,
            warmup_steps=settings.warmup_steps,
            total_steps=settings.max_steps * settings.num_mini_batches,
            min_ratio=settings.min_lr_ratio,
        )

    def _report_bad_batch(self, batch: TrainBatch, stats: UpdateStats) -> None:
        """Write the batch to a file for inspection. Raises RuntimeError after too many in a row."""
        path = self._dump_folder / f"bad_batch_{self._progress.updates:06d}.safetensors"
        if dist.get_rank() == 0:
            _dump(path, batch, stats)
        self._dumps = [*self._dumps, path][-self._progress.bad_steps :]
        if self._progress.bad_steps >= self._settings.max_bad_steps:
            raise RuntimeError(
                f"{self._progress.bad_steps} updates in a row had a non-finite loss or gradient (the last: "
                f"loss {stats.loss}, gradient norm {stats.grad_norm}), so trainer.max_bad_steps="
                f"{self._settings.max_bad_steps} stops the run. Their batches: {', '.join(map(str, self._dumps))}"
            )


def _score(backend: PackedBackend, micros: Sequence[MicroBatch], **mode: Any) -> list[Tensor]:
    """Logprobs [M] of each micro-batch, without gradients."""
    with backend.evaluating(**mode):
        return [backend.forward(micro, with_entropy=False)[0] for micro in micros]


def _dump(path: Path, batch: TrainBatch, stats: UpdateStats) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {part.name: getattr(batch, part.name) for part in fields(batch)}
    tensors = {name: value.cpu().contiguous() for name, value in parts.items() if isinstance(value, Tensor)}
    facts = {"loss": stats.loss, "grad_norm": stats.grad_norm}
    save_file(tensors, path, metadata={"facts": json.dumps(facts)})
