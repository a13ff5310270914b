"""Finds out why no batch comes although the API answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOO_LONG = "Token length is too long"  # what an environment logs when it drops a group
SIZE_REFUSED = "Group structure invalid"
SAME_SCORES = "Scores are the same in a group, skipping"
SAMPLING = ("completions", "chat", "generate_vllm", "generate_sglang")  # the gateway's routes


@dataclass(frozen=True, kw_only=True, slots=True)
class Stall:
    """What is known about a wait for a batch."""

    seconds: float
    num_lost: int  # batches during the wait
    lost_to: str  # why the last of them was lost
    num_received: int  # groups during the wait
    dropped: Mapping[str, int]  # of these, by reason
    examples: Mapping[str, str]  # one for each reason
    batch_size: int  # in sequences
    group_size: int
    queued_groups: int
    num_environments: int
    has_minimum: bool  # an environment demands a share of each batch
    silent: Sequence[int]  # numbers of the environments with nothing queued
    services: str  # the state of the supervised programs, "" without any
    logs: Mapping[str, str]  # the last lines of each environment's log
    errors: Mapping[str, str]  # the first error in each environment's log
    max_token_len: int
    gateway: Mapping[str, float]  # its counters
    refusals: Mapping[str, str]  # what its first refused request of each kind was told

    def explain(self) -> str:
        """The likeliest cause and what to do about it; then what the gateway refused and what environments logged."""
        causes = [self._nothing_left() or self._nothing_came()]
        for reason, told in self.refusals.items():
            number = self.gateway.get(f"gateway/refused_{reason}", 1)
            remedy = " (raise max_prompt_length or max_response_length)" if reason == "length" else ""
            causes.append(f"the gateway has refused {number:.0f} requests, the first of them: {told}{remedy}")
        causes += [f"the first error in the log of {name}: {error}" for name, error in self.errors.items()]
        return "; ".join(causes)

    def _nothing_left(self) -> str | None:
        """What became of what did come; None if nothing came."""
        causes = [f"{self.num_lost} batches were lost ({self.lost_to})"] if self.num_lost else []
        if self.dropped:
            counts = ", ".join(f"{reason} {num}" for reason, num in self.dropped.items())
            example = self.examples[next(iter(self.dropped))]
            causes.append(
                f"{sum(self.dropped.values())} of {self.num_received} groups were dropped ({counts}), for instance: "
                f"{example}"
            )
        if not causes:
            return None
        return f"nothing that can be trained on has come from Atropos for {self.seconds:.0f} s: {'; '.join(causes)}"

    def _nothing_came(self) -> str:
        head = f"the Atropos API has formed no batch for {self.seconds:.0f} s"
        state = f" ({self.services})" if self.services else ""
        if self.num_environments == 0:
            return (
                f"{head}: no environment has registered with it{state}. Start one, or see its log (or all have an "
                "--env.inference_weight of 0 or less, about which the API says nothing)"
            )
        if self.queued_groups and self.has_minimum:
            numbers = ", ".join(map(str, self.silent)) or "(each has some, but too little)"
            return (
                f"{head} although {self.queued_groups} groups are queued: an environment has a minimum allocation "
                "(--env.min_batch_allocation), and each that has one must have sent its share, dead ones too. Nothing "
                f"is queued of environment {numbers}{state}"
            )
        if self.queued_groups:
            return (
                f"{head} although {self.queued_groups} groups are queued. A batch must have exactly {self.batch_size} "
                "sequences (batch_size x group_size), made of groups whose sizes divide the largest (group_size is "
                f"{self.group_size}; an environment that sends another size blocks all){state}"
            )
        for name, tail in self.logs.items():
            if TOO_LONG in tail:
                return (
                    f"{head}: {name} drops its groups because a sequence has {self.max_token_len} tokens or more "
                    "(max_prompt_length + max_response_length + 1); raise these, or let the environment write less"
                )
            if SIZE_REFUSED in tail:
                return f"{head}: {name} refuses its own groups, whose size is not its group_size; see its log"
            if SAME_SCORES in tail:
                return (
                    f"{head}: {name} drops its groups because all their scores are equal "
                    "(--env.ensure_scores_are_not_same false lets them through)"
                )
        text = f"{head}: {self.num_environments} environments have registered and send nothing{state}; see their logs"
        if not any(self.gateway.get(f"gateway/requests_{route}") for route in SAMPLING):
            text += (
                ". None has asked the gateway for a completion: one whose config_init returns no list of servers "
                "ignores its base URL (docs/atropos.md, atropos.extra_ports)"
            )
        elif not self.gateway.get("gateway/completions"):
            text += ". None of their requests has been answered with a completion"
        return text
