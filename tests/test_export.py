"""Export: the folder that transformers loads holds the trained weights, adapters merged, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from atropos_exp.export import main
from atropos_exp.parts.model.hf_folder import copy_description
from atropos_exp.runs.checkpoints import Checkpoints
from tests.helpers.paths import ROOT

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tiny_model(*, tied: bool) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    return Qwen2ForCausalLM(config).float()


def base_folder(folder: Path, model: Qwen2ForCausalLM) -> Path:
    """What `model.fetch()` gives: configuration, tokenizer and the weights before training."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    vocabulary = {token: index for index, token in enumerate(["<|pad|>", "<|im_start|>", "<|im_end|>", "a", "b"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def checkpoint(
    run: Path, base: Path, files: Mapping[str, Mapping[str, torch.Tensor]], *, step: int = 3, lora: Any = None
) -> Path:
    """A checkpoint as a run leaves it: the trainer's files at the top, the model's description under `model/`."""

    def write(folder: Path) -> None:
        copy_description(base, folder / "model")
        for name, tensors in files.items():
            save_file(dict(tensors), folder / name, metadata={"format": "pt"})
        model_files = [name for name in files if name.startswith("model")]
        if len(model_files) > 1:
            weight_map = {key: name for name in model_files for key in files[name]}
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"step/x": torch.ones(1)}, folder / "optimizer.safetensors")
        (folder / "trainer.json").write_text(json.dumps({"counters": {}, "lora": lora}))

    return Checkpoints(run / "checkpoints", keep=5).save(step, write, {})


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def loaded(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is Qwen2ForCausalLM
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_the_exported_weights_are_the_trained_ones(tmp_path: Path, tied: bool, dtype: str | None) -> None:
    model = tiny_model(tied=tied)
    base = base_folder(tmp_path / "base", model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))  # training moved every weight
    trained = weights_of(model)
    assert ("lm_head.weight" in trained) is not tied
    checkpoint(tmp_path / "run", base, {"model.safetensors": trained})

    out = tmp_path / "out"
    assert main([str(tmp_path / "run"), str(out), *(["--dtype", dtype] if dtype else [])]) == 0
    exported = loaded(out)
    wanted = torch.bfloat16 if dtype is None else getattr(torch, dtype)  # the configuration says bfloat16
    assert exported.dtype is wanted
    assert json.loads((out / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    found = weights_of(exported)
    assert found.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(found[name], tensor.to(wanted)), name
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) is tied

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False) == [1, 3, 4, 2]
    assert exported.generation_config.eos_token_id == 2
    assert not [path.name for path in out.iterdir() if path.name.startswith(("optimizer", "trainer", "manifest"))]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_several_files_stay_several_files(tmp_path: Path) -> None:
    model = tiny_model(tied=True)
    base = base_folder(tmp_path / "base", model)
    trained = weights_of(model)
    ordered = sorted(trained)
    first, second = ({name: trained[name] for name in part} for part in (ordered[:5], ordered[5:]))
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    checkpoint(tmp_path / "run", base, {names[0]: first, names[1]: second})
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    found = weights_of(loaded(tmp_path / "out"))
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    assert all((tmp_path / "out" / name).is_file() for name in names)


def test_adapters_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base_model = tiny_model(tied=True)
    base = base_folder(tmp_path / "base", base_model)
    frozen = weights_of(base_model)
    adapted = get_peft_model(
        base_model, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], bias="none")
    )
    matrices = {}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
                matrices[name] = parameter.detach().clone()
    assert len(matrices) == 2 * 2 * 2  # layers, modules, A and B
    checkpoint(
        tmp_path / "run",
        base,
        {"model.safetensors": frozen, "adapter.safetensors": matrices},
        lora={"rank": 4, "alpha": 12},
    )
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    found = weights_of(loaded(tmp_path / "out"))
    expected = weights_of(adapted.merge_and_unload())
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
        changed += not torch.equal(frozen[name], found[name])
    assert changed == 4


def test_the_newest_intact_checkpoint_of_a_run_and_a_named_one(tmp_path: Path) -> None:
    model = tiny_model(tied=True)
    base = base_folder(tmp_path / "base", model)
    scaled = {}
    for step in (1, 2, 3):
        scaled[step] = {name: tensor * step for name, tensor in weights_of(model).items()}
        newest = checkpoint(tmp_path / "run", base, {"model.safetensors": scaled[step]}, step=step)
    path = newest / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    for source, step in ((".", 2), ("checkpoints", 2), ("checkpoints/step_000001", 1)):
        out = tmp_path / f"out_{step}_{len(source)}"
        assert main([str(tmp_path / "run" / source), str(out), "--dtype", "float32"]) == 0
        found = weights_of(loaded(out))
        assert all(torch.equal(found[name], scaled[step][name]) for name in found)


def test_mistakes_end_with_code_2_and_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_folder(tmp_path / "base", tiny_model(tied=True))
    damaged = checkpoint(tmp_path / "run", base, {"model.safetensors": {"x": torch.ones(3)}})
    (damaged / "model" / "config.json").write_text("{}")
    bare = Checkpoints(tmp_path / "bare" / "checkpoints", keep=1).save(1, lambda folder: None, {})
    out = str(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = (
        ([str(tmp_path / "absent"), out], "absent does not exist; name a run folder"),
        ([str(tmp_path / "base"), out], f"no checkpoint in {tmp_path / 'base'}"),
        ([str(tmp_path / "run"), out], "step_000003 is damaged: model/config.json has 2 bytes"),
        ([str(damaged), out], "is damaged: model/config.json has 2 bytes"),
        ([str(bare), out], "has no weights"),
        ([str(damaged), str(tmp_path / "full")], "full exists and is not empty"),
    )
    capsys.readouterr()  # transformers' progress bars
    for arguments, expected in cases:
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and expected in printed.err and printed.err.count("\n") == 1
        assert printed.out == ""
    assert not Path(out).exists()


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atropos_exp.export"]
    for arguments, code in (([], 2), (["--help"], 0), ([str(tmp_path), str(tmp_path / "out")], 2)):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
