"""The model in the package: intact, or refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from atropos_exp.config.lora import LoraSettings
from atropos_exp.errors import UserError
from atropos_exp.parts.model import tiny
from atropos_exp.parts.model.tiny import TinyModel
from tests.helpers.paths import CONF

SETTINGS = CONF / "model" / "tiny.yaml"


def model() -> TinyModel:
    values = yaml.safe_load(SETTINGS.read_text())
    values.pop("_target_")
    return TinyModel(**{**values, "lora": LoraSettings(**values["lora"])})


def test_the_shipped_model_is_intact_and_speaks_for_itself() -> None:
    settings = model()
    folder = settings.fetch()
    listed = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(listed)
    for name, expected in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    assert settings.preflight(max_prompt_length=32, max_response_length=16, device="cpu") == []
    tokenizer = settings.tokenizer(folder)
    assert settings.stop_token_ids(folder) == (tokenizer.eos_token_id,)
    assert tokenizer.chat_template


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "tiny_weights"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(b"weights")
    (copy / "manifest.json").write_text(
        json.dumps({"sha256": {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}})
    )
    monkeypatch.setattr(tiny, "WEIGHTS", copy)
    assert model().fetch() == copy
    (copy / "model.safetensors").write_bytes(b"wrights")
    with pytest.raises(UserError, match=r"tiny model is damaged: .*model\.safetensors should have sha256"):
        model().fetch()
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        model().fetch()
    shutil.rmtree(copy)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        model().fetch()


def test_a_path_trains_another_model_instead() -> None:
    settings = model()

    other = settings.model_copy(update={"path": "/no/such/folder"})
    with pytest.raises(UserError, match="/no/such/folder"):
        other.fetch()
    assert "does not exist" in other.preflight(max_prompt_length=8, max_response_length=8, device="cpu")[0]
