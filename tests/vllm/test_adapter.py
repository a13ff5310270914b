"""LoRA matrices that travel by themselves: vLLM serves them beside a base that it has got once, and all is proven."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.assembly.resync import Resync
from atropos_exp.errors import EngineError, EngineLost, SyncError
from atropos_exp.processes.ranks import Ranks
from atropos_exp.types import SamplingParams
from atropos_exp.weights.digest import digest
from tests.helpers.engines import engine_settings
from tests.helpers.faulty_lines import MATRIX, BreaksHalfWay, LosesOne, TransposesOne
from tests.helpers.held_adapter import CHOICE, HeldAdapter, largest_gap
from tests.helpers.publishing import manage
from tests.helpers.random_models import completion_logprobs, random_model, random_prompts

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(), seed=0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, top_k=0, max_tokens=8, stop_token_ids=(), seed=3)
NUM_BASE, NUM_MATRICES = 26, 2 * 2 * 6  # of `random_model`; layers × A and B × targets


@pytest.fixture(scope="module")
def trainer() -> HeldAdapter:
    return HeldAdapter(random_model(seed=1))


def publish(trainer: Any, engine: Any, **changes: Any) -> Any:
    return manage(trainer, engine, **changes).publish(engine.version() + 1)


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_the_base_is_sent_once_and_then_matrices_alone(adapted: Any, trainer: HeldAdapter) -> None:
    counts = []
    for bucket_bytes in (1, 40_000, 1 << 30):
        trainer.disturb()
        stats = publish(trainer, adapted, bucket_bytes=bucket_bytes)
        sent = dict(trainer.adapter(with_base=not counts))
        assert stats.num_bytes == sum(tensor.numel() * 4 for tensor in sent.values())
        expected = {name: digest(tensor) for name, tensor in sent.items()}
        assert [one.digests() for one in adapted.replicas] == [expected, expected]
        assert stats.digests_compared == len(sent) and stats.canary_gap_max < 1e-4
        counts.append(stats.num_tensors)
        for one in adapted.replicas:
            assert len(one.info()["expected"]) == NUM_MATRICES
            assert one.info()["num_resident_digests"] >= NUM_MATRICES, "none of what merely arrived"
        for params in (GREEDY, SAMPLED):
            assert largest_gap(trainer, adapted, params) < 1e-4
            with trainer.model.disable_adapter():
                assert largest_gap(trainer, adapted, params) > 0.5, "the base says other things"
    assert counts == [NUM_BASE + NUM_MATRICES, NUM_MATRICES, NUM_MATRICES]


@pytest.mark.vllm
def test_merged_weights_say_the_same(adapted: Any, engine: Any, trainer: HeldAdapter) -> None:
    publish(trainer, adapted)
    publish(trainer, engine)  # an engine that asks for no matrices gets W + scale * B @ A
    prompts = random_prompts([6, 200], seed=8)
    ours, theirs = (one.generate(prompts, GREEDY, num_samples=1) for one in (adapted, engine))
    for (mine,), (other,) in zip(ours, theirs, strict=True):
        assert mine.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.vllm
def test_no_key_or_value_of_an_older_adapter_is_read(adapted: Any, faults: Path, trainer: HeldAdapter) -> None:
    (prompt,) = random_prompts([280], seed=21)
    publish(trainer, adapted)
    for _ in range(2):
        ((old,),) = adapted.generate([prompt], GREEDY, num_samples=1)
    server = adapted.replicas[1]  # the one that gets a single prompt
    before = server.info()
    assert before["num_cached_tokens"] > 0, "the cache was in use"
    trainer.disturb(0.1)
    publish(trainer, adapted)
    ((new,),) = adapted.generate([prompt], GREEDY, num_samples=1)
    after = server.info()
    assert after["num_cached_tokens"] == before["num_cached_tokens"]
    assert after["num_cache_proofs"] == before["num_cache_proofs"] + 1
    np.testing.assert_allclose(new.logprobs, completion_logprobs(trainer.model, prompt, new.token_ids), atol=1e-4)
    assert np.abs(old.logprobs[0] - new.logprobs[0]) > 1e-2, "the adapter did change what is said"

    (faults / "keeps_prefixes").touch()
    try:
        with pytest.raises(EngineError, match="the prefix cache still gives keys and values of the weights before"):
            publish(trainer, adapted)
    finally:
        (faults / "keeps_prefixes").unlink()
    assert_starts_over(trainer, adapted)


def assert_starts_over(trainer: HeldAdapter, engine: Any) -> None:
    """It refuses to sample until it has got everything again."""
    with pytest.raises(EngineError, match="answered 409: weights incomplete"):
        engine.check()
    assert publish(trainer, engine).num_tensors == NUM_BASE + NUM_MATRICES
    assert largest_gap(trainer, engine, GREEDY) < 1e-4


class LosesMatrix(LosesOne):
    which = MATRIX


class TransposesMatrix(TransposesOne):
    which = MATRIX


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (LosesMatrix, SyncError, f"the engine gave no digest of {MATRIX}"),
        (TransposesMatrix, SyncError, rf"other bits than were sent of {MATRIX} \(1 tensors differ\)"),
        (BreaksHalfWay, ConnectionError, "the line is cut"),
    ],
)
def test_faults_on_the_line(adapted: Any, trainer: Any, line: Any, error: type[Exception], message: str) -> None:
    publish(trainer, adapted)
    with pytest.raises(error, match=message):
        publish(trainer, line(adapted), bucket_bytes=1)
    assert_starts_over(trainer, adapted)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("loses_one_inside", rf"other bits than were sent of {MATRIX} \(1 tensors differ\)"),
        ("keeps_adapter", rf"other bits than were sent of .* \({NUM_MATRICES} tensors differ\)"),
    ],
)
def test_matrices_that_arrive_and_are_not_used(
    adapted: Any, faults: Path, trainer: Any, fault: str, message: str
) -> None:
    """Digests of what arrived would be right."""
    publish(trainer, adapted)
    trainer.disturb(0.001)
    (faults / fault).touch()
    try:
        with pytest.raises(SyncError, match=message):
            publish(trainer, adapted)
    finally:
        (faults / fault).unlink()
    assert_starts_over(trainer, adapted)


@pytest.mark.vllm
def test_what_the_trainer_gives_wrongly(adapted: Any, trainer: HeldAdapter) -> None:
    def giving(change: Any) -> HeldAdapter:
        class Wrong(HeldAdapter):
            def __init__(self) -> None:
                self.model, self.num_given = trainer.model, 0

            def adapter(self, *, with_base: bool) -> Any:
                return change(dict(super().adapter(with_base=with_base)))

        return Wrong()

    def without(given: dict[str, Any]) -> Any:
        del given[MATRIX]
        yield from given.items()

    def another(given: dict[str, Any]) -> Any:
        yield from given.items()
        yield "model.layers.0.self_attn.k_proj.lora_A.weight", given["model.layers.0.self_attn.q_proj.lora_A.weight"]

    def transposed(given: dict[str, Any]) -> Any:
        yield from {**given, MATRIX: given[MATRIX].T.contiguous()}.items()

    def unscaled(given: dict[str, Any]) -> Any:
        yield from ((name, tensor / 1.5 if ".lora_B." in name else tensor) for name, tensor in given.items())

    cases = (
        (without, SyncError, f"{MATRIX} of {NUM_MATRICES} tensors never sent to the engine"),
        (another, EngineError, r"answered 400: .*k_proj\.lora_A\.weight is not a parameter of the served model"),
        (transposed, EngineError, rf"{MATRIX}: got float32 \[6, 64\], expected float32 \[64, 6\]"),
        (unscaled, SyncError, r"canary prompt \d, token \d+: the engine gives -.* and the trainer -"),
    )
    for change, error, message in cases:
        publish(trainer, adapted)
        with pytest.raises(error, match=message):
            publish(giving(change), adapted)
        assert_starts_over(trainer, adapted)


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_a_server_that_is_killed_gets_base_and_adapter_again(adapted: Any, trainer: HeldAdapter) -> None:
    """So does the other one, which held the base all the time."""
    version = adapted.version() + 1
    resync = Resync(manage(trainer, adapted), adapted, Ranks(rank=0, world_size=1), max_restarts=1)
    resync.publish(version)
    os.kill(adapted.replicas[1].process.pid, signal.SIGKILL)
    with pytest.raises(EngineLost):
        adapted.generate(random_prompts([5, 9]), GREEDY, num_samples=1)
    resync.through(lambda: adapted.generate(random_prompts([5, 9]), GREEDY, num_samples=1), undo=lambda: None)
    assert (resync.num_restarts, resync.num_verified) == (1, 2)
    everything = {name: digest(tensor) for name, tensor in trainer.adapter(with_base=True)}
    assert [one.digests() for one in adapted.replicas] == [everything, everything]
    trainer.disturb()
    assert resync.publish(version + 1).num_tensors == NUM_MATRICES
    assert largest_gap(trainer, adapted, GREEDY) < 1e-4


def test_what_does_not_fit_is_said_before_anything_starts() -> None:
    def problems(device: str = "cpu", *, rank: int = 8, targets: Any = ("q_proj",), **changes: Any) -> list[str]:
        lora = type(CHOICE)(rank=rank, target_modules=list(targets))
        found = engine_settings("vllm", lora="adapter", **changes).preflight(device=device, lora=lora)
        return [problem for problem in found if "engine.lora=adapter" in problem]

    assert problems() == problems("cuda") == []
    (none,) = problems(rank=0)
    assert "but model.lora.rank is 0: there are none; use engine.lora=merged" in none
    (large,) = problems(rank=513)
    assert "has room for a rank of 512 in vLLM; model.lora.rank is 513" in large
    (head,) = problems(targets=["q_proj", "lm_head"])
    assert "model.lora.target_modules has lm_head" in head
    (kernels,) = problems("cuda", dtype="float32")
    assert "no float32 on a GPU" in kernels
    (turns,) = problems("cuda", colocate=True)
    assert "engine.colocate=true throws it away at every update" in turns
    arguments = engine_settings("vllm", lora="adapter").engine_arguments("cpu", CHOICE)
    assert arguments["max_lora_rank"] == 8 and arguments["max_loras"] == 1
