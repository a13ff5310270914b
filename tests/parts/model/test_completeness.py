"""Model folders that are not whole, or do not fit together: named before anything starts, with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.config.lora import LoraSettings
from atropos_exp.errors import UserError
from atropos_exp.parts.model import hf_folder
from atropos_exp.parts.model.completeness import check_tensors
from tests.helpers.random_models import random_model
from tests.parts.model.test_tiny import model as tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a model in several files."""
    random_model(tied=False).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_a_file_that_is_only_half_there_is_named_with_the_remedy(folder: Path) -> None:
    last = sorted(folder.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    for kept in (len(content) // 2, 20, 0):
        last.write_bytes(content[:kept])
        with pytest.raises(
            UserError, match=rf"{last.name} \({kept:,} bytes\) .*only half there: .*Delete it and fetch the model"
        ):
            check_tensors(folder, trust_remote_code=False)
    last.write_bytes(content)
    assert check_tensors(folder, trust_remote_code=False).unused == []


def test_targets_of_lora_are_held_against_the_linear_layers_of_the_model(folder: Path) -> None:
    found = check_tensors(folder, trust_remote_code=False)
    assert len(found.linear) == 2 * 7 and found.architecture == "Qwen2ForCausalLM"
    lora(["q_proj", "v_proj", "mlp.down_proj", "model.layers.1.self_attn.k_proj"]).check_targets(
        found.linear, found.experts, architecture=found.architecture
    )
    for targets in (["q_proj", "v_porj"], ["v_porj"]):
        with pytest.raises(
            UserError,
            match=r"got v_porj, which is no linear layer of Qwen2ForCausalLM; expected some of down_proj, gate_proj, "
            r"k_proj, o_proj, q_proj, up_proj, v_proj. Did you mean v_proj\?",
        ):
            lora(targets).check_targets(found.linear, found.experts, architecture=found.architecture)
    for target in ("mlp", "proj", "lm_head", "embed_tokens", "all-linear", "model.layers.2.self_attn.k_proj"):
        with pytest.raises(UserError, match=f"got {target}, which is no linear layer"):
            lora([target]).check_targets(found.linear, found.experts, architecture=found.architecture)
    lora(["anything"], rank=0).check_targets(found.linear, found.experts, architecture=found.architecture)


def test_the_linear_layers_of_gpt2_are_found_under_their_own_names(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)).save_pretrained(tmp_path)
    found = check_tensors(tmp_path, trust_remote_code=False)
    with pytest.raises(
        UserError,
        match=r"got q_proj, v_proj, which is no linear layer of GPT2LMHeadModel; .* of c_attn, c_fc, c_proj\.",
    ):
        lora(["q_proj", "v_proj"]).check_targets(found.linear, found.experts, architecture=found.architecture)


def test_every_target_that_passes_is_one_that_peft_adapts(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    found = check_tensors(folder, trust_remote_code=False)
    for end in {name.rpartition(".")[2] for name in found.linear}:
        adapted = get_peft_model(random_model(tied=False), LoraConfig(r=1, target_modules=[end]))
        wrapped = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
        expected = {f"base_model.model.{name}" for name in found.linear if name.endswith(f".{end}")}
        assert wrapped == expected


@pytest.mark.filterwarnings("ignore:The following rank_pattern")  # PEFT looks for them among modules alone
@pytest.mark.filterwarnings("ignore:The following alpha_pattern")
@pytest.mark.parametrize(("kind", "projections"), [("qwen3_moe", ["gate_proj", "up_proj"]), ("mixtral", ["w1", "w3"])])
def test_the_projections_of_experts_are_targets_as_peft_has_them(
    tmp_path: Path, kind: str, projections: list[str]
) -> None:
    """By the names of the hub, though they are one tensor: so all of it, or none."""
    from peft import LoraConfig, get_peft_model

    model = random_model(kind=kind, tied=False)
    model.save_pretrained(tmp_path)
    found = check_tensors(tmp_path, trust_remote_code=False)
    assert found.experts["gate_up_proj"] == projections and not {"gate_proj", "w1"} & {*found.linear}
    check = lora(["q_proj", *projections]).check_targets
    assert check(found.linear, found.experts, architecture=found.architecture) == projections
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj", *projections]))
    names = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len([name for name in names if "experts" in name]) == len([name for name in names if "q_proj" in name]) == 2
    with pytest.raises(UserError, match=f"got {projections[0]} without {projections[1]}; .*name all or none"):
        lora(projections[:1]).check_targets(found.linear, found.experts, architecture=found.architecture)


def lora(targets: list[str], rank: int = 4) -> LoraSettings:
    return LoraSettings(rank=rank, alpha=8, target_modules=targets)


def with_tokens(folder: Path, *, rows: int = 10, eos: Any = 3, added: Any = ()) -> Path:
    files = {
        "config.json": {"vocab_size": rows, "eos_token_id": eos},
        "tokenizer.json": {"model": {"vocab": {f"t{i}": i for i in range(10)}}, "added_tokens": list(added)},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_stop_token_without_a_row_in_the_embedding_is_named(tmp_path: Path) -> None:
    assert hf_folder.token_problems(with_tokens(tmp_path)) == []
    for eos in (9999, [3, 9999]):
        (problem,) = hf_folder.token_problems(with_tokens(tmp_path, eos=eos))
        assert "token 9999, which has no row in the embedding; expected ids below 10" in problem
        assert "Correct eos_token_id in generation_config.json or config.json" in problem


def test_tokens_without_a_row_in_the_embedding_are_named(tmp_path: Path) -> None:
    (problem,) = hf_folder.token_problems(with_tokens(tmp_path, rows=8))
    assert "2 tokens of tokenizer.json have no row in the embedding, the first is 't8' with id 8" in problem
    added = [{"id": 10, "content": "<new>", "special": False}]
    (problem,) = hf_folder.token_problems(with_tokens(tmp_path, added=added))
    assert "the first is '<new>' with id 10; expected ids below 10" in problem
    image = [{"id": 10, "content": "<image>", "special": True}]
    assert hf_folder.token_problems(with_tokens(tmp_path, added=image)) == [], "text never holds it"


def test_the_shipped_model_fits_its_tokenizer() -> None:
    folder = tiny_model().fetch()
    assert hf_folder.token_problems(folder) == []
    assert check_tensors(folder, trust_remote_code=False).linear
