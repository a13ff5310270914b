"""Finds out why no batch comes although the API answers."""

from collections.abc import Mapping, Sequence

TOO_LONG = "Token length is too long"  # what an environment logs when it drops a group
SIZE_REFUSED = "Group structure invalid"
SAME_SCORES = "Scores are the same in a group, skipping"


def explain(
    *,
    seconds: float,
    batch_size: int,
    group_size: int,
    queued_groups: int,
    num_environments: int,
    has_minimum: bool,
    silent: Sequence[int],
    services: str,
    logs: Mapping[str, str],
    max_token_len: int,
) -> str:
    """The likeliest cause and what to do about it, in one sentence.

    `batch_size` counts sequences. `has_minimum`: an environment demands a share of each batch. `silent`: the numbers of
    the environments with nothing queued. `logs`: the last lines of each environment's log. `services`: the state of
    the supervised programs, "" without any.
    """
    head = f"the Atropos API has formed no batch for {seconds:.0f} s"
    state = f" ({services})" if services else ""
    if num_environments == 0:
        return f"{head}: no environment has registered with it{state}. Start one, or see its log"
    if queued_groups and has_minimum:
        numbers = ", ".join(map(str, silent)) or "(each has some, but too little)"
        return (
            f"{head} although {queued_groups} groups are queued: an environment has a minimum allocation "
            "(--env.min_batch_allocation), and each that has one must have sent its share, dead ones too. Nothing is "
            f"queued of environment {numbers}{state}"
        )
    if queued_groups:
        return (
            f"{head} although {queued_groups} groups are queued. A batch must have exactly {batch_size} sequences "
            f"(batch_size x group_size), made of groups whose sizes divide the largest (group_size is {group_size}; "
            f"an environment that sends another size blocks all){state}"
        )
    for name, tail in logs.items():
        if TOO_LONG in tail:
            return (
                f"{head}: {name} drops its groups because a sequence has {max_token_len} tokens or more "
                "(max_prompt_length + max_response_length + 1); raise these, or let the environment write less"
            )
        if SIZE_REFUSED in tail:
            return f"{head}: {name} refuses its own groups, whose size is not its group_size; see its log"
        if SAME_SCORES in tail:
            return (
                f"{head}: {name} drops its groups because all their scores are equal "
                "(--env.ensure_scores_are_not_same false lets them through)"
            )
    return f"{head}: {num_environments} environments have registered and send nothing{state}; see their logs"
