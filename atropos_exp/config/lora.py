"""`model.lora`: read by the model, the trainer and the engine."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from atropos_exp.config.settings import Settings
from atropos_exp.errors import UserError


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021) instead of training every weight."""

    rank: Annotated[int, Field(ge=0, le=65536, description="0: off")]
    alpha: Annotated[int, Field(ge=0, le=10**6)]
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

    def check_targets(
        self, layers: Iterable[str], experts: Mapping[str, Sequence[str]], *, architecture: str
    ) -> list[str]:
        """Return the targets that are projections of stacked experts. Raise UserError unless every target names one of
        the model's linear `layers`, given by their full names, or such a projection. As in PEFT a target is a layer's
        full name, or the end of it after a dot. `experts`: the stacked tensors, each with its projections, which are
        adapted together."""
        layers = list(layers)
        stacked = [one for projections in experts.values() for one in projections]
        wrong = [
            one
            for one in self.target_modules
            if one not in stacked and not any(f".{layer}".endswith(f".{one}") for layer in layers)
        ]
        if self.rank and wrong:
            ends = sorted({layer.rpartition(".")[2] for layer in layers} | {*stacked})
            close = [match for one in wrong for match in difflib.get_close_matches(one, ends, n=1)]
            hint = (
                f"Did you mean {', '.join(close)}?" if close else f"An example is model.lora.target_modules=[{ends[0]}]"
            )
            raise UserError(
                f"model.lora.target_modules: got {', '.join(wrong)}, which is no linear layer of {architecture}; "
                f"expected some of {', '.join(ends)}. {hint}"
            )
        for projections in experts.values():
            named = set(projections) & set(self.target_modules)
            if self.rank and named and (missing := set(projections) - named):
                raise UserError(
                    f"model.lora.target_modules: got {', '.join(sorted(named))} without {', '.join(sorted(missing))}; "
                    f"the experts of {architecture} have them in one tensor, which is adapted as one: name all or none"
                )
        return [one for one in self.target_modules if self.rank and one in stacked]
