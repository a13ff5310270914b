"""Models from a folder, from the hub's cache, and what is said without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.config.lora import LoraSettings
from atropos_exp.errors import UserError
from atropos_exp.parts.model.hub import HubModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "an-org/a-model"


def model(path: str, **changes: Any) -> HubModel:
    settings: dict[str, Any] = {
        "path": path,
        "revision": None,
        "trust_remote_code": False,
        "dtype": "auto",
        "attn_implementation": "auto",
        "gradient_checkpointing": False,
        "lora": LoraSettings(rank=0, alpha=16, target_modules=[]),
        "suggested_learning_rate": 1e-6,
    }
    return HubModel(**{**settings, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model folder of a few kilobytes, made by transformers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("hub") / "model"
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<|pad|>": 0, "<|im_end|>": 1, "x": 2}, unk_token="<|pad|>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<|pad|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one model in it, laid out as the hub client does."""
    import huggingface_hub.constants

    repository = tmp_path / "models--an-org--a-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / COMMIT


def test_a_local_folder_is_used_where_it_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = model(str(folder))
    assert settings.fetch() == folder == settings.local_folder()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert model("~/model").fetch() == folder
    assert model("~/model/").fetch() == folder
    monkeypatch.chdir(folder.parent)
    assert model("model").fetch() == folder  # looks like a hub id; the folder wins

    assert settings.context_length() == 64
    assert settings.stop_token_ids(folder) == (1,)
    tokenizer = settings.tokenizer(folder)
    assert tokenizer.is_fast and tokenizer("x").input_ids == [2]


def test_an_incomplete_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors; pickled weights"):
        model(str(broken)).fetch()


def test_a_cached_hub_model_needs_no_network(cache: Path) -> None:
    settings = model(ID)
    assert settings.local_folder() == cache
    assert settings.context_length() == 64
    assert settings.fetch() == cache
    assert model(ID, revision=COMMIT).fetch() == cache
    (cache / "model.safetensors").unlink()  # a download that was cut short
    assert settings.local_folder() is None
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        settings.fetch()


@pytest.mark.parametrize("path", ["an-org/another-model", "gpt-nothing"])
def test_a_hub_model_without_network_is_explained(cache: Path, path: str) -> None:
    with pytest.raises(UserError, match=f"path: {path} is not a folder here and could not be taken from") as error:
        model(path).fetch()
    assert "Check the name, the network, and HF_TOKEN" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "../nothing", "a/b/c", "."])
def test_what_can_only_be_a_folder_is_never_asked_of_the_hub(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a folder that exists, or a hub id|has no config\.json"):
        model(path).fetch()


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(UserError, match="path: got nothing"):
        model("").local_folder()


def test_a_model_that_needs_its_own_code_is_refused_unless_trusted(folder: Path, tmp_path: Path) -> None:
    import json

    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    config = {**config, "model_type": "never_heard_of", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "configuration_own.py").write_text("raise SystemExit('foreign code ran')\n")
    with pytest.raises(UserError, match="needs Python code of its own, which is not run"):
        model(str(own)).fetch()
