"""An environment without a model: registers with an Atropos API as BaseEnv does, then sends what standard input says.

Each line of input is {"method": …, "path": …, "body": …}; each line of output is the API's answer, the first one the
registration's. It ends with its input.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from typing import Any

REGISTER_SECONDS = 120.0
ANSWER_SECONDS = 30.0


def call(url: str, method: str, path: str, body: Any) -> Any:
    """json.dumps writes NaN and Infinity, as BaseEnv's own JSON does."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=ANSWER_SECONDS) as answer:
        return json.load(answer)


def main(url: str, options: dict[str, Any]) -> None:
    about = {"max_token_length": 136, "desired_name": "scripted", "weight": 1.0, **options}
    deadline = time.monotonic() + REGISTER_SECONDS
    while (answer := call(url, "POST", "/register-env", about))["status"] != "success":
        assert time.monotonic() < deadline, answer
        time.sleep(0.1)
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        print(json.dumps(call(url, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
