"""vLLM's LoRA kernels and CUDA graphs on a GPU serve matrices that come by themselves, beside a base sent once."""

from __future__ import annotations

from pathlib import Path

import pytest

from atropos_exp.types import SamplingParams
from atropos_exp.weights.digest import digest
from tests.helpers.engines import engine_settings, start_random
from tests.helpers.held_adapter import CHOICE, HeldAdapter, largest_gap
from tests.helpers.publishing import manage
from tests.helpers.random_models import random_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(), seed=0)


def test_an_adapter_beside_its_base(device: str, tmp_path: Path) -> None:
    if problems := engine_settings("vllm", lora="adapter").preflight(device=device, lora=CHOICE):
        pytest.skip(problems[0])
    engine = start_random(
        "vllm", tmp_path, random_model(), max_length=300, device=device, adapter=CHOICE, dtype="bfloat16",
        transport="shm", kv_cache_gb=0.25,
    )  # fmt: skip
    try:
        trainer = HeldAdapter(random_model(seed=1))  # float32, on the CPU
        num_matrices = len(trainer.matrices())
        for version in (1, 2, 3):
            trainer.disturb(0.1)
            stats = manage(trainer, engine, tolerance=None).publish(version)
            sent = {name: tensor.bfloat16() for name, tensor in trainer.adapter(with_base=version == 1)}
            assert engine.replicas[0].digests() == {name: digest(tensor) for name, tensor in sent.items()}
            assert stats.digests_compared == len(sent) == (num_matrices if version > 1 else num_matrices + 26)
            if device == "cuda":
                assert engine.replicas[0].info()["num_resident_digests"] == len(sent)
            assert stats.canary_gap_mean < 0.2
            assert largest_gap(trainer, engine, GREEDY) < 1.0
            with trainer.model.disable_adapter():
                assert largest_gap(trainer, engine, GREEDY) > 2.0, "the base says other things"
    finally:
        engine.stop()
