"""The border to Atropos: a large batch from the API's answer to typed groups with the ledger's versions.

    python benchmarks/border.py                                   512 groups of 16 sequences of 1,000 tokens
    python benchmarks/border.py --groups 64 --group-size 8        smaller

The gateway is a real process whose ledger has sampled every sequence; the API is a small server that sends the batch
as Atropos does. It prints groups a second, and how much memory this process takes at most beyond the arrays of the
typed groups themselves.
"""

from __future__ import annotations

import argparse
import http.server
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.parts.atropos.client import AtroposClient
from atropos_exp.parts.atropos.intake import Intake
from atropos_exp.parts.gateway import client as gateway_client
from atropos_exp.parts.gateway.ledger import CompletionLedger
from atropos_exp.parts.gateway.settings import GatewaySettings
from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.types import Endpoint

VOCABULARY = 150_000
PROMPT = 100  # tokens
SIZES = "ATROPOS_EXP_BORDER_SIZES"


def sequences(groups: int, group_size: int, tokens: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Token ids and logprobs of everything, the same in every process. [groups, group_size, tokens]"""
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCABULARY, (groups, group_size, tokens), dtype=np.int32)
    ids[:, :, :PROMPT] = ids[:, :1, :PROMPT]
    logprobs = -random.random((groups, group_size, tokens), dtype=np.float32) - np.float32(0.001)
    return ids, logprobs


def serve_gateway() -> None:
    """The gateway's own program, with a ledger that knows the batch."""
    from atropos_exp.parts.gateway import server

    ids, logprobs = sequences(*map(int, os.environ[SIZES].split()))

    class Filled(CompletionLedger):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            for group_ids, group_logprobs in zip(ids, logprobs, strict=True):
                for one, known in zip(group_ids, group_logprobs, strict=True):
                    self.add(one[:PROMPT], one[PROMPT:], known[PROMPT:], policy_version=3, temperature=1.0)

    server.CompletionLedger = Filled  # type: ignore[misc]
    server.main()


def write_batch(path: Path, sizes: tuple[int, int, int]) -> None:
    """The answer to GET /batch."""
    import orjson

    ids, logprobs = sequences(*sizes)
    logprobs = logprobs.astype(np.float64)
    logprobs[:, :, :PROMPT] = 1.0
    masks = ids.copy()
    masks[:, :, :PROMPT] = -100
    batch = [
        {
            "tokens": ids[at].tolist(), "masks": masks[at].tolist(), "scores": [float(k) for k in range(sizes[1])],
            "advantages": None, "ref_logprobs": None, "messages": None, "generation_params": None,
            "inference_logprobs": logprobs[at].tolist(), "overrides": None, "group_overrides": None, "images": None,
            "env_id": 0, "distill_token_ids": None, "distill_logprobs": None,
        }
        for at in range(sizes[0])
    ]  # fmt: skip
    path.write_bytes(orjson.dumps({"batch": batch}))


def serve_batch(path: Path) -> None:
    """Print the port, and answer every request with the file."""
    size = path.stat().st_size

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(size))
            self.end_headers()
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    self.wfile.write(piece)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = (given.groups, given.group_size, given.tokens)
    if given.serve:
        write_batch(given.serve, sizes)
        serve_batch(given.serve)
        return
    os.environ[SIZES] = " ".join(map(str, sizes))
    gateway_client.SERVER = "benchmarks.border_gateway"
    values = yaml.safe_load((CONF_DIR / "gateway/default.yaml").read_text())
    del values["_target_"]
    settings = GatewaySettings(**{**values, "ledger_tokens": 2 * given.groups * given.group_size * given.tokens})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch.json"
        flags = [f"--groups={sizes[0]}", f"--group-size={sizes[1]}", f"--tokens={sizes[2]}"]
        server = subprocess.Popen(
            [sys.executable, __file__, *flags, "--serve", str(path)], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        port = int(server.stdout.readline())
        gateway = settings.start(
            doors=settings.listen([]),
            endpoints=[Endpoint(kind="hf", address="http://127.0.0.1:9", token=None)],
            model_folder=WEIGHTS, model_name="m", stop_token_ids=(1,), max_sequence_length=sizes[2], seed=0,
            log_folder=Path(folder),
        )  # fmt: skip
        try:
            measure(f"http://127.0.0.1:{port}", gateway, sizes, path.stat().st_size)
        finally:
            gateway.stop()
            server.kill()


def measure(url: str, gateway: Any, sizes: tuple[int, int, int], size: int) -> None:
    border = Intake(
        gateway, vocab_size=VOCABULARY, max_tokens=sizes[2], group_size=sizes[1], stop_token_ids=(1,),
        max_version_lag=None, max_response=sizes[2],
    )  # fmt: skip
    client = AtroposClient(url, batch_seconds=300.0)
    before, started, computed = peak_bytes(), time.perf_counter(), time.process_time()
    batch = client.batch(border.read)
    fetched = time.perf_counter()
    assert batch is not None
    groups = border.accept(batch, policy_version=3)
    ended, computed = time.perf_counter(), time.process_time() - computed
    assert len(groups) == sizes[0] and border.counters["rollouts_of_unknown_version"] == 0, border.counters
    arrays = sum(
        array.nbytes
        for group in groups
        for rollout in group.rollouts
        for array in (rollout.token_ids, rollout.trained, rollout.logprobs)
        if array is not None
    )
    print(f"{sizes[0]} groups of {sizes[1]} sequences of {sizes[2]} tokens, {size / 1e6:.0f} MB of JSON")
    print(f"this process computed for {computed:.2f} s: {sizes[0] / computed:.0f} groups/s with a core of its own")
    print(f"{sizes[0] / (ended - started):.0f} groups/s: {fetched - started:.2f} s to fetch and check, "
          f"{ended - fetched:.2f} s to look up")  # fmt: skip
    print(f"peak memory {(peak_bytes() - before) / 1e6:.0f} MB, of which arrays {arrays / 1e6:.0f} MB "
          f"({(peak_bytes() - before) / arrays:.1f} times as much)")  # fmt: skip


if __name__ == "__main__":
    main()
