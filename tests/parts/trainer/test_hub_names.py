"""Tensors under the hub's names: what the streamed conversion gives is what `save_pretrained` writes, bit for bit."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from atropos_exp.errors import UserError
from atropos_exp.export import export
from atropos_exp.parts.model.hf_folder import copy_description
from atropos_exp.parts.trainer.hub_names import HubNames, describe, names_of_a_checkpoint
from atropos_exp.parts.trainer.weights import named_tensors
from atropos_exp.runs.checkpoints import Checkpoints
from tests.helpers.random_models import plain_logprobs, random_model, random_prompts
from tests.helpers.trainer_cases import Lora, Model, WeightedLoss, full_weights, make_batch, settings

KINDS = ("qwen2", "qwen3_moe", "mixtral", "gemma3", "hrm_text")
EXPERT = {
    "qwen3_moe": "model.layers.1.mlp.experts.3.up_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w3.weight",
    "gemma3": "language_model.model.layers.1.mlp.up_proj.weight",
}


def written(folder: Path, kind: str) -> Path:
    """A small random model as `save_pretrained` writes it."""
    if kind in ("qwen2", "qwen3_moe", "mixtral"):
        random_model(kind=kind, tied=kind == "qwen2", seed=4).save_pretrained(folder)
    elif kind == "gemma3":
        text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 48,
                "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        save_config(AutoConfig.for_model(kind, text_config=text, vision_config=vision), folder)
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 48}
        save_config(AutoConfig.for_model(kind, **sizes, num_attention_heads=2, num_key_value_heads=2), folder)
    return folder


def save_config(config: Any, folder: Path) -> None:
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_and_bits_of_the_files(tmp_path: Path, kind: str) -> None:
    """Also for a model of which only the checkpoint is there, and what was written down of it, or nothing."""
    wanted = read(written(tmp_path, kind))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    given = named_tensors(model)
    assert kind == "qwen2" or given.keys() != wanted.keys()
    assert kind not in EXPERT or EXPERT[kind] in wanted
    assert same(dict(HubNames(model, given).convert(given.items())), wanted)

    shapes = {name: list(tensor.shape) for name, tensor in given.items()}
    described = json.loads(json.dumps(describe(model)))
    assert (described == []) is (kind == "qwen2")
    for facts in (described, None):
        assert same(dict(names_of_a_checkpoint(tmp_path, shapes, facts).convert(given.items())), wanted)


@pytest.mark.parametrize(("kind", "most"), [("qwen3_moe", 1), ("hrm_text", 4)])
def test_only_what_one_conversion_needs_is_held(tmp_path: Path, kind: str, most: int) -> None:
    """`most`: tensors that one conversion needs together; gate, q, k and v are one tensor in hrm_text's files."""
    model = AutoModelForCausalLM.from_pretrained(written(tmp_path, kind), dtype=torch.float32)
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    largest = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal largest
        for name, tensor in named_tensors(model).items():
            copy = tensor.detach().clone()
            alive.append(weakref.ref(copy.untyped_storage()))
            del tensor
            largest = max(largest, sum(one() is not None for one in alive))
            yield name, copy
            del copy

    names = HubNames(model, named_tensors(model))
    num_given = sum(1 for _ in names.convert(stream()))
    assert num_given == len(read(tmp_path))
    assert most <= largest <= most + 1


def test_what_cannot_be_undone_is_said(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written(tmp_path, "qwen3_moe"), dtype=torch.float32)
    names = HubNames(model, named_tensors(model))
    adapter = [("model.layers.0.mlp.experts.lora_A.weight", torch.zeros(8, 64))]
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts is not one layer on the hub.*lora=merged"):
        list(names.convert(adapter))
    described = [{**one, "operations": [["Untie", {}]]} for one in describe(model)]
    with pytest.raises(UserError, match="conversion Untie, which this version of transformers does not know"):
        names_of_a_checkpoint(tmp_path, {}, described)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("qwen3_moe", Lora()),
        ("mixtral", Lora()),
        ("qwen3_moe", Lora(rank=3, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
        ("mixtral", Lora(rank=3, target_modules=["q_proj", "w1", "w2", "w3"])),
        ("gpt2", Lora(rank=3, target_modules=["c_attn", "c_proj"])),  # its matrices are stored transposed
    ],
)
def test_a_trained_model_is_exported_as_the_hub_has_it(tmp_path: Path, kind: str, lora: Lora) -> None:
    """LoRA on experts included: what plain transformers says of the exported folder is what the trainer says."""
    folder = tmp_path / "model"
    if kind == "gpt2":
        save_config(AutoConfig.for_model(kind, n_embd=64, n_layer=2, n_head=2, vocab_size=48, n_positions=512), folder)
    else:
        written(folder, kind)
    options = settings(learning_rate=0.02)
    choice = options.choose_layout(folder, model=Model(), device="cpu")
    trainer: Any = options.start(
        model_folder=folder, model=Model(lora=lora), loss=WeightedLoss(), seed=0, device="cpu",
        dump_folder=tmp_path / "bad", layout=choice.layout,
    )  # fmt: skip
    before = full_weights(trainer)
    for seed in (0, 1):
        assert trainer.update(make_batch(seed=seed)).grad_norm > 0
    after = full_weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert kind == "gpt2" or any("experts.gate_up_proj" in name for name in changed)
    prompts = random_prompts([9, 14], seed=1)
    wanted = trainer.logprobs(prompts, temperature=1.0)

    def write(target: Path) -> None:
        trainer.save(target)
        copy_description(folder, target / "model")

    checkpoint = Checkpoints(tmp_path / "checkpoints", keep=1).save(1, write, {})
    export(checkpoint, tmp_path / "out", "float32")
    exported = read(tmp_path / "out")
    assert exported.keys() == read(folder).keys()
    assert same(exported, dict(trainer.on_hub(trainer.parameters())))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    for prompt, ours in zip(prompts, wanted, strict=True):
        np.testing.assert_allclose(plain_logprobs(plain, prompt), ours, atol=2e-5, rtol=0)
