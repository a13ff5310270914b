"""Whether a model's files hold what its architecture needs: a tensor that is missing would start as random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.errors import UserError
from atropos_exp.weights.tensors import some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 5  # names in a message
REMEDY = "fetch the model again"


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundModel:
    """What a model's files were found to hold."""

    unused: list[str]  # tensors that the architecture has no use for
    architecture: str  # the name of its class
    linear: list[str]  # its linear layers but the output head, by their full names
    experts: dict[str, list[str]]  # tensors of stacked experts, and the projections that LoRA calls each by


def check_tensors(folder: Path, *, trust_remote_code: bool) -> FoundModel:
    """Hold the tensors in `folder` against the architecture of its config.json. No weight is read.

    Raises UserError for tensors that are missing, of another shape, or in a damaged file.
    """
    from transformers import AutoModelForCausalLM

    check_files(folder)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except Exception as error:  # whatever the architecture's code raises
        raise UserError(
            f"the model in {folder} cannot be loaded: {type(error).__name__}: {error}. If its config.json is not at "
            f"fault, {REMEDY}"
        ) from error
    missing = sorted(found["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in found["mismatched_keys"])
    if missing or mismatched:
        what = " and ".join(
            f"{len(names)} tensors {problem} ({some(names, SHOWN)})"
            for names, problem in ((missing, "are missing"), (mismatched, "have another shape"))
            if names
        )
        raise UserError(
            f"the files in {folder} do not fit its config.json: {what}. They would be trained from random numbers; "
            f"{REMEDY}, or correct its config.json"
        )
    return FoundModel(
        unused=sorted(found["unexpected_keys"]),
        architecture=type(model).__name__,
        linear=_linear_layers(model),
        experts=_stacked_experts(model),
    )


def check_files(folder: Path) -> None:
    """Raise UserError for a damaged file. The header of each says how long it must be; PyTorch is not imported."""
    for path in sorted(folder.glob("*.safetensors")):
        _check_file(path)


def _check_file(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged or only half there: {error}. Delete it and {REMEDY}"
        ) from error


def _linear_layers(model: PreTrainedModel) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight transposed

    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _stacked_experts(model: PreTrainedModel) -> dict[str, list[str]]:
    """What PEFT adapts although it is no layer: transformers holds all experts' projections in one tensor of three
    dimensions, and PEFT knows them by the names that they have on the hub."""
    from peft.utils import transformers_weight_conversion as peft_names

    kind = peft_names._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    stacked = {name.rpartition(".")[2] for name, tensor in model.named_parameters() if tensor.dim() == 3}
    found: dict[str, list[str]] = {}
    for projection, tensor in peft_names._MOE_TARGET_MODULE_MAPPING.get(kind, {}).items():
        if tensor in stacked:
            found.setdefault(tensor, []).append(projection)
    return found
