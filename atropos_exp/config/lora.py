"""`model.lora`: read by the model, the trainer and the engine."""

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
