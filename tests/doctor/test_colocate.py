"""Memory of a GPU whose trainer and engine take turns."""

from __future__ import annotations

from atropos_exp.doctor.memory import Estimate

NEEDS = Estimate(
    trainer={"weights": 4, "gradients": 4, "optimizer": 8, "activations": 20, "sync bucket": 1}, engine={"weights": 2}
)


def test_the_larger_of_an_update_and_of_sampling_counts() -> None:
    assert NEEDS.peak(engine=10, takes_turns=False) == 37 + 10
    assert NEEDS.peak(engine=10, takes_turns=True) == 37  # the update: 13 + 10 while it samples is less
    assert NEEDS.peak(engine=30, takes_turns=True) == 13 + 30
