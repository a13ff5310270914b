"""`model.lora`: read by the model, the trainer and the engine."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import Field, model_validator

from atropos_exp.config.settings import Settings
from atropos_exp.errors import UserError


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021) instead of training every weight."""

    rank: Annotated[int, Field(ge=0, description="0: off")]
    alpha: int
    target_modules: list[str]

    @model_validator(mode="after")
    def _check(self) -> Self:
        wrong = []
        if self.rank and self.alpha <= 0:
            wrong.append(f"alpha: got {self.alpha}, expected more than 0 (adapters are scaled by alpha / rank)")
        if self.rank and not self.target_modules:
            wrong.append("target_modules: got none, expected the layers to adapt, such as [q_proj, v_proj]")
        if wrong:
            raise UserError("\n".join(wrong))
        return self

    def check_targets(self, layers: Iterable[str], *, architecture: str) -> None:
        """Raise UserError unless every target names one of the model's linear `layers`, given by their full names. As
        in PEFT a target is a layer's full name, or the end of it after a dot."""
        layers = list(layers)
        wrong = [one for one in self.target_modules if not any(f".{layer}".endswith(f".{one}") for layer in layers)]
        if not (self.rank and wrong):
            return
        ends = sorted({layer.rpartition(".")[2] for layer in layers})
        close = [match for one in wrong for match in difflib.get_close_matches(one, ends, n=1)]
        hint = f"Did you mean {', '.join(close)}?" if close else f"An example is model.lora.target_modules=[{ends[0]}]"
        raise UserError(
            f"model.lora.target_modules: got {', '.join(wrong)}, which is no linear layer of {architecture}; expected "
            f"some of {', '.join(ends)}. {hint}"
        )
