"""What runs beside the model in SGLang's scheduler process: loads new weights, digests what the model holds.

SGLang 0.5.12 calls `load` there for every request whose `load_format` is LOADER, if the server argument
`custom_weight_loader` names it. It gives nothing back, and an exception ends the process, so each request comes with
one tensor of bytes that both processes see: the answer's place first, then the bucket.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from atropos_exp.weights.digest import digests
from atropos_exp.weights.resident import has_plain_layers, views
from atropos_exp.weights.tensors import ALIGNMENT, Piece, read_piece

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

LOADER = f"{__name__}.load"
# Parameters that SGLang makes of several, stacked by rows.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LENGTH_BYTES = 8  # before the answer; 0: none was written


def load(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Execute the request that is, as JSON, the name of the one tensor, and write the answer, if it is read, into that
    tensor. Called by SGLang; an exception ends its process where no answer is read."""
    import torch

    ((text, memory),) = named_tensors
    request = json.loads(text)
    try:
        answer = _do(model, request, memory)
    except Exception as error:
        if not request["answers"]:
            raise
        logger.exception("the request of the server failed")
        answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
    if request["answers"]:
        write_answer(memory, answer, room=request["answer_bytes"])
    if memory.device.type == "cuda":
        torch.cuda.synchronize()  # the answer is there, and the bucket free for the next one


def _do(model: Any, request: Mapping[str, Any], memory: Tensor) -> dict[str, Any]:
    if "pieces" in request:
        bucket = memory[request["answer_bytes"] :]
        pieces = [Piece.from_message(item, buffer_bytes=len(bucket)) for item in request["pieces"]]
        model.load_weights([(piece.name, read_piece(piece, bucket)) for piece in pieces])
        return {}
    kinds = {name: (kind, tuple(shape)) for name, (kind, shape) in request["kinds"].items()}
    # What the model computes with, under Hugging Face names; nothing, if any layer repacks or quantises its weights.
    held = views(dict(model.named_parameters()), FUSED, kinds) if has_plain_layers(model) else {}
    if "digests" not in request:
        return {"names": list(held)}
    held = {name: held[name] for name in request["digests"]}
    tensors = [tensor if request["on_device"] else tensor.cpu() for tensor in held.values()]
    return {"digests": dict(zip(held, digests(tensors), strict=True))}


def answer_bytes(names: Sequence[str]) -> int:
    """The size of an answer that holds an error, or a digest of each name."""
    size = 8192 + sum(len(json.dumps(name)) + 64 for name in names)
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_answer(memory: Tensor, answer: Mapping[str, Any], *, room: int) -> None:
    """Write an answer of at most `room` bytes at the start of `memory`."""
    import torch

    raw = json.dumps(answer).encode()
    assert LENGTH_BYTES + len(raw) <= room, f"an answer of {len(raw)} bytes in {room}"
    whole = bytearray(len(raw).to_bytes(LENGTH_BYTES, "little") + raw)
    memory[: len(whole)].copy_(torch.frombuffer(whole, dtype=torch.uint8))


def read_answer(memory: Tensor) -> dict[str, Any] | None:
    """The answer in `memory`, or None if none was written."""
    length = int.from_bytes(memory[:LENGTH_BYTES].cpu().numpy().tobytes(), "little")
    if not length:
        return None
    answer = json.loads(memory[LENGTH_BYTES : LENGTH_BYTES + length].cpu().numpy().tobytes())
    assert isinstance(answer, dict), answer
    return answer
