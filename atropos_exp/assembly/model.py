"""What is found out about a model before anything starts: whether its files are whole, and how it can be trained."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.assembly.check import Checked
from atropos_exp.errors import UserError

if TYPE_CHECKING:
    from contextlib import ExitStack

    from atropos_exp.assembly.parts import Parts
    from atropos_exp.parts.model.completeness import FoundModel
    from atropos_exp.parts.trainer.layouts import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class TriedModel:
    """A model that can be trained."""

    layout: Layout
    twin: Path | None  # the folder of its small twin, on rank 0's machine; None if there is none


def try_model(checked: Checked, model_folder: Path, twin_folder: Path, stack: ExitStack) -> TriedModel:
    """Check the files in `model_folder`, and try the model's small twin, which lies in `twin_folder` while the stack is
    open. Says what it found; raises UserError."""
    from atropos_exp.parts.model import hf_folder
    from atropos_exp.parts.model.completeness import check_tensors
    from atropos_exp.parts.model.quiet import quiet
    from atropos_exp.parts.model.twin import make_twin

    model, trainer = checked.parts.model, checked.parts.trainer
    trust = model.trust_remote_code
    shutil.rmtree(twin_folder, ignore_errors=True)  # of a run that was killed
    stack.callback(shutil.rmtree, twin_folder, ignore_errors=True)
    if problems := hf_folder.token_problems(model_folder):
        raise UserError("\n".join(problems))
    with quiet():
        found = check_tensors(model_folder, trust_remote_code=trust)
        if found.unused:
            print(
                f"model: {len(found.unused)} tensors of its files are not used, such as {found.unused[0]}", flush=True
            )
        _check_lora(checked.parts, found)
        try:
            twin = make_twin(model_folder, twin_folder, max_length=checked.max_sequence_length, trust_remote_code=trust)
        except UserError as error:
            if trainer.layout == "auto":
                raise UserError(
                    f"{error}, so nobody knows which layouts are exact for it. trainer.layout=single trains one "
                    "sequence at a time, which is always exact"
                ) from error
            return TriedModel(layout=trainer.untried_layout(model), twin=None)
        choice = trainer.choose_layout(twin, model=model, device=checked.device)
    if choice.rejected:
        print(f"model: trained with {choice}", flush=True)
    if choice.without_gradient:
        first = choice.without_gradient[0]
        print(f"model: text trains all but {len(choice.without_gradient)} weights, such as {first}", flush=True)
    return TriedModel(layout=choice.layout, twin=twin)


def _check_lora(parts: Parts, found: FoundModel) -> None:
    """Raise UserError for targets that the model does not have, or that the engine cannot serve beside the base."""
    experts = parts.model.lora.check_targets(found.linear, found.experts, architecture=found.architecture)
    if not experts:
        return
    if parts.engine.lora == "adapter":
        raise UserError(
            f"engine.lora=adapter: {', '.join(experts)} in model.lora.target_modules are experts of "
            f"{found.architecture}, of which no engine takes LoRA matrices by themselves. Use engine.lora=merged, or "
            "name other layers"
        )
    if plain := [layer for layer in found.linear if layer.rpartition(".")[2] in experts]:
        print(
            f"model: LoRA adapts the {', '.join(experts)} of experts alone, as PEFT does; {len(plain)} layers of the "
            f"same names, such as {plain[0]}, stay as they are",
            flush=True,
        )
