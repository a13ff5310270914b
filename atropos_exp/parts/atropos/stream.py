"""Reads the API's answer to GET /batch while it arrives, group by group: of 300 MB of JSON one group is held at a time.

Numbers, which are nearly all of it, become arrays without an object for each. What looks unusual is left to a plain
JSON parser, so both ways give the same values.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

BEGIN, BETWEEN = b'{"batch":[', b'},{"tokens":'  # how the API's answer begins, and what stands between two groups
INTEGERS = ("tokens", "masks")
NUMBERS = (*INTEGERS, "advantages", "ref_logprobs", "inference_logprobs")  # in the order in which the API writes them
PLACE, PLACE_JSON = "\x00array", b'"\\u0000array"'  # stands for an array while the rest of its group is parsed
_IGNORED = b"-100"
_HUGE = 2**62


class BrokenJSON(ValueError):
    """The answer is no JSON object."""


class NoGroups(Exception):
    """The answer holds no group; this is all of it."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(str(answer)[:200])
        self.answer = answer


def groups(pieces: Iterable[bytes]) -> Iterator[Any]:
    """The groups in an answer whose bytes come as `pieces`; lists of numbers are arrays in them.

    Raises NoGroups, or BrokenJSON, at the latest at the end.
    """
    pending = bytearray()
    searched = 0  # bytes of `pending` in which no whole group was found
    started = False
    for piece in pieces:
        pending += piece
        if not started and len(pending) >= len(BEGIN) + len(BETWEEN):
            if not pending.startswith(BEGIN + BETWEEN[2:]):
                continue  # no batch, or not as this API writes it: parsed as a whole at the end
            del pending[: len(BEGIN)]
            started = True
        while started and (end := pending.find(b"}", searched)) >= 0:  # one character is found fastest
            searched = end
            if len(pending) < end + len(BETWEEN):
                break
            if not pending.startswith(BETWEEN, end):
                searched += 1
                continue
            with memoryview(pending) as view:
                raw = bytes(view[: end + 1])
            try:
                group = parse_group(raw)
            except orjson.JSONDecodeError:  # the mark stood within a group
                searched += 1
                continue
            yield group
            del pending[: end + 2]
            searched = 0
        else:
            searched = len(pending) if started else 0
    rest = bytes(pending)
    if not started:
        answer = _parse(rest)
        if not answer.get("batch"):
            raise NoGroups(answer)
        yield from answer["batch"]
        return
    if not rest.endswith(b"]}"):
        raise BrokenJSON("it ends in the middle")
    try:
        yield parse_group(rest[:-2])
    except orjson.JSONDecodeError as error:
        raise BrokenJSON(str(error)) from None


def _parse(text: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BrokenJSON(str(error)) from None
    if not isinstance(answer, dict):
        raise BrokenJSON(f"it is a {type(answer).__name__}")
    return answer


def parse_group(text: bytes) -> Any:
    """The JSON object in `text`, of which those of NUMBERS are lists of arrays."""
    found: dict[str, list[NDArray[Any]]] = {}
    rest: list[bytes] = []  # of the text, without these
    kept = 0  # bytes of `text` that are in `rest` or in `found`
    tokens: list[bytes] = []
    for name in NUMBERS:
        mark = f'"{name}":'.encode()
        start = text.find(mark, kept) + len(mark)  # of its value, if it stands where the API puts it
        if start < kept + len(mark) or (spans := _spans(text, start)) is None:
            continue  # null, for instance
        end = spans[-1][1] + 2
        rows = None
        if name in INTEGERS:
            texts = [text[first:last] for first, last in spans]
            rows = _masks(texts, tokens, found["tokens"]) if name == "masks" and "tokens" in found else None
            rows = rows or _integers(texts)
            tokens = texts if name == "tokens" else tokens
        else:
            rows = _floats(text[start:end])
        if rows is None:
            continue
        found[name] = rows
        rest += [text[kept:start], PLACE_JSON]
        kept = end
    group = orjson.loads(b"".join([*rest, text[kept:]]))
    if any(group.get(name) != PLACE for name in found):  # they belong to something within the group
        return orjson.loads(text)
    return {**group, **found}


def _spans(text: bytes, start: int) -> list[tuple[int, int]] | None:
    """Where the rows of "[[1,2],[3]]" begin and end; None if something else stands at `start`. One character is found
    many times faster than two."""
    if text[start : start + 2] != b"[[":
        return None
    spans = []
    first = start + 2
    while (last := text.find(b"]", first)) >= 0:
        spans.append((first, last))
        if text[last + 1 : last + 2] == b"]":
            return spans
        if text[last + 1 : last + 3] != b",[":
            return None
        first = last + 3
    return None


def _integers(texts: list[bytes]) -> list[NDArray[np.int64]] | None:
    """The numbers of each row, such as "1,2"; None where a plain parser has to look."""
    if not all(texts):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            values = np.fromstring(b",".join(texts).decode("ascii"), dtype=np.int64, sep=",")
        except (DeprecationWarning, ValueError):  # it could not be read to its end
            return None
    ends = np.cumsum([_count(text, ",") + 1 for text in texts]).tolist()
    if len(values) != ends[-1] or not -_HUGE < values.min() <= values.max() < _HUGE:  # numbers beyond are cut
        return None
    return [values[first:last] for first, last in zip([0, *ends], ends, strict=False)]


def _floats(text: bytes) -> list[NDArray[np.float64]] | None:
    try:
        return [np.array(row, dtype=np.float64) for row in orjson.loads(text)]
    except (ValueError, TypeError):  # no JSON, or no numbers
        return None


def _masks(texts: list[bytes], token_texts: list[bytes], tokens: list[NDArray[Any]]) -> list[NDArray[Any]] | None:
    """Masks that ignore a beginning and name the tokens of the rest, as most do: compared as text. None: others."""
    if len(texts) != len(token_texts):
        return None
    masks = []
    for text, token_text, ids in zip(texts, token_texts, tokens, strict=True):
        num_ignored = _count(text, "-")
        trained = text[5 * num_ignored :]
        if not 0 < num_ignored < len(ids) or not text.startswith((_IGNORED + b",") * num_ignored):
            return None
        if not token_text.endswith(b"," + trained) or _count(trained, ",") + 1 != len(ids) - num_ignored:
            return None
        mask = ids.copy()
        mask[:num_ignored] = -100
        masks.append(mask)
    return masks


def _count(text: bytes, character: str) -> int:
    """Faster than bytes.count where there are many."""
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord(character)))
