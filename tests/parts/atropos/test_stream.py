"""A batch read while it arrives gives what a plain JSON parser gives, however it is cut and whatever stands in it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import numpy as np
import orjson
import pytest

from atropos_exp.parts.atropos.client import ApiDown, ApiLost, AtroposClient, BatchLost
from atropos_exp.parts.atropos.stream import BrokenJSON, NoGroups, groups

GROUP: dict[str, Any] = {
    "tokens": [[1, 2, 30, 4], [5, 61]],
    "masks": [[-100, -100, 30, 4], [-100, 61]],
    "scores": [0.5, -1.0],
    "advantages": None,
    "ref_logprobs": None,
    "messages": None,
    "inference_logprobs": [[1.0, 1.0, -0.25, -1e-07], [1.0, -3.5]],
    "overrides": None,
    "env_id": 0,
}
TRICKY = [
    {},
    {"masks": [[1, -100, 30, 4], [5, -100]]},  # gaps
    {"masks": [[1, 2, 30, 4], [5, 61]]},  # all of it trained
    {"masks": [[-100, -100, -100, -100], [-100, -100]]},
    {"masks": [[-100, -100, 0, 4], [-100, 1]]},  # a suffix of the text is not one of the tokens: 30 and 0, 61 and 1
    {"masks": [[-100, 30, 4], [-100, 61, 61]]},
    {"tokens": [[], [1]], "masks": [[], [-100]], "inference_logprobs": [[], [0.0]]},
    {"tokens": [[1.5, 2], ["a"]], "masks": [[True], [None]]},
    {"tokens": [[10**30], [-(2**62)]]},
    {"advantages": [[0.5, -1, 2e3, 0.0], [1, 2]], "ref_logprobs": [[], []]},
    {"inference_logprobs": [None, [1.0, -3.5]], "advantages": []},
    {"messages": [[{"role": "user", "content": '},{"tokens":[[1]],"masks":[[2]]} ]],"x"'}], []]},
    {"overrides": [{"x": [{}, {"tokens": [[7, 8]], "masks": [[7]]}]}, {"inference_logprobs": [[9.0]]}]},
    {"advantages": {"ref_logprobs": [[1.0, 2.0]]}},
]


def plain(value: Any) -> Any:
    """With lists in the place of arrays."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list) else value


def cut(text: bytes, at_random: random.Random) -> Iterator[bytes]:
    start = 0
    while start < len(text):
        size = at_random.choice((1, 7, 64, 500))
        yield text[start : start + size]
        start += size


@pytest.mark.parametrize("seed", range(40))
def test_what_is_read_is_what_was_sent(seed: int) -> None:
    at_random = random.Random(seed)
    batch = [GROUP | at_random.choice(TRICKY) for _ in range(at_random.randint(1, 6))]
    if seed % 4 == 0:
        batch = [dict(reversed(group.items())) for group in batch]
    text = json.dumps({"batch": batch}, separators=(",", ":") if seed % 5 else None).encode()
    found = list(groups(cut(text, at_random)))
    assert [{name: plain(value) for name, value in group.items()} for group in found] == orjson.loads(text)["batch"]


def test_numbers_become_arrays() -> None:
    [group] = groups([orjson.dumps({"batch": [GROUP]})])
    assert {row.dtype.name for name in ("tokens", "masks") for row in group[name]} == {"int64"}
    assert {row.dtype.name for row in group["inference_logprobs"]} == {"float64"}


@pytest.mark.parametrize("size", [5, 80, 200, 500, 600])
def test_an_answer_that_breaks_off_is_no_batch(size: int) -> None:
    text = orjson.dumps({"batch": [GROUP, GROUP, GROUP]})
    with pytest.raises(BrokenJSON):
        list(groups([text[:size]]))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"<html>"])
def test_what_is_no_object_is_broken(text: bytes) -> None:
    with pytest.raises(BrokenJSON):
        list(groups([text]))


@pytest.mark.parametrize("answer", [{"batch": None}, {"batch": []}, {"status": "error", "message": "m", "batch": []}])
def test_an_answer_without_a_batch_is_told(answer: dict[str, Any]) -> None:
    with pytest.raises(NoGroups) as told:
        list(groups([json.dumps(answer).encode()]))
    assert told.value.answer == answer


class Answers(HTTPServer):
    """Answers every request with `status` and `body`."""

    status, body = 200, b""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Answers)
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Answers]:
    server = Answers(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "expected", "words"),
    [
        (500, b"Internal Server Error", BatchLost, "a group holds NaN or infinity"),
        (
            502,
            b"<html>Bad Gateway</html>",
            ApiDown,
            "answered 502, as a proxy does that does not reach the API: <html>",
        ),
        (504, b"", ApiDown, "answered 504"),
        (404, b"not here", ApiDown, "answered 404"),
        (200, b'{"status": "error", "message": "not registered", "batch": []}', ApiLost, "not registered"),
        (200, b'{"batch":[{"tokens":[[1', BatchLost, "sent no JSON"),
    ],
)
def test_each_failure_of_a_batch_has_its_own_name(
    server: Answers, status: int, body: bytes, expected: type[Exception], words: str
) -> None:
    server.status, server.body = status, body
    client = AtroposClient(f"http://127.0.0.1:{server.server_port}", batch_seconds=120.0)
    with pytest.raises(expected, match=words):
        client.batch()
    client.close()
