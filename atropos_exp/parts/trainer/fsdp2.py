"""`trainer=fsdp2`: training with verl's FSDP2 engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.parts.trainer.settings import ModelChoice, TrainerSettings

if TYPE_CHECKING:
    from atropos_exp.interfaces import PolicyLoss
    from atropos_exp.parts.trainer.policy_trainer import FSDP2Trainer


class VerlFSDP2(TrainerSettings):
    """Starts what its settings describe."""

    def start(
        self,
        *,
        model_folder: Path,
        model: ModelChoice,
        loss: PolicyLoss,
        seed: int,
        device: str,
        dump_folder: Path,
    ) -> FSDP2Trainer:
        """Join the ranks, load the model, return the `PolicyTrainer`. Collective.

        `device` is cpu or cuda; batches that had to be skipped are written to `dump_folder`. A reference model (the
        weights of `model_folder`) is loaded only if `loss.kl_coef` is not 0.
        """
        from atropos_exp.parts.trainer.start import start

        return start(
            self,
            model_folder=model_folder,
            model=model,
            loss=loss,
            seed=seed,
            device=device,
            dump_folder=dump_folder,
        )
