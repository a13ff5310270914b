"""Validation of a ScoredData dict as an environment sent it, field by field. Nothing in it is trusted.

Lengths: G sequences, the i-th of T_i tokens. `masks` are Hugging Face labels, unshifted: the token's own id where it
is trained, -100 where not. `inference_logprobs` hold 1.0 where nothing was sampled. See atroposlib's api/README.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_exp.types import Floats, Mask, TokenIds

IGNORED = -100  # a token that is not trained
NO_LOGPROB = 1.0  # in place of a logprob, where nothing was sampled
ROUNDING = 1e-3  # nats that rounding may put a logprob above 0
LARGEST = 1e18  # the largest absolute value: its square still fits into float32
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
KNOWN_OVERRIDES = {"set_advantage_to_zero", "sft", "temperature"}
KNOWN_GROUP_OVERRIDES = {"group_size", "sft"}


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
    per_token = {
        name: _per_token(raw.get(name), name, size) for name in ("inference_logprobs", "advantages", "ref_logprobs")
    }
    everywhere_sft = bool(group_overrides.get("sft"))
    sequences = []
    for at in range(size):
        ids = _integers(tokens[at], f"tokens[{at}]")
        mask = _integers(masks[at], f"masks[{at}]")
        trained = _check_tokens(ids, mask, at, vocab_size=vocab_size, max_tokens=max_tokens)
        rows = {name: _row(rows, name, at, ids, trained) for name, rows in per_token.items()}
        supervised = everywhere_sft or bool(overrides[at].get("sft"))
        sequences.append(
            ScoredSequence(
                token_ids=ids.astype(np.int32),
                trained=trained,
                score=_score(scores[at], at),
                logprobs=_behaviour(rows["inference_logprobs"], trained),
                advantages=None if supervised else rows["advantages"],
                reference_logprobs=rows["ref_logprobs"],
                temperature=_temperature(overrides[at].get("temperature", generation.get("temperature")), at),
                zero_advantage=bool(overrides[at].get("set_advantage_to_zero")),
                supervised=supervised,
            )
        )
    env_id = raw.get("env_id")
    return ScoredGroup(
        env_id=env_id if isinstance(env_id, int) else None,
        sequences=tuple(sequences),
        unknown=_unknown(raw, group_overrides, overrides),
    )


def _check_tokens(ids: NDArray[Any], mask: NDArray[Any], at: int, *, vocab_size: int, max_tokens: int) -> Mask:
    """Which tokens are trained, [T]. The first has no prediction, so it is never trained."""
    if len(ids) != len(mask):
        raise Rejected("lengths", f"sequence {at} has {len(ids)} tokens and {len(mask)} mask values")
    if len(ids) > max_tokens:
        raise Rejected("too_long", f"sequence {at} has {len(ids)} tokens; this run trains on at most {max_tokens}")
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise Rejected(
            "token_id", f"sequence {at} has token ids {ids.min()}..{ids.max()}; expected 0..{vocab_size - 1}"
        )
    if len(ids) == len(DUMMY) and np.array_equal(ids, DUMMY):
        raise Rejected("dummy_tokens", f"sequence {at} is atroposlib's stand-in 0..127, not what a model sampled")
    trained: Mask = mask != IGNORED
    if not np.array_equal(mask[trained], ids[trained]):
        raise Rejected("mask_value", f"sequence {at}: a mask value must be -100 or the token's own id")
    trained[:1] = False
    if not trained.any():
        raise Rejected("no_trained_token", f"sequence {at} has no trained token")
    return trained


def _row(rows: Sequence[Any] | None, name: str, at: int, ids: NDArray[Any], trained: Mask) -> Floats | None:
    """Entry `at` as float32 [T], 0.0 where nothing is trained; None if there are no rows."""
    if rows is None:
        return None
    row = np.asarray(rows[at], dtype=np.float64)
    if row.shape != ids.shape:
        raise Rejected("lengths", f"sequence {at} has {len(ids)} tokens and {name} of shape {list(row.shape)}")
    usable = np.abs(row[trained]) <= LARGEST
    if not usable.all():
        raise Rejected("non_finite", f"sequence {at}: {name} holds {row[trained][~usable][0]}")
    return np.where(trained, row, 0.0).astype(np.float32)


def _behaviour(logprobs: Floats | None, trained: Mask) -> Floats | None:
    """The logprobs, or None (unknown) if a trained token has NO_LOGPROB or another positive number."""
    if logprobs is None or bool((logprobs[trained] > ROUNDING).any()):
        return None
    return np.minimum(logprobs, np.float32(0.0))


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
        raise Rejected("non_finite", f"score {at} is {score}")
    return score


def _temperature(value: object, at: int) -> float | None:
    if value is None:
        return None
    temperature = float(value)  # type: ignore[arg-type]
    if not 0.0 <= temperature <= 100.0:
        raise Rejected("temperature", f"sequence {at} says that it was sampled at temperature {temperature}")
    return temperature or 1.0  # greedy: its logprobs are those of temperature 1


def _integers(value: object, name: str) -> NDArray[np.int64]:
    array = np.asarray(value)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise Rejected("malformed", f"{name} must be a list of whole numbers")
    return array.astype(np.int64)


def _unknown(
    raw: Mapping[str, Any], group_overrides: Mapping[str, Any], overrides: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    found = {str(name) for name, value in raw.items() if name not in KNOWN_FIELDS and value is not None}
    found |= {f"group_overrides.{name}" for name in group_overrides if name not in KNOWN_GROUP_OVERRIDES}
    found |= {f"overrides.{name}" for item in overrides for name in item if name not in KNOWN_OVERRIDES}
    return tuple(sorted(found))
