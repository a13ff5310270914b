"""Our vLLM server on a CPU without oneDNN, so that its linear layers compute with plain parameters, as on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atropos_exp.parts.engine.vllm import server, worker
from tests.helpers.faulty_lines import SQUARE


def main() -> None:
    from vllm import _custom_ops
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    _custom_ops._supports_onednn = False
    worker.PLAIN_DEVICES = ("cpu",)
    load = Qwen2ForCausalLM.load_weights

    def load_weights(self: Any, weights: Iterable[tuple[str, Any]]) -> Any:
        """Loses a tensor after it has arrived, while the file is there."""
        loses = (Path(os.environ["VLLM_FAULTS"]) / "loses_one_inside").exists()
        return load(self, (pair for pair in weights if not (loses and pair[0] == SQUARE)))

    Qwen2ForCausalLM.load_weights = load_weights
    server.main()


if __name__ == "__main__":
    main()
