"""Our vLLM server with faults that a file in the folder of $VLLM_FAULTS turns on: those that no line can show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from atropos_exp.parts.engine.vllm import server
from atropos_exp.parts.engine.vllm.core import Core
from atropos_exp.parts.engine.vllm.worker import WeightWorker
from tests.helpers.faulty_lines import MATRIX


def is_on(fault: str) -> bool:
    return (Path(os.environ["VLLM_FAULTS"]) / fault).exists()


def main() -> None:
    forget, head = Core.forget_prefixes, WeightWorker.atropos_head_has_a_copy

    def forget_prefixes(self: Core) -> None:
        if not is_on("keeps_prefixes"):
            forget(self)

    def head_has_a_copy(self: Any) -> bool:
        return not is_on("forgets_head") and head(self)

    Core.forget_prefixes = forget_prefixes  # type: ignore[method-assign]
    WeightWorker.atropos_head_has_a_copy = head_has_a_copy  # type: ignore[method-assign]
    draw = Core.draw

    def draw_anything(self: Core, prompt: Any) -> tuple[int, float, int]:
        token, logprob, num_cached = draw(self, prompt)
        return token, logprob, 0 if is_on("hides_prefixes") else num_cached

    place = WeightWorker.atropos_place_adapter

    def place_adapter(self: Any, tensors: Any) -> None:
        if is_on("loses_one_inside"):
            tensors = {name: tensor for name, tensor in tensors.items() if name != MATRIX}
        if not is_on("keeps_adapter"):
            place(self, tensors)

    WeightWorker.atropos_place_adapter = place_adapter  # type: ignore[method-assign]
    Core.draw = draw_anything  # type: ignore[method-assign]
    server.main()


if __name__ == "__main__":
    main()
