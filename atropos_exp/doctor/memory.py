"""How much memory a run will want, from the shape of the model and the sizes of a step. docs/troubleshooting.md has
the formulas. An estimate: what libraries, kernels and fragmentation add is not in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atropos_exp.assembly.check import Checked
from atropos_exp.config.lora import LoraSettings
from atropos_exp.parts.engine.launch import ServerSettings
from atropos_exp.parts.trainer.settings import MAX_CHUNK_LOGITS
from atropos_exp.weights.tensors import safetensors_header

MIB, GIB = 2**20, 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Resident memory of a process before it holds any model, as measured on a CPU: imports of torch, verl, transformers.
TRAINER_BYTES, ENGINE_BYTES, WORKER_BYTES = 640 * MIB, 340 * MIB, 30 * MIB
ATROPOS_BYTES = 700 * MIB  # API, gateway and one environment together


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of a causal language model with gated feed-forward layers."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    query: int  # width of all query heads
    key_value: int  # width of all key (or value) heads
    vocabulary: int

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """Read the sizes from a Hugging Face folder; the parameters are counted in the headers of its weight files."""
        config = json.loads((folder / "config.json").read_text())
        text = config.get("text_config") or config
        heads = int(text["num_attention_heads"])
        size = int(text.get("head_dim") or text["hidden_size"] // heads)
        return cls(
            parameters=count_parameters(folder),
            layers=int(text["num_hidden_layers"]),
            hidden=int(text["hidden_size"]),
            intermediate=int(text.get("intermediate_size") or 4 * text["hidden_size"]),
            query=heads * size,
            key_value=int(text.get("num_key_value_heads") or heads) * size,
            vocabulary=int(text["vocab_size"]),
        )


def count_parameters(folder: Path) -> int:
    """Count the parameters in the headers of all safetensors files of `folder`."""
    headers = [safetensors_header(path) for path in folder.glob("*.safetensors")]
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Bytes by purpose, for one trainer rank and for the engine."""

    trainer: Mapping[str, int]
    engine: Mapping[str, int]

    @property
    def trainer_total(self) -> int:
        """Bytes of one trainer rank."""
        return sum(self.trainer.values())

    @property
    def engine_total(self) -> int:
        """Bytes of the engine."""
        return sum(self.engine.values())

    def peak(self, *, engine: int, takes_turns: bool) -> int:
        """Return the largest need of a GPU with one rank and an engine of so many bytes.

        With `engine.colocate` the two take turns: the engine has none of it during an update, and the trainer keeps its
        state while the engine samples or receives weights.
        """
        if not takes_turns:
            return self.trainer_total + engine
        kept = sum(self.trainer[name] for name in ("weights", "optimizer", "sync bucket"))
        return max(self.trainer_total, kept + engine)


def estimate(checked: Checked, shape: Shape) -> Estimate:
    """Estimate what a configuration needs on its device; processes without a model are left out."""
    return Estimate(trainer=_trainer(checked, shape), engine=_engine(checked, shape))


def _trainer(checked: Checked, shape: Shape) -> dict[str, int]:
    parts, sizes = checked.parts, checked.sizes
    model, trainer = parts.model, parts.trainer
    width = BYTES[model.compute_dtype(checked.device)]
    ranks = sizes.world_size
    trained = _lora_parameters(model.lora, shape) if model.lora.rank else shape.parameters
    state = {
        "weights": 4 * shape.parameters // ranks,
        "gradients": 4 * trained // ranks,
        "optimizer": 8 * trained // ranks,
    }
    if width < 4 or ranks > 1:  # the layer at work, gathered in the compute dtype, and the next one
        layer = 2 * (shape.parameters - shape.vocabulary * shape.hidden) // max(1, shape.layers)
        gathered = min(shape.vocabulary * shape.hidden + layer, shape.parameters)
        state["gathered"] = width * (gathered if trainer.reshard_after_forward else shape.parameters)
    if parts.loss.kl_coef and not model.lora.rank:
        state["reference"] = width * shape.parameters // ranks
    tokens = min(
        sizes.tokens_per_micro_batch,
        -(-sizes.sequences_per_rank // sizes.num_mini_batches) * sizes.tokens_per_sequence,
    )
    tokens = -(-tokens // trainer.sequence_parallel_size)
    state["activations"] = tokens * width * activation_width(shape, checkpointing=model.gradient_checkpointing)
    trained_tokens = min(tokens, tokens * checked.run.max_response_length // sizes.tokens_per_sequence + 1)
    state["logits"] = 4 * 3 * min(trained_tokens * shape.vocabulary, MAX_CHUNK_LOGITS)
    state["sync bucket"] = 2 * min(checked.run.sync.bucket_mb * MIB, width * shape.parameters)
    return state


def activation_width(shape: Shape, *, checkpointing: bool) -> int:
    """Return how many numbers are kept per token for the backward pass."""
    layer = 6 * shape.hidden + 3 * shape.query + 4 * shape.key_value + 4 * shape.intermediate
    # with checkpointing the input of each layer, and all of one
    return shape.layers * shape.hidden + layer if checkpointing else shape.layers * layer


def _lora_parameters(lora: LoraSettings, shape: Shape) -> int:
    sides = {
        "q_proj": shape.hidden + shape.query, "k_proj": shape.hidden + shape.key_value,
        "v_proj": shape.hidden + shape.key_value, "o_proj": shape.hidden + shape.query,
    }  # fmt: skip
    wide = shape.hidden + shape.intermediate
    return shape.layers * lora.rank * sum(sides.get(name, wide) for name in lora.target_modules)


def _engine(checked: Checked, shape: Shape) -> dict[str, int]:
    """Weights and the largest cache of keys and values that one step can fill."""
    engine = checked.parts.engine
    width = BYTES.get(engine.dtype) or (4 if checked.device == "cpu" else 2)
    tokens = checked.sizes.sequences * checked.sizes.tokens_per_sequence
    given = None
    if isinstance(engine, ServerSettings):
        tokens, given = min(tokens, engine.max_batch_tokens or tokens), engine.kv_cache_gb
    cache = 2 * shape.layers * shape.key_value * width * tokens if given is None else int(given * GIB)
    return {"weights": width * shape.parameters, "keys and values": cache}


def human(num_bytes: float) -> str:
    """Format bytes, such as "1.4 GiB" or "320 MiB"."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
