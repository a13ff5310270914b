"""One run fed by a scripted environment: what each field of a group means for the update, and what bad groups do.

The numbers are those of `expected.py`, from the groups as they were sent and the weights that each step started from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.atropos_conformance import expected, trainer
from tests.atropos_conformance.expected import IGNORED, SENTINEL, Group
from tests.atropos_conformance.groups import LONGEST, REASONS, SPOIL, Maker, spoiled
from tests.atropos_conformance.programs import START_SECONDS, Run, wait_for

KL_COEF = 0.1
EQUAL = 2e-4  # relative, between two ways to compute in float32
pytestmark = pytest.mark.timeout(1200)  # the runs that the tests share are started by the first one
PLAIN = (1.0, 0.0, 0.5, 0.25)


class Played:
    """The run, with what was sent for each of its steps."""

    def __init__(self, run: Run, sent: dict[str, list[Group]], bad: Counter[str]) -> None:
        self.run = run
        self.sent = sent
        self.bad = bad  # groups by kind
        self.steps = dict(zip(sent, run.steps(), strict=True))

    def expect(self, name: str, **options: Any) -> dict[str, float]:
        step = self.steps[name].step
        return expected.update(
            self.sent[name],
            weights=trainer.weights(self.run.folder, step),
            reference=trainer.weights(self.run.folder, 1),
            kl_coef=KL_COEF,
            **options,
        )

    def check(self, name: str, *wrong: str) -> None:
        """The step came to what it must, which each of the `wrong` ways would have missed by far."""
        found, right = self.steps[name].losses, self.expect(name)
        assert found == pytest.approx(right, rel=EQUAL, abs=2e-6)
        for mistake in wrong:
            other = self.expect(name, wrong=mistake)
            assert other["grad_norm"] != pytest.approx(found["grad_norm"], rel=0.01), mistake


def good_groups(maker: Maker) -> dict[str, list[Group]]:
    """By step: what is sent for it and must all be trained."""
    prompt = [20, 21, 22, 23]
    advantages = maker.group(PLAIN, turns=2)
    advantages["advantages"] = maker.per_token(advantages, -2.0, 2.0)
    unknown = maker.group(PLAIN)
    unknown["inference_logprobs"][1][-1] = SENTINEL
    reference = maker.group(PLAIN)
    shifts = maker.per_token(reference, -0.7, 0.7)
    reference["ref_logprobs"] = [
        [value + shift for value, shift in zip(*rows, strict=True)]
        for rows in zip(reference["inference_logprobs"], shifts, strict=True)
    ]
    return {
        "turns": [maker.group(PLAIN, turns=3), maker.group((0.5,) * 4)],
        "baselines": [maker.group(PLAIN, prompt=prompt), maker.group((4.0, 3.0, 3.5, 3.0), prompt=prompt)],
        "advantages": [advantages, maker.group(PLAIN, advantages=[])],
        "zeroed": [
            maker.group(PLAIN, overrides=[{"set_advantage_to_zero": True}, {}, {}, {}]),
            maker.group(PLAIN, advantages=None, ref_logprobs=[], images=None, overrides=None),
        ],
        "sft": [maker.group(PLAIN, group_overrides={"sft": True}), maker.group(PLAIN)],
        "off-policy": [maker.group(PLAIN, noise=0.8), maker.group(PLAIN)],
        "no logprobs": [maker.group(PLAIN, inference_logprobs=None), unknown],
        "sizes": [
            *(maker.group(scores) for scores in ((1.0, 0.0), (0.0, 2.0))),
            *(maker.group((score,)) for score in (1.0, 0.0, 1.0, 3.0)),
        ],
        "temperatures": [
            maker.group(PLAIN, temperatures=[0.7] * 4, generation_params={"temperature": 0.7}),
            maker.group(
                PLAIN,
                temperatures=[1.3, 0.5, 0.7, 0.7],
                generation_params={"temperature": 0.7},
                overrides=[{"temperature": 1.3}, {"temperature": 0.5}, {}, {}],
            ),
        ],
        "reference": [reference, maker.group(PLAIN)],
        "longest": [maker.group(PLAIN, length=LONGEST), maker.group(PLAIN, overrides=[{"surprise": 1}] * 4)],
    }


@pytest.fixture(scope="module")
def played(started: Any) -> Iterator[Played]:
    maker = Maker(trainer.weights(started.folder, 1), vocabulary=trainer.VOCABULARY, seed=11)
    sent, bad = good_groups(maker), Counter[str]()
    api = started.api()
    run = started.run(
        "run", steps=len(sent) + 1, api_url=api.url, kl_coef=KL_COEF, keeps_weights=True, learning_rate=2e-5
    )
    run.wait_until(lambda: api.is_registered, "the trainer registers", START_SECONDS)
    environment = started.environment(api.url)
    for number, groups in enumerate(sent.values(), 1):
        environment.send(*groups)
        run.wait_for_steps(number)
        if number == 3:  # in the middle of all, what is no good
            batches = [spoiled(maker.group(PLAIN), kind) for kind in SPOIL]
            bad.update([*SPOIL, "doubled"])
            environment.send(*batches, sent["turns"][0])
            for kind, value in (("scores", float("nan")), ("inference_logprobs", float("-inf"))):
                broken = maker.group(PLAIN)
                row = broken[kind] if kind == "scores" else broken[kind][0]
                row[-1] = value
                environment.send(broken, maker.group(PLAIN))
                wait_for(lambda: api.get("/status")["queue_size"] == 0, "the broken batch is taken", 60)
                bad["not finite: the API loses the batch"] += 1
    kind = "a mask shorter than its tokens"
    sent["beside a bad one"] = [maker.group(PLAIN, turns=2)]
    bad[kind] += 1
    environment.send(*sent["beside a bad one"], spoiled(maker.group(PLAIN), kind))
    assert run.wait(120) == 0, run.output
    yield Played(run, sent, bad)


def test_groups_arrive_as_they_were_sent(played: Played) -> None:
    """tokens, masks, scores, logprobs: trained as they were sent."""
    for name, groups in played.sent.items():
        found = {tuple(map(tuple, (one.tokens for one in group))): group for group in played.steps[name].groups}
        assert len(found) == len(groups), name
        for group in groups:
            for at, one in enumerate(found[tuple(map(tuple, group["tokens"]))]):
                assert one.trained == [mask != IGNORED for mask in group["masks"][at]]
                assert one.reward == pytest.approx(group["scores"][at])
                logprobs = group["inference_logprobs"] and group["inference_logprobs"][at]
                if one.logprobs is not None:
                    flat = [value if trained else 0.0 for value, trained in zip(logprobs, one.trained, strict=True)]
                    assert one.logprobs == pytest.approx(flat, abs=1e-6)


def test_labels_are_shifted(played: Played) -> None:
    """shift: token t is scored by the logits at t - 1."""
    played.check("turns", "unshifted")


def test_tool_tokens_get_no_gradient(played: Played) -> None:
    """masks with gaps: no gradient in the gaps."""
    played.check("turns", "tool_tokens")


def test_baseline_of_each_group_and_not_of_the_prompt(played: Played) -> None:
    """two groups of one prompt: two baselines."""
    played.check("baselines", "pooled")


def test_equal_scores_teach_nothing(played: Played) -> None:
    """equal scores: no gradient."""
    played.check("turns")
    weights = trainer.weights(played.run.folder, played.steps["turns"].step)
    assert expected.update(played.sent["turns"][1:], weights=weights)["grad_norm"] == 0.0


def test_group_of_one_and_groups_of_mixed_sizes(played: Played) -> None:
    """groups of 1, 2 and 4: each compared with itself; one: nothing."""
    played.check("sizes", "pooled")
    assert sorted(len(group) for group in played.steps["sizes"].groups) == [1, 1, 1, 1, 2, 2]


def test_token_advantages_are_used_verbatim(played: Played) -> None:
    """`advantages`: used as they are, for their group alone."""
    played.check("advantages", "no_advantages")


def test_no_advantages_are_null_or_an_empty_list(played: Played) -> None:
    """`advantages` null or []: absent: GRPO."""
    played.check("advantages")
    played.check("zeroed")


def test_advantage_is_zeroed_after_the_baseline(played: Played) -> None:
    """`set_advantage_to_zero`: after the baseline."""
    played.check("zeroed", "zero_first")


def test_sft_groups_are_plain_cross_entropy(played: Played) -> None:
    """`sft`: cross-entropy, without baseline or ratio."""
    played.check("sft")
    step = played.steps["sft"]
    nats = [
        -value for group in played.sent["sft"][:1] for row in group["tokens"] for value in _nats(played, row, group)
    ]
    total = sum(one.trained.count(True) for group in step.groups for one in group)
    assert step.losses["supervised"] == pytest.approx(sum(nats) / total, rel=EQUAL)


def _nats(played: Played, row: list[int], group: Group) -> list[float]:
    """Logprobs of the trained tokens of one sequence."""
    mask = group["masks"][group["tokens"].index(row)]
    values = expected.logprobs(trainer.weights(played.run.folder, played.steps["sft"].step), row)
    return [value for value, label in zip(values, mask, strict=True) if label != IGNORED]


def test_behaviour_logprobs_make_truncated_importance_weights(played: Played) -> None:
    """`inference_logprobs`: importance weights, truncated."""
    played.check("off-policy")
    for cap in (None, 1e9):
        other = played.expect("off-policy", cap=cap)
        assert other["policy"] != pytest.approx(played.steps["off-policy"].losses["policy"], rel=0.01), cap


def test_missing_logprobs_and_the_sentinel_are_no_logprobs(played: Played) -> None:
    """`inference_logprobs` null, or 1.0 at a trained token: unknown: weight 1, never exp(1.0)."""
    played.check("no logprobs")
    found = {tuple(one.tokens): one.logprobs for group in played.steps["no logprobs"].groups for one in group}
    without, partly = played.sent["no logprobs"]
    assert all(found[tuple(row)] is None for row in [*without["tokens"], partly["tokens"][1]])
    assert all(found[tuple(partly["tokens"][at])] is not None for at in (0, 2, 3))


def test_reference_logprobs_are_used_where_given(played: Played) -> None:
    """`ref_logprobs`: used for the KL term, else computed."""
    played.check("reference")
    plain = [{**group, "ref_logprobs": None} for group in played.sent["reference"]]
    folder, step = played.run.folder, played.steps["reference"].step
    other = expected.update(plain, weights=trainer.weights(folder, step), reference=trainer.weights(folder, 1))
    assert other["kl"] != pytest.approx(played.steps["reference"].losses["kl"], rel=0.01)


def test_temperature_that_a_group_names(played: Played) -> None:
    """temperature in a group: logits are divided by it."""
    played.check("temperatures", "one_temperature")


def test_longest_sequence_is_trained_and_a_longer_one_is_not(played: Played) -> None:
    """a sequence of the budget, and one more: trained; dropped."""
    played.check("longest")
    assert max(len(one.tokens) for group in played.steps["longest"].groups for one in group) == LONGEST
    assert trainer.dropped(played.run.folder)[REASONS["a token too many"]] >= 1


def test_unknown_overrides_are_told_and_do_no_harm(played: Played) -> None:
    """unknown override: logged once, then ignored."""
    played.check("longest")
    assert "surprise" in played.run.output


@pytest.mark.parametrize("kind", [*SPOIL, "doubled"])
def test_bad_group_is_dropped_under_a_name(played: Played, kind: str) -> None:
    """16 kinds of invalid groups: dropped, each with a reason."""
    assert trainer.dropped(played.run.folder)[REASONS[kind]] >= 1


def test_counters_match_exactly_what_was_sent(played: Played) -> None:
    """the same: counted exactly."""
    right = Counter[str]()
    for kind, number in played.bad.items():
        if kind in REASONS:
            right[REASONS[kind]] += number
    assert trainer.dropped(played.run.folder) == dict(right)
    assert trainer.dropped_rollouts(played.run.folder) == {reason: 4 * number for reason, number in right.items()}
    assert trainer.lost_batches(played.run.folder) == played.bad["not finite: the API loses the batch"] == 2
    accepted = sum(len(groups) for groups in played.sent.values())
    assert sum(len(step.groups) for step in played.steps.values()) == accepted


def test_numbers_that_are_not_finite_cost_one_batch_and_no_step(played: Played) -> None:
    """NaN, -inf, `/batch` gives 500: counted as a lost batch; goes on."""
    assert trainer.lost_batches(played.run.folder) == 2
    assert trainer.status(played.run.folder) == "finished"


def test_bad_group_changes_no_number_of_the_others(played: Played) -> None:
    """a good group beside a bad one: same numbers as alone."""
    played.check("beside a bad one", "tool_tokens")
    played.check("zeroed")  # the step after all the bad ones


def test_run_finishes_after_all_of_it(played: Played) -> None:
    """all of it in one run: finishes."""
    assert trainer.status(played.run.folder) == "finished"
    assert [step.step for step in played.run.steps()] == list(range(1, len(played.sent) + 1))
