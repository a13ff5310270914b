"""The same path on a GPU: the server holds bfloat16 weights there and gives the trainer's logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.types import SamplingParams
from atropos_exp.weights.digest import digest
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model


@pytest.mark.gpu
def test_a_gpu_server_is_synced_and_samples(tmp_path: Path, start: Any) -> None:
    trainer = HeldModel(random_model(seed=1))
    engine = start(tmp_path, random_model(seed=0), device="cuda", dtype="auto")
    try:
        assert engine.dtype == "bfloat16"
        stats = manage(trainer, engine, tolerance=None).publish(1)
        assert stats.canary_gap_max < 0.2
        parameters = dict(trainer.model.named_parameters())
        assert engine.replicas[0].digests() == {name: digest(tensor.bfloat16()) for name, tensor in parameters.items()}
        prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (2, 9)]
        params = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, max_tokens=6, stop_token_ids=(2,), seed=0)
        for prompt, group in zip(prompts, engine.generate(prompts, params, num_samples=16), strict=True):
            for sample in group:
                (scored,) = engine.score([np.concatenate([prompt, sample.token_ids])], temperature=0.8)
                np.testing.assert_allclose(sample.logprobs, scored[len(prompt) - 1 :], atol=0.2)
    finally:
        engine.stop()
