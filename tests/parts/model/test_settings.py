"""Model settings: what is refused, what can be known before anything starts, and what ends a turn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from atropos_exp.config.lora import LoraSettings
from atropos_exp.errors import UserError
from atropos_exp.parts.model import hf_folder
from atropos_exp.parts.model.hub import HubModel
from tests.helpers.paths import CONF, ROOT

MODELS = CONF / "model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(**changes: Any) -> HubModel:
    values = yaml.safe_load((MODELS / "qwen2_5_0_5b_instruct.yaml").read_text())
    values.pop("_target_")
    lora = LoraSettings(**values.pop("lora"))
    return HubModel(**{**values, "lora": lora, **changes})


def write_folder(folder: Path, *, template: str = "", eos: Any = 7, **files: Any) -> Path:
    """A model folder without a model: what its JSON files say is all that counts here."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>"]
    added = [{"id": index, "content": token} for index, token in enumerate(special)]
    content: dict[str, Any] = {
        "config.json": {"max_position_embeddings": 100, "eos_token_id": 9},
        "generation_config.json": {"eos_token_id": eos},
        "tokenizer.json": {"added_tokens": added},
        "tokenizer_config.json": {"eos_token": "</s>", "chat_template": template},
        **{f"{name}.json": value for name, value in files.items()},
    }
    for name, value in content.items():
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp32"}, "dtype: got 'fp32', expected one of auto, float32, bfloat16"),
        ({"attn_implementation": "flash"}, "attn_implementation: got 'flash', expected one of auto, packed, sdpa"),
    ],
)
def test_a_wrong_choice_lists_the_right_ones(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model(**changes)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:-1], COMMIT + "0", COMMIT.upper()])
def test_foreign_code_needs_a_commit(revision: str | None) -> None:
    with pytest.raises(UserError, match=r"trust_remote_code: got true.*must be a commit"):
        model(trust_remote_code=True, revision=revision)
    assert model(trust_remote_code=False, revision=revision).revision == revision
    assert model(trust_remote_code=True, revision=COMMIT).trust_remote_code


def test_shipped_options_run_no_foreign_code() -> None:
    options = sorted(MODELS.glob("*.yaml"))
    assert [path.stem for path in options] == [
        *("qwen2_5_0_5b_instruct", "qwen2_5_1_5b_instruct", "qwen3_0_6b", "qwen3_4b", "smollm2_135m", "tiny")
    ]
    for path in options:
        assert yaml.safe_load(path.read_text())["trust_remote_code"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": -1}, "rank: got -1"), ({"alpha": 0}, "alpha: got 0"), ({"target_modules": []}, "target_modules")],
)
def test_lora_is_checked_where_it_is_used(changes: dict[str, Any], message: str) -> None:
    good = {"rank": 8, "alpha": 16, "target_modules": ["q_proj"]}
    with pytest.raises(UserError, match=message):
        LoraSettings(**{**good, **changes})  # type: ignore[arg-type]
    assert LoraSettings(rank=0, alpha=0, target_modules=[]).rank == 0  # off: nothing else matters


def test_compute_dtype() -> None:
    assert [model(dtype="auto").compute_dtype(device) for device in ("cpu", "cuda")] == ["float32", "bfloat16"]
    assert [model(dtype="bfloat16").compute_dtype(device) for device in ("cpu", "cuda")] == ["bfloat16", "bfloat16"]
    assert model(dtype="float32").compute_dtype("cuda") == "float32"


def preflight(settings: HubModel, prompt: int = 60, response: int = 40, device: str = "cpu") -> list[str]:
    return settings.preflight(max_prompt_length=prompt, max_response_length=response, device=device)


def test_preflight_knows_the_context(tmp_path: Path) -> None:
    settings = model(path=str(write_folder(tmp_path / "m")))
    assert settings.context_length() == 100
    assert preflight(settings, 60, 40) == []
    (message,) = preflight(settings, 61, 40)
    assert "61 + 40 = 101 tokens, but the context of the model is 100" in message


def test_preflight_names_everything_that_is_missing(tmp_path: Path) -> None:
    (message,) = preflight(model(path="/no/such/folder"))
    assert "/no/such/folder, which does not exist" in message
    (tmp_path / "empty").mkdir()
    messages = preflight(model(path=str(tmp_path / "empty")))
    assert [word in text for word, text in zip(("config", "tokenizer", "safetensors"), messages, strict=True)] == [
        True
    ] * 3
    folder = write_folder(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("abc", shards, strict=True))})
    )
    (folder / shards[0]).touch()
    (message,) = preflight(model(path=str(folder)))
    assert f"lacks 2 of 3 weight files, the first is {shards[1]}" in message
    (message,) = preflight(model(path=str(write_folder(tmp_path / "m")), revision="main"))
    assert message.startswith("revision: got main, but model.path is a folder")


def test_preflight_says_that_flash_attention_needs_a_gpu(tmp_path: Path) -> None:
    settings = model(path=str(write_folder(tmp_path / "m")), attn_implementation="flash_attention_2")
    (message,) = preflight(settings)
    assert message.startswith("attn_implementation: got flash_attention_2, which needs an NVIDIA GPU")
    assert preflight(settings, device="cuda") == []


def test_a_hub_model_that_is_not_here_yet_is_no_mistake() -> None:
    settings = model(path="no-such-org-here/no-such-model")
    assert settings.local_folder() is None
    assert settings.context_length() is None
    assert preflight(settings) == []


def test_context_of_a_multimodal_configuration(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", config={"text_config": {"max_position_embeddings": 4096}})
    assert hf_folder.context_length(folder) == 4096


CHATML = "{{ '<|im_start|>' }}...{{ '<|im_end|>' }}"


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ({}, (7, 3)),  # generation_config and the tokenizer's </s>; config.json's 9 gives way
        ({"eos": [7, 8]}, (7, 8, 3)),
        ({"eos": None}, (9, 3)),  # config.json speaks when generation_config is silent
        ({"generation_config": None}, (9, 3)),
        ({"template": CHATML}, (7, 3, 2)),  # what the template writes at the end of a turn
        ({"template": CHATML, "eos": [2, 0]}, (2, 0, 3)),
        ({"template": CHATML + "{{ '</s>' }}", "eos": [3]}, (3,)),  # here <|im_end|> ends a part of the turn
        ({"tokenizer_config": {"eos_token": {"content": "<|endoftext|>"}}}, (7, 0)),
        ({"tokenizer_config": {"chat_template": [{"name": "default", "template": CHATML}]}}, (7, 2)),
    ],
)
def test_stop_tokens(tmp_path: Path, folder: dict[str, Any], expected: tuple[int, ...]) -> None:
    path = write_folder(tmp_path / "m", **folder)
    assert model().stop_token_ids(path) == expected


def test_stop_tokens_from_a_template_file_and_none_at_all(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m")
    (path / "chat_template.jinja").write_text(CHATML)
    assert hf_folder.stop_token_ids(path) == (7, 3, 2)
    bare = write_folder(tmp_path / "bare", config={}, generation_config={}, tokenizer_config={})
    with pytest.raises(UserError, match="names no token that ends a turn"):
        hf_folder.stop_token_ids(bare)


def test_settings_are_frozen_and_light() -> None:
    with pytest.raises(ValidationError):
        model().dtype = "float32"  # type: ignore[misc]
    script = (
        "import sys, atropos_exp.parts.model.hub, atropos_exp.parts.model.tiny, atropos_exp.parts.model.smollm2\n"
        "heavy = {'torch', 'transformers', 'verl', 'tokenizers', 'gguf', 'huggingface_hub'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
