"""The reward self-test: a data set whose own answers its reward rejects would train on noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atropos_exp.errors import UserError
from atropos_exp.parts.data.raw import VerlRow
from atropos_exp.types import Prompt, RewardFailure
from data_prep.builder import AS_RUN, Builder, ground_truth, prompt_text


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """The result of a self-test."""

    num_rows: int
    unscorable: tuple[int, ...]  # indices of the rows whose right answer cannot be scored


def self_test(builder: Builder, rows: Sequence[VerlRow]) -> SelfTest:
    """Check that every right answer scores 1.0 and every planted wrong one less. Raises UserError with what fails.

    Up to builder.MAX_UNSCORABLE of the rows may have a right answer that fails, or a reward that raises. They are
    returned, to be dropped: in training they would punish right answers or drop wrong ones.
    """
    prompts = [as_prompt(row) for row in rows]
    golds, wrongs = [builder.gold(row) for row in rows], [builder.wrong(row) for row in rows]
    scores = _scores(builder, [*golds, *wrongs], [*prompts, *prompts])
    gold_scores, wrong_scores = scores[: len(rows)], scores[len(rows) :]
    failures: dict[int, str] = {}
    for index, (row, gold_score, wrong_score) in enumerate(zip(rows, gold_scores, wrong_scores, strict=True)):
        if gold_score != 1.0:
            failures[index] = _failure("gold answer", golds[index], gold_score, row)
        elif isinstance(wrong_score, RewardFailure):
            failures[index] = _failure("wrong answer", wrongs[index], wrong_score, row)
        elif not wrong_score < 1.0:
            failure = _failure("wrong answer", wrongs[index], wrong_score, row)
            raise UserError(f"{builder.NAME}: reward self-test failed: {failure}")
    if len(failures) > builder.MAX_UNSCORABLE * len(rows):
        raise UserError(
            f"{builder.NAME}: reward self-test failed: {len(failures)} of {len(rows)} rows cannot be scored "
            f"(allowed: {builder.MAX_UNSCORABLE:.1%}): {'; '.join(list(failures.values())[:3])}"
        )
    return SelfTest(num_rows=len(rows), unscorable=tuple(failures))


def _scores(builder: Builder, answers: Sequence[str], prompts: Sequence[Prompt]) -> list[float | RewardFailure]:
    """The score of each answer. A reward that may hang runs as in training, in processes that can be killed."""
    from atropos_exp.parts.reward.pool import RewardPool

    reward = builder.reward()
    if builder.MAY_HANG:
        with RewardPool(reward, **AS_RUN) as pool:
            return pool.score(list(zip(answers, prompts, strict=True)))
    scores: list[float | RewardFailure] = []
    for answer, prompt in zip(answers, prompts, strict=True):
        try:
            scores.append(reward(answer, prompt))
        except UserError:
            raise
        except Exception as error:  # whatever a scorer may raise: counted, and told if there are too many
            scores.append(RewardFailure(reason=f"error:{type(error).__name__}"))
    return scores


def as_prompt(row: VerlRow) -> Prompt:
    """The row as the prompt that a reward sees; it has no token ids."""
    info = row["extra_info"]
    return Prompt(
        prompt_id=f"{row['data_source']}/{info['split']}/{info['index']}",
        data_source=row["data_source"],
        text=prompt_text(row),
        token_ids=np.zeros(1, dtype=np.int32),
        ground_truth=ground_truth(row),
        ability=row["ability"],
        extra_info=info,
    )


def _failure(kind: str, answer: str, score: float | RewardFailure, row: VerlRow) -> str:
    shown = answer if len(answer) <= 80 else "..." + answer[-77:]
    place = f"{row['extra_info']['split']} row {row['extra_info']['index']}"
    what = f"gets no score ({score})" if isinstance(score, RewardFailure) else f"scores {score}"
    return f"{place}: the {kind} {shown!r} {what} against ground_truth {ground_truth(row)!r}"
