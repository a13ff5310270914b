"""The gateway's process, started by `client.py`: `python -m atropos_exp.parts.gateway.server '{"socket_fds": …}'`.

It listens on sockets inherited from its parent, writes no files, and ends with its parent (`processes/child.py`).
"""

import asyncio
import gc
import json
import logging
import os
import secrets
import socket
import sys

import uvloop
from aiohttp import web

from atropos_exp.parts.gateway.admin import Admin
from atropos_exp.parts.gateway.app import App
from atropos_exp.parts.gateway.counters import Counters
from atropos_exp.parts.gateway.gate import Gate
from atropos_exp.parts.gateway.ledger import CompletionLedger
from atropos_exp.parts.gateway.options import CLIENT_TOKEN, ENGINE_TOKENS, PRIVATE_TOKEN, Options
from atropos_exp.parts.gateway.sampler import Sampler, Seeds
from atropos_exp.parts.gateway.text import Text
from atropos_exp.parts.gateway.upstream import Upstream
from atropos_exp.parts.gateway.upstreams import Upstreams
from atropos_exp.processes import lifeline
from atropos_exp.processes.ports import BACKLOG
from atropos_exp.processes.startup import no_collections, tokenizers_only

KEEP_ALIVE_SECONDS = 3600.0

logger = logging.getLogger(__name__)


def main() -> None:
    """Read the options from the command line and serve."""
    options = Options.model_validate_json(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    lifeline.ignore()
    tokens = {name: os.environ.pop(name, None) for name in (PRIVATE_TOKEN, CLIENT_TOKEN, ENGINE_TOKENS)}
    with tokenizers_only(), no_collections():
        text = Text(options.model_folder)
    gc.collect()
    gc.freeze()  # what was imported stays; the collector need not walk it again and again
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options, text, tokens))


async def serve(options: Options, text: Text, tokens: dict[str, str | None]) -> None:
    """Answer requests until the process is killed."""
    private_token = tokens[PRIVATE_TOKEN]
    assert private_token is not None
    engines = zip(options.engine_addresses, json.loads(tokens[ENGINE_TOKENS] or "[]"), strict=True)
    counters = Counters()
    gate = Gate(counters, max_hold_seconds=options.max_hold_seconds, held=options.held)
    ledger = CompletionLedger(max_tokens=options.ledger_tokens, name=secrets.token_hex(4))
    sampler = Sampler(
        upstream=Upstreams(
            [Upstream(*engine, silence_seconds=options.engine_silence_seconds) for engine in engines], counters
        ),
        gate=gate,
        ledger=ledger,
        text=text,
        counters=counters,
        stop_token_ids=options.stop_token_ids,
        max_sequence_length=options.max_sequence_length,
        seeds=Seeds(options.seed, options.incarnation),
        request_timeout_seconds=options.request_timeout_seconds,
    )
    app = App(
        sampler,
        Admin(ledger=ledger, gate=gate, counters=counters, incarnation=options.incarnation),
        model_name=options.model_name,
        client_token=tokens[CLIENT_TOKEN],
        private_token=private_token,
    )
    runner = web.AppRunner(
        app.make(max_body_bytes=options.max_body_mb << 20),
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,  # a client that goes away takes its request to the engine with it
        keepalive_timeout=KEEP_ALIVE_SECONDS,
    )
    await runner.setup()
    for fd in options.socket_fds:
        await web.SockSite(runner, socket.socket(fileno=fd), backlog=BACKLOG).start()
    logger.info("serving %s for the engine at %s", options.model_name, ", ".join(options.engine_addresses))
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
