"""The server's account of an update whose LoRA matrices come by themselves, and of the base before them."""

from __future__ import annotations

import pytest

from atropos_exp.errors import Refused
from atropos_exp.weights.account import UpdateAccount
from atropos_exp.weights.receiver import adapter_tensors

BASE = {
    "model.embed_tokens.weight": ("bfloat16", (48, 16)),
    "model.layers.0.self_attn.q_proj.weight": ("bfloat16", (32, 16)),
    "model.layers.0.self_attn.q_proj.bias": ("bfloat16", (32,)),
    "model.layers.0.self_attn.k_proj.weight": ("bfloat16", (8, 16)),
    "model.layers.0.mlp.up_proj.weight": ("bfloat16", (24, 16)),
    "model.layers.0.mlp.shared_up_proj.weight": ("bfloat16", (24, 16)),
}
ADAPTER = {
    "model.layers.0.self_attn.q_proj.lora_A.weight": ("bfloat16", (4, 16)),
    "model.layers.0.self_attn.q_proj.lora_B.weight": ("bfloat16", (32, 4)),
    "model.layers.0.mlp.up_proj.lora_A.weight": ("bfloat16", (4, 16)),
    "model.layers.0.mlp.up_proj.lora_B.weight": ("bfloat16", (24, 4)),
}


def bring(account: UpdateAccount, kinds: dict, *, finish: bool = True) -> None:
    account.begin(account.version + 1)
    for name, kind in kinds.items():
        account.admit(name, kind)
        account.received(name)
    if finish:
        account.check_complete()
        account.finish()


@pytest.fixture
def account() -> UpdateAccount:
    """With the base, after two updates."""
    account = UpdateAccount(BASE, {}, adapter=ADAPTER)
    assert account.expected == BASE | ADAPTER
    bring(account, BASE | ADAPTER)
    assert account.expected == ADAPTER
    bring(account, ADAPTER)
    assert (account.version, account.problem, account.expected) == (2, None, ADAPTER)
    return account


def test_every_targeted_linear_layer_has_two_matrices() -> None:
    assert adapter_tensors(BASE, rank=4, target_modules=["q_proj", "up_proj"]) == ADAPTER
    assert adapter_tensors(BASE, rank=0, target_modules=[]) == {}


def test_without_an_adapter_all_comes_every_time() -> None:
    account = UpdateAccount(BASE, {})
    bring(account, BASE)
    assert account.expected == BASE
    with pytest.raises(Refused, match=r"lora_A\.weight is not a parameter of the served model"):
        bring(account, ADAPTER)


def test_what_is_missing_unknown_or_of_another_shape_is_refused(account: UpdateAccount) -> None:
    name, kind = next(iter(ADAPTER.items()))
    few = {other: kind for other, kind in ADAPTER.items() if other != name}
    with pytest.raises(Refused, match=f"update to version 3 misses {name} of 4 tensors"):
        bring(account, few)
    assert account.expected == BASE | ADAPTER, "after a failure the base is wanted again"
    with pytest.raises(Refused, match=r"update to version 3 misses .* and 3 more of 10 tensors"):
        bring(account, ADAPTER)
    bring(account, BASE | ADAPTER)
    for wrong in (
        {name.replace("q_proj", "k_proj"): kind},
        {name: ("bfloat16", (16, 4))},
        {name: ("float32", (4, 16))},
    ):
        with pytest.raises(Refused, match=r"not a parameter|got"):
            bring(account, wrong)


def test_a_base_that_comes_although_it_is_held_must_be_whole(account: UpdateAccount) -> None:
    """So it is where another server of the same engine was started anew."""
    bring(account, BASE | ADAPTER)
    assert account.expected == ADAPTER
    part = dict(list(BASE.items())[:2])
    with pytest.raises(Refused, match="update to version 4 misses"):
        bring(account, part | ADAPTER)


@pytest.mark.parametrize("trouble", ["abort", "interruption", "sleep"])
def test_whatever_touches_the_weights_asks_for_the_base(account: UpdateAccount, trouble: str) -> None:
    if trouble == "sleep":
        account.fall_asleep()
    else:
        bring(account, {}, finish=False)
        account.mark_incomplete()
        account.abort() if trouble == "abort" else account.begin(3)
    assert account.expected == BASE | ADAPTER
