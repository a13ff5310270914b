"""What runs beside the model in SGLang's scheduler process: loads new weights, tells what the model holds.

SGLang 0.5.12 calls `load` there for every request whose `load_format` is LOADER, if the server argument
`custom_weight_loader` names it. It gives nothing back, and an exception ends the process, so each request comes with
one tensor of bytes that both processes see: the answer's place first, then the bucket.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from atropos_exp.engine.bucket import Kind
from atropos_exp.engine.vllm_worker import EMBEDDING, HEAD
from atropos_exp.wire_tensors import ALIGNMENT, Piece, digests, read_piece

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

LOADER = f"{__name__}.load"
PLAIN_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")  # of layers that compute with what came
# Parameters that SGLang makes of several, stacked by rows.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LENGTH_BYTES = 8  # before the answer; 0: none was written


def load(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Do what the tensor's name says in JSON, and write the answer, if one is read, into the tensor."""
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
    held = resident(model, kinds)
    if "digests" not in request:
        return {"names": list(held)}
    held = {name: held[name] for name in request["digests"]}
    tensors = [tensor if request["on_device"] else tensor.cpu() for tensor in held.values()]
    return {"digests": dict(zip(held, digests(tensors), strict=True))}


def resident(model: Any, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
    """The tensors that the model computes with, under their Hugging Face names, parts of fused ones as views. Those of
    `kinds` that it does not keep as they came are left out; all, if any layer repacks or quantises its weights."""
    methods = {type(method).__name__ for m in model.modules() if (method := getattr(m, "quant_method", None))}
    if not methods <= set(PLAIN_METHODS):
        return {}
    parameters = dict(model.named_parameters())
    found = {}
    for name, (kind, shape) in kinds.items():
        tensor, start, rows = parameters.get(name), 0, shape[0] if shape else 0
        for fused, parts in FUSED.items():
            own = next((part for part in parts if f".{part}." in name), None)
            if tensor is None and own is not None:
                siblings = [kinds.get(name.replace(own, part)) for part in parts]
                sizes = [sibling[1][0] for sibling in siblings if sibling is not None]
                if len(sizes) == len(parts):
                    start, rows = sum(sizes[: parts.index(own)]), sum(sizes)
                    tensor = parameters.get(name.replace(own, fused))
        if tensor is None or not shape or tensor.dim() != len(shape) or tensor.shape[1:] != shape[1:]:
            continue
        is_padded = name in (EMBEDDING, HEAD) and tensor.shape[0] > rows  # at the end of the vocabulary
        if str(tensor.dtype) == f"torch.{kind}" and (tensor.shape[0] == rows or is_padded):
            found[name] = tensor.data[start : start + shape[0]]
    return found


def answer_bytes(names: Sequence[str]) -> int:
    """Enough for an error, or for a digest of each."""
    size = 8192 + sum(len(json.dumps(name)) + 64 for name in names)
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_answer(memory: Tensor, answer: Mapping[str, Any], *, room: int) -> None:
    """At the start of `memory`."""
    import torch

    raw = json.dumps(answer).encode()
    assert LENGTH_BYTES + len(raw) <= room, f"an answer of {len(raw)} bytes in {room}"
    whole = bytearray(len(raw).to_bytes(LENGTH_BYTES, "little") + raw)
    memory[: len(whole)].copy_(torch.frombuffer(whole, dtype=torch.uint8))


def read_answer(memory: Tensor) -> dict[str, Any] | None:
    """None: nothing was written."""
    length = int.from_bytes(memory[:LENGTH_BYTES].cpu().numpy().tobytes(), "little")
    if not length:
        return None
    answer = json.loads(memory[LENGTH_BYTES : LENGTH_BYTES + length].cpu().numpy().tobytes())
    assert isinstance(answer, dict), answer
    return answer
