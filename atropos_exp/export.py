"""`python -m atropos_exp.export CHECKPOINT OUT`: a checkpoint as a Hugging Face folder: LoRA merged, tensors as
the model's own files have them.

CHECKPOINT is a run folder (its newest intact checkpoint), its `checkpoints` folder, or one checkpoint. OUT then loads
with `AutoModelForCausalLM.from_pretrained` and in every engine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_exp.errors import UserError
from atropos_exp.parts.model import hf_folder
from atropos_exp.parts.trainer.adapters import Adaptation, plain_name
from atropos_exp.runs import manifest
from atropos_exp.runs.atomic import fsync
from atropos_exp.runs.checkpoints import Checkpoint, find_latest, open_checkpoint
from atropos_exp.weights.tensors import safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The folder that was written."""

    step: int
    dtype: str
    num_tensors: int
    num_bytes: int
    num_merged: int  # weights that an adapter was added to


def export(source: Path, out: Path, dtype: str | None = None) -> Exported:
    """Write the model of `source`, a run folder or a checkpoint, to the new folder `out`.

        export(Path("outputs/demo/2025-01-31/12-00-00"), Path("exported"), dtype="bfloat16")

    `dtype`: None keeps the one that config.json names. `out` appears complete or not at all. Raises UserError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; name a new folder")
    checkpoint = choose(source)
    weights, model = _folders(checkpoint.folder)
    config = hf_folder.read_json(model / "config.json")
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    temporary = out.resolve().with_name(f".{out.resolve().name}.{uuid.uuid4().hex}")
    try:
        hf_folder.copy_description(model, temporary)
        config = {**{key: value for key, value in config.items() if key != "torch_dtype"}, "dtype": dtype}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        num_tensors, num_bytes, num_merged = _write_weights(weights, model, temporary, dtype)
        for path in temporary.iterdir():
            fsync(path)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was published
    return Exported(
        step=checkpoint.step, dtype=dtype, num_tensors=num_tensors, num_bytes=num_bytes, num_merged=num_merged
    )


def choose(source: Path) -> Checkpoint:
    """Return the checkpoint that `source` names or contains, verified. Raises UserError without an intact one."""
    if not source.is_dir():
        raise UserError(
            f"{source} does not exist; name a run folder, or a checkpoint such as RUN/checkpoints/step_000010"
        )
    if (source / manifest.MANIFEST).is_file():
        try:
            return open_checkpoint(source)
        except manifest.DamagedError as error:
            raise UserError(f"the checkpoint {source} is damaged: {error}; name another one") from error
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found, damaged = find_latest(folder)
    if found is None:
        reasons = "".join(f"; {path.name} is damaged: {reason}" for path, reason in damaged.items())
        raise UserError(f"no checkpoint in {folder}{reasons}")
    return found


def _folders(checkpoint: Path) -> tuple[Path, Path]:
    """Where in the checkpoint the weights lie, and where configuration and tokenizer: in `model/`, or at the top."""
    folders = (checkpoint / "model", checkpoint)
    weights = next((folder for folder in folders if any(folder.glob("model*.safetensors"))), None)
    model = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if weights is None or model is None:
        missing = "weights (model*.safetensors)" if weights is None else "config.json"
        raise UserError(f"{checkpoint} has no {missing}, neither in model/ nor at the top, so it cannot be exported")
    return weights, model


def _write_weights(model: Path, description: Path, out: Path, dtype: str) -> tuple[int, int, int]:
    """Cast, merge adapters and give the hub's names, file by file: in memory are one file's tensors, and those that one
    conversion needs together."""
    import torch
    from safetensors.torch import save_file

    adapters = _Adapters(model)
    files = _files(model, "model")
    name_of_file = ""

    def merged() -> Iterator[tuple[str, Tensor]]:
        nonlocal name_of_file
        for name_of_file in files:
            for name, tensor in _tensors(model / name_of_file):
                tensor = adapters.merge(name, tensor)
                yield name, tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor

    weight_map: dict[str, str] = {}
    num_bytes = 0
    content: dict[str, Tensor] = {}
    current = files[0]
    for name, tensor in _on_hub(model, description, files, merged()):
        if name_of_file != current:
            if content:
                save_file(content, out / current, metadata={"format": "pt"})
            content, current = {}, name_of_file
        content[name] = tensor
        num_bytes += tensor.nbytes
        weight_map[name] = current
    save_file(content, out / current, metadata={"format": "pt"})
    if adapters.unmerged:
        raise UserError(f"{model} has an adapter for {min(adapters.unmerged)}, which is not a weight of the model")
    if set(weight_map.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return len(weight_map), num_bytes, adapters.num_merged


def _on_hub(
    model: Path, description: Path, files: list[str], tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, which have transformers' names, as the model's files on the hub have them. A
    checkpoint of an older version does not say what transformers did to them: then what it does by default counts."""
    described = _facts(model).get("conversions")
    if described == []:
        return tensors  # without importing transformers
    from atropos_exp.parts.trainer.hub_names import names_of_a_checkpoint

    headers = [safetensors_header(model / file) for file in files]
    shapes = {name: entry["shape"] for header in headers for name, entry in header.items()}
    return names_of_a_checkpoint(description, shapes, described).convert(tensors)


def _facts(model: Path) -> dict[str, Any]:
    """What the trainer wrote about its checkpoint."""
    return hf_folder.read_json(model / "trainer.json", optional=True)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # not a dictionary: it cannot be iterated
            yield name, opened.get_tensor(name)


def _files(folder: Path, stem: str) -> list[str]:
    """The names of the files with a model's or an adapter's tensors, from the index or by the only file; [] without."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return sorted(set(hf_folder.read_json(index)["weight_map"].values()))
    only = folder / f"{stem}.safetensors"
    return [only.name] if only.is_file() else []


class _Adapters:
    """LoRA matrices as the trainer saves them: `base_model.model.<module>.lora_A.default.weight` and `lora_B`."""

    def __init__(self, model: Path) -> None:
        self.num_merged = 0
        self.unmerged: dict[str, dict[str, Tensor]] = {}  # layer -> its matrices "A" and "B"
        for file in _files(model, "adapter"):
            for name, tensor in _tensors(model / file):
                layer, _, rest = name.partition(".lora_")
                self.unmerged.setdefault(layer, {})[rest[0]] = tensor.float()
        self._by_weight = {}
        if self.unmerged:
            self._by_weight = {one.weight: (layer, one) for layer, one in _adaptations(model, self.unmerged).items()}

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """W + scaling * B @ A, in float32; `weight` itself if it has no adapter."""
        if name not in self._by_weight:
            return weight
        layer, adaptation = self._by_weight.pop(name)
        pair = self.unmerged.pop(layer)
        self.num_merged += 1
        merged: Tensor = weight.float() + adaptation.delta(pair["A"], pair["B"])
        return merged


def _adaptations(model: Path, layers: Iterable[str]) -> dict[str, Adaptation]:
    """What the matrices of each layer do, as the trainer wrote; older versions had adapters of linear layers only."""
    facts = _facts(model)
    if "adapted" in facts:
        return {layer: Adaptation(**values) for layer, values in facts["adapted"].items()}
    scaling = facts["lora"]["alpha"] / facts["lora"]["rank"]
    return {
        layer: Adaptation(weight=f"{plain_name(layer)}.weight", scaling=scaling, num_experts=1, transposed=False)
        for layer in layers
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m atropos_exp.export", description=__doc__.split(":", 1)[1].strip())
    parser.add_argument("checkpoint", type=Path, help="run folder, its checkpoints folder, or one checkpoint")
    parser.add_argument("out", type=Path, help="new folder for the Hugging Face model")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the one in the model's config.json)")
    options = parser.parse_args(arguments)
    try:
        done = export(options.checkpoint, options.out, options.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    merged = f", {done.num_merged} adapters merged" if done.num_merged else ""
    size = f"{done.num_tensors} tensors, {done.num_bytes / 1e6:.1f} MB {done.dtype}"
    print(f"{options.out}: step {done.step}, {size}{merged}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
