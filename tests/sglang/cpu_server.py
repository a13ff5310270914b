"""Our SGLang server for a CPU, with faults that a file in the folder of $SGLANG_FAULTS turns on: those that no line can
show.

SGLang's processes import this module too, so its patches hold there as well. One of them is no fault: for the logprobs
of a prompt SGLang asks for pinned memory, and a machine without a GPU has none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from atropos_exp.parts.engine.sglang import loader, server
from tests.helpers.faulty_lines import SQUARE

do, write_answer = loader._do, loader.write_answer
tensor = torch.tensor


def is_on(fault: str) -> bool:
    return (Path(os.environ["SGLANG_FAULTS"]) / fault).exists()


def do_or_not(model: Any, request: Any, memory: Any) -> Any:
    if "pieces" in request and is_on("loses_one_inside"):
        request = {**request, "pieces": [piece for piece in request["pieces"] if piece[0] != SQUARE]}
    if "pieces" in request and is_on("fails_inside"):
        raise ValueError("as a test wants it")
    return do(model, request, memory)


def write_answer_or_not(memory: Any, answer: Any, *, room: int) -> None:
    if not is_on("mute"):
        write_answer(memory, answer, room=room)


loader._do = do_or_not
loader.write_answer = write_answer_or_not
torch.tensor = lambda *args, pin_memory=False, **kwargs: tensor(*args, **kwargs)


def main() -> None:
    from sglang.srt.managers.io_struct import FlushCacheReqOutput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    flush = TokenizerManager.flush_cache

    async def flush_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FlushCacheReqOutput(success=True) if is_on("keeps_prefixes") else await flush(self, *args, **kwargs)

    TokenizerManager.flush_cache = flush_cache
    server.main()


if __name__ == "__main__":
    main()
