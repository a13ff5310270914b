"""What the model's thread does when: batches of waiting requests, pauses, refusals, deadlines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.hf.decode import Decoder
from atropos_exp.parts.engine.hf.scheduler import Generation, Scheduler
from atropos_exp.parts.engine.hf.weights import WeightStore
from atropos_exp.types import SamplingParams, TokenIds
from tests.helpers.random_models import VOCAB, random_model, random_prompts

LATER = 60.0


@dataclass
class Bench:
    """A scheduler whose turns the test takes by hand."""

    scheduler: Scheduler
    weights: WeightStore

    def ask(
        self, prompts: list[TokenIds], *, seconds: float = LATER, num_samples: int = 2, **params: Any
    ) -> Generation:
        defaults: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 4, "seed": 0}
        generation = Generation(
            prompts=prompts,
            params=SamplingParams(**{**defaults, "stop_token_ids": (), **params}),
            num_samples=num_samples,
            deadline=time.monotonic() + seconds,
        )
        self.scheduler.submit(generation)
        return generation


@pytest.fixture
def make_bench() -> Any:
    def make(max_batch_tokens: int = 4096) -> Bench:
        model = random_model()
        weights = WeightStore(model)
        decoder = Decoder(model, prefill_tokens=64, on_step=lambda: scheduler.on_step())
        scheduler = Scheduler(decoder, weights, max_batch_tokens=max_batch_tokens, batching_wait_seconds=0.0)
        return Bench(scheduler, weights)

    return make


def tokens_of(generation: Generation) -> list[int]:
    tokens: list[int] = generation.done.result(timeout=0)["token_ids"].tolist()
    return tokens


def test_waiting_requests_share_a_batch_and_keep_their_own_parameters(make_bench: Any) -> None:
    params = [
        {"temperature": 0.0, "max_tokens": 3},
        {"temperature": 1.3, "seed": 7},
        {"top_k": 2, "stop_token_ids": (3, 4, 5)},
        {"top_p": 0.6, "max_tokens": 6, "num_samples": 3},
    ]
    prompts = [random_prompts([3, 6], seed=seed) for seed in range(4)]
    alone = []
    for asked, given in zip(prompts, params, strict=True):
        bench = make_bench()
        generation = bench.ask(asked, **given)
        bench.scheduler.turn()
        alone.append(tokens_of(generation))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        bench = make_bench()
        together = {index: bench.ask(prompts[index], **params[index]) for index in order}
        bench.scheduler.turn()
        assert bench.scheduler.num_batches == 1
        assert bench.scheduler.num_rows == 4 + 4 + 4 + 6
        assert [tokens_of(together[index]) for index in range(4)] == alone


def test_work_beyond_the_batch_limit_is_cut_into_batches(make_bench: Any) -> None:
    prompts = random_prompts([9, 2, 5])
    whole, parts = make_bench(), make_bench(max_batch_tokens=40)  # 6 + 4 rows of 2 + 4 tokens, then fewer
    one, two = whole.ask(prompts, num_samples=4), parts.ask(prompts, num_samples=4)
    whole.scheduler.turn()
    while not two.done.done():
        parts.scheduler.turn()
    assert whole.scheduler.num_batches == 1
    # sorted by length: 4 rows of 2 (24 tokens), then with one of 5 it would be 5 × 9; 4 × 9; then 3 and 1 of 13
    assert parts.scheduler.num_batches == 4
    assert tokens_of(one) == tokens_of(two)


def test_a_single_row_above_the_limit_is_still_decoded(make_bench: Any) -> None:
    bench = make_bench(max_batch_tokens=1)
    generation = bench.ask(random_prompts([4]), num_samples=2)
    bench.scheduler.turn()
    assert not generation.done.done()
    bench.scheduler.turn()
    assert len(tokens_of(generation)) == 8


def test_pause_holds_generations_but_not_scores_and_probes(make_bench: Any) -> None:
    bench = make_bench()
    paused = bench.scheduler.pause(deadline=LATER)
    held = bench.ask(random_prompts([4]))
    score = bench.scheduler.score(lambda: "scored", deadline=LATER)
    probe = bench.scheduler.probe(lambda: "alive", deadline=LATER)
    bench.scheduler.turn()
    assert paused.done() and score.result(timeout=0) == "scored" and probe.result(timeout=0) == "alive"
    assert not held.done.done()
    bench.scheduler.resume()
    bench.scheduler.turn()
    assert len(tokens_of(held)) == 8


def test_a_probe_cuts_into_a_running_batch(make_bench: Any) -> None:
    """It arrives with the first forward pass and is answered before the batch ends."""
    bench = make_bench()
    generation = bench.ask(random_prompts([4]))
    seen = []
    step = bench.scheduler.on_step

    def first_step() -> None:
        bench.scheduler.on_step = step
        bench.scheduler.probe(lambda: seen.append(generation.done.done()), deadline=LATER)
        step()

    bench.scheduler.on_step = first_step
    bench.scheduler._decode_batch()
    assert seen == [False] and generation.done.done()


def test_incomplete_weights_hold_while_paused_and_refuse_otherwise(make_bench: Any) -> None:
    bench = make_bench()
    parameters = dict(random_model(seed=1).named_parameters())
    (first, *rest) = parameters
    bench.scheduler.pause(deadline=LATER)
    bench.weights.begin(7)
    bench.weights.load(first, parameters[first])
    held = bench.ask(random_prompts([4]))
    score = bench.scheduler.score(lambda: "scored", deadline=LATER)
    bench.scheduler.turn()
    assert not held.done.done() and not score.done()
    bench.scheduler.resume()
    bench.scheduler.turn()
    for done in (held.done, score):
        with pytest.raises(Refused, match=f"update to version 7 interrupted after 1 of {len(parameters)} tensors") as e:
            done.result(timeout=0)
        assert e.value.status == 409
    for name in rest:
        bench.weights.load(name, parameters[name])
    bench.weights.finish()
    served = bench.ask(random_prompts([4]))
    bench.scheduler.turn()
    assert served.done.result(timeout=0)["versions"].tolist() == [7, 7]


def test_a_held_request_learns_at_its_deadline_what_it_waited_for(make_bench: Any) -> None:
    bench = make_bench()
    bench.scheduler.pause(deadline=LATER)
    late = bench.ask(random_prompts([4]), seconds=-1.0)
    patient = bench.ask(random_prompts([4]))
    bench.scheduler.expire()
    with pytest.raises(Refused, match="until its deadline: paused") as e:
        late.done.result(timeout=0)
    assert e.value.status == 503 and not patient.done.done()


def test_a_failing_batch_is_told_to_its_requests_only(make_bench: Any) -> None:
    bench = make_bench()
    broken = bench.ask([np.array([VOCAB + 5], dtype=np.int32)])  # unchecked here: the embedding raises
    bench.scheduler.turn()
    with pytest.raises(IndexError):
        broken.done.result(timeout=0)
    fine = bench.ask(random_prompts([4]))
    bench.scheduler.turn()
    assert len(tokens_of(fine)) == 8


def test_a_cancelled_request_is_not_decoded(make_bench: Any) -> None:
    bench = make_bench()
    gone, kept = bench.ask(random_prompts([4])), bench.ask(random_prompts([5]))
    gone.done.cancel()
    bench.scheduler.turn()
    assert bench.scheduler.num_rows == 2 and len(tokens_of(kept)) == 8


def test_weight_store_accounts_for_every_tensor() -> None:
    """Each mistake of a sender, by name."""
    for tied in (True, False):
        store = WeightStore(random_model(tied=tied))
        parameters = dict(random_model(tied=tied, seed=1).named_parameters())
        assert set(store.account.expected) == set(parameters)
        name = "model.layers.0.mlp.down_proj.weight"
        with pytest.raises(Refused, match="without an update"):
            store.load(name, parameters[name])
        store.begin(1)
        store.load(name, parameters[name])
        for wrong, message in (
            (parameters[name], "sent twice"),
            (parameters[name].T, r"float32 \[96, 64\], expected float32 \[64, 96\]"),
            (parameters[name].bfloat16(), "got bfloat16"),
        ):
            target = name if message == "sent twice" else "model.layers.1.mlp.down_proj.weight"
            with pytest.raises(Refused, match=message):
                store.load(target, wrong)
        with pytest.raises(Refused, match=r"other\.weight is not a parameter"):
            store.load("other.weight", parameters[name])
        with pytest.raises(Refused, match=r"misses model\.embed_tokens\.weight, .* and \d+ more"):
            store.finish()
        assert store.account.version == 0 and store.account.problem is not None


def test_a_tied_head_sent_separately_must_agree() -> None:
    store = WeightStore(random_model())
    parameters = dict(random_model(seed=1).named_parameters())
    embedding = parameters["model.embed_tokens.weight"]
    for head, agrees in ((embedding, True), (embedding + 1, False)):
        store.begin(3)
        store.load("lm_head.weight", head)  # before the tensor it is tied to
        for name, tensor in parameters.items():
            store.load(name, tensor)
        if agrees:
            store.finish()
            assert store.account.version == 3 and store.account.problem is None
        else:
            with pytest.raises(Refused, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
                store.finish()
            assert store.account.problem is not None


def test_versions_never_go_back() -> None:
    model = random_model()
    store = WeightStore(model)
    store.begin(5)
    for name, parameter in model.named_parameters():
        store.load(name, parameter.clone())
    store.finish()
    store.begin(5)
    with pytest.raises(Refused, match="version 5 is already served"):
        store.begin(4)
