"""Validation of a ScoredData dict as an environment sent it, field by field. Nothing in it is trusted.

Lengths: G sequences, the i-th of T_i tokens. `masks` are Hugging Face labels, unshifted: the token's own id where it
is trained, -100 where not. `inference_logprobs` hold 1.0 where nothing was sampled. See atroposlib's api/README.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_exp.types import Floats, Mask, TokenIds

Integers = NDArray[np.int64]

IGNORED = -100  # a token that is not trained
NO_LOGPROB = 1.0  # in place of a logprob, where nothing was sampled
ROUNDING = 1e-3  # nats that rounding may put a logprob above 0
LARGEST = 1e18  # the largest absolute value of a score: its square still fits into float32
LARGEST_ADVANTAGE = 1e4  # one that is larger would take the whole of a clipped gradient
LOWEST_LOGPROB = -1e4  # engines give -9999 in the place of minus infinity
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0  # logits over a lower one overflow
DUMMY = np.arange(128)  # what atroposlib sends for tokens that it could not get (ATROPOS_ALLOW_DUMMY_MANAGED_SERVER)
REFUSED_FIELDS = {
    "images": "multimodal",
    "distill_token_ids": "distillation",
    "distill_logprobs": "distillation",
}
KNOWN_FIELDS = {
    *("tokens", "masks", "scores", "advantages", "ref_logprobs", "messages", "generation_params"),
    *("inference_logprobs", "overrides", "group_overrides", "env_id", *REFUSED_FIELDS),
}
KNOWN_OVERRIDES = {"set_advantage_to_zero", "sft", "temperature", "dropped"}
KNOWN_GROUP_OVERRIDES = {"group_size", "sft", "temperature"}


class Rejected(ValueError):
    """The group cannot be trained on. It is counted under `reason`, one word; the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredSequence:
    """One valid sequence of T tokens."""

    token_ids: TokenIds  # [T]
    trained: Mask  # [T]
    score: float
    logprobs: Floats | None  # [T] of the behaviour policy, 0.0 where not trained
    advantages: Floats | None  # [T]
    reference_logprobs: Floats | None  # [T], 0.0 where not trained
    temperature: float | None
    zero_advantage: bool
    supervised: bool
    dropped: str | None  # why the environment could not score it: it is counted, and not in its group


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredGroup:
    """One valid group of sequences."""

    env_id: int | None
    sequences: tuple[ScoredSequence, ...]
    unknown: tuple[str, ...]  # fields and overrides that this program does not know, and so ignores


def read_group(raw: object, *, vocab_size: int, max_tokens: int) -> ScoredGroup:
    """The group in `raw`. Raises Rejected for the first thing that is wrong, and no other exception."""
    try:
        return _read(raw, vocab_size=vocab_size, max_tokens=max_tokens)
    except Rejected:
        raise
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError) as error:  # text, nesting, huge numbers
        raise Rejected("malformed", str(error)[:200]) from None


def _read(raw: object, *, vocab_size: int, max_tokens: int) -> ScoredGroup:
    if not isinstance(raw, Mapping):
        raise Rejected("malformed", f"a group is a JSON object; got {type(raw).__name__}")
    for name, reason in REFUSED_FIELDS.items():
        if raw.get(name):
            raise Rejected(reason, f"the group has `{name}`, which this trainer does not train on")
    tokens, masks, scores = raw.get("tokens"), raw.get("masks"), raw.get("scores")
    if not (isinstance(tokens, list) and isinstance(masks, list) and isinstance(scores, list)):
        raise Rejected("malformed", "tokens, masks and scores must be lists")
    size = len(tokens)
    if size == 0:
        raise Rejected("empty", "the group has no sequence")
    if not len(masks) == len(scores) == size:
        raise Rejected("lengths", f"{size} token lists, {len(masks)} masks and {len(scores)} scores")

    overrides = _overrides(raw.get("overrides"), size)
    group_overrides = raw.get("group_overrides") or {}
    generation = raw.get("generation_params") or {}
    ids, ends = _integers(tokens, "tokens")
    dropped = [None if item.get("dropped") is None else str(item["dropped"])[:100] for item in overrides]
    trained = _trained(ids, ends, masks, dropped, vocab_size=vocab_size, max_tokens=max_tokens)
    spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    logprobs, advantages, references = (
        _numbers(_per_token(raw.get(name), name, size), name, spans, trained)
        for name in ("inference_logprobs", "advantages", "ref_logprobs")
    )
    compact = ids.astype(np.int32)
    everywhere_sft = bool(group_overrides.get("sft"))
    sequences = []
    for at, span in enumerate(spans):
        supervised = everywhere_sft or bool(overrides[at].get("sft"))
        sequences.append(
            ScoredSequence(
                token_ids=compact[span],
                trained=trained[span],
                score=_score(scores[at], at),
                logprobs=_known(logprobs, span),
                advantages=None if supervised or advantages is None else advantages[span],
                reference_logprobs=_known(references, span),
                temperature=_temperature((overrides[at], group_overrides, generation), at),
                zero_advantage=bool(overrides[at].get("set_advantage_to_zero")),
                supervised=supervised,
                dropped=dropped[at],
            )
        )
    env_id = raw.get("env_id")
    return ScoredGroup(
        env_id=env_id if isinstance(env_id, int) else None,
        sequences=tuple(sequences),
        unknown=_unknown(raw, group_overrides, overrides),
    )


def _trained(
    ids: Integers,
    ends: Sequence[int],
    masks: list[Any],
    dropped: Sequence[str | None],
    *,
    vocab_size: int,
    max_tokens: int,
) -> Mask:
    """Which tokens are trained, of all sequences end to end. The first of each has no prediction, so it never is. Only
    a sequence that is dropped may have none."""
    starts = [0, *ends[:-1]]
    mask, mask_ends = _integers(masks, "masks")
    for at, (start, end, mask_end) in enumerate(zip(starts, ends, mask_ends, strict=True)):
        length = end - start
        if end != mask_end:
            raise Rejected("lengths", f"sequence {at} has {length} tokens and {length + mask_end - end} mask values")
        if length > max_tokens:
            raise Rejected("too_long", f"sequence {at} has {length} tokens; this run trains on at most {max_tokens}")
        if length == 0:
            raise Rejected("no_trained_token", f"sequence {at} has no token")
        if length == len(DUMMY) and np.array_equal(ids[start:end], DUMMY):
            raise Rejected("dummy_tokens", f"sequence {at} is atroposlib's stand-in 0..127, not what a model sampled")

    def sequence_of(bad: Mask) -> int:
        return int(np.searchsorted(ends, np.flatnonzero(bad)[0], side="right"))

    if ids.min() < 0 or ids.max() >= vocab_size:
        at = sequence_of((ids < 0) | (ids >= vocab_size))
        own = ids[starts[at] : ends[at]]
        raise Rejected(
            "token_id", f"sequence {at} has token ids {own.min()}..{own.max()}; expected 0..{vocab_size - 1}"
        )
    trained: Mask = mask != IGNORED
    wrong = trained & (mask != ids)
    if wrong.any():
        at = sequence_of(wrong)
        text = f"sequence {at}: a mask value must be -100 (not trained) or the token's own id (trained)"
        if set(np.unique(mask).tolist()) <= {0, 1}:
            raise Rejected("mask_value", f"{text}; these are 0 and 1")
        first = int(np.flatnonzero(wrong)[0])
        raise Rejected(
            "mask_value", f"{text}; token {first - starts[at]} is {ids[first]}, its mask value {mask[first]}"
        )
    trained[starts] = False
    num_trained = np.add.reduceat(trained, starts, dtype=np.int64)
    for at in np.flatnonzero(num_trained == 0).tolist():
        if dropped[at] is None:
            raise Rejected("no_trained_token", f"sequence {at} has no trained token")
    return trained


def _numbers(rows: list[Any] | None, name: str, spans: Sequence[slice], trained: Mask) -> Floats | None:
    """All rows end to end as float32, 0.0 where nothing is trained; None if there are no rows."""
    if rows is None:
        return None
    arrays = [np.asarray(row, dtype=np.float64) for row in rows]
    for at, (array, span) in enumerate(zip(arrays, spans, strict=True)):
        if array.shape != (span.stop - span.start,):
            raise Rejected(
                "lengths",
                f"sequence {at} has {span.stop - span.start} tokens and {name} of shape {list(array.shape)}",
            )
    kept = np.where(trained, np.concatenate(arrays), 0.0)
    low, high = (-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE) if name == "advantages" else (LOWEST_LOGPROB, LARGEST)
    if not (kept.min() >= low and kept.max() <= high):
        bad = kept[~((kept >= low) & (kept <= high))][0]
        if not np.isfinite(bad):
            raise Rejected("non_finite", f"{name} hold {bad}")
        raise Rejected("range", f"{name} hold {bad:g}; expected {low:g} to {high:g}")
    return kept.astype(np.float32)


def _known(logprobs: Floats | None, span: slice) -> Floats | None:
    """Those of one sequence, or None (unknown) if a trained token has NO_LOGPROB or another positive number."""
    if logprobs is None or logprobs[span].max() > ROUNDING:
        return None
    return np.minimum(logprobs[span], np.float32(0.0))


def _per_token(value: object, name: str, size: int) -> list[Any] | None:
    """The value as a list with an entry per sequence; None if it was not supplied, which null and [] both mean."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) != size:
        got = len(value) if isinstance(value, list) else type(value).__name__
        raise Rejected("lengths", f"{size} token lists and {name} of {got}")
    return value


def _overrides(value: object, size: int) -> list[Mapping[str, Any]]:
    if value is None or value == []:
        return [{}] * size
    if not isinstance(value, list) or len(value) != size:
        raise Rejected("lengths", f"{size} token lists and overrides for another number of sequences")
    if not all(item is None or isinstance(item, Mapping) for item in value):
        raise Rejected("malformed", "overrides must be JSON objects")
    return [item or {} for item in value]


def _score(value: object, at: int) -> float:
    score = float(value)  # type: ignore[arg-type]
    if not abs(score) <= LARGEST:
        raise Rejected("range" if math.isfinite(score) else "non_finite", f"score {at} is {score:g}")
    return score


def _temperature(sayings: Sequence[Mapping[str, Any]], at: int) -> float | None:
    """That of the first of `sayings` that has one; None if none has."""
    value = next((said["temperature"] for said in sayings if said.get("temperature") is not None), None)
    if value is None:
        return None
    temperature = float(value)
    if temperature != 0.0 and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise Rejected(
            "temperature",
            f"sequence {at} says that it was sampled at temperature {temperature:g}; expected 0 (greedy), or "
            f"{LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}",
        )
    return temperature or 1.0  # greedy: its logprobs are those of temperature 1


def _integers(rows: list[Any], name: str) -> tuple[Integers, list[int]]:
    """All rows end to end, and where each ends."""
    arrays = [np.asarray(row) for row in rows]
    for at, array in enumerate(arrays):
        if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
            raise Rejected("malformed", f"{name}[{at}] must be a list of whole numbers")
    flat = np.concatenate([array.astype(np.int64, copy=False) for array in arrays])
    return flat, np.cumsum([len(array) for array in arrays]).tolist()


def _unknown(
    raw: Mapping[str, Any], group_overrides: Mapping[str, Any], overrides: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    found = {str(name) for name, value in raw.items() if name not in KNOWN_FIELDS and value is not None}
    found |= {f"group_overrides.{name}" for name in group_overrides if name not in KNOWN_GROUP_OVERRIDES}
    found |= {f"overrides.{name}" for item in overrides for name in item if name not in KNOWN_OVERRIDES}
    return tuple(sorted(found))
