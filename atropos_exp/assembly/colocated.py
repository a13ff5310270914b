"""Trainer and engine take turns on one GPU: the engine sleeps while the trainer updates."""

from collections.abc import Callable

from atropos_exp.assembly.resync import Resync
from atropos_exp.types import TrainBatch, UpdateStats

Update = Callable[[TrainBatch], UpdateStats]


def taking_turns(update: Update, resync: Resync) -> Update:
    """Return `update`, but with the engine asleep meanwhile. The weight sync that follows each update wakes it."""

    def update_while_it_sleeps(batch: TrainBatch) -> UpdateStats:
        import torch

        resync.sleep()
        stats = update(batch)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what PyTorch has freed and keeps, the engine that wakes up needs
        return stats

    return update_while_it_sleeps
