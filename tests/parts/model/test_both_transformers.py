"""Tokenizer files that transformers 4 and 5 both read, the same way: environments may have the older one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.parts.model.hf_folder import copy_description, read_json
from atropos_exp.parts.model.tiny import WEIGHTS
from tests.helpers.older_transformers import environment

READ = """
import json, sys, transformers
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "12+34="}], add_generation_prompt=True, tokenize=False
)
ids = tokenizer.encode(text + "46<|end|>")
print(json.dumps({
    "version": int(transformers.__version__.split(".")[0]),
    "fast": tokenizer.is_fast,
    "text": text,
    "ids": ids,
    "plain": tokenizer.decode(ids, skip_special_tokens=True),
    "ends": [tokenizer.eos_token, tokenizer.pad_token],
}))
"""


def test_names_of_version_5_become_those_of_both(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<a>", "<b>"],
        "additional_special_tokens": ["<c>"],
        "eos_token": "<é>",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    copy_description(source, target)
    assert read_json(target / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<c>", "<a>", "<b>"],
        "eos_token": "<é>",
    }


@pytest.mark.parametrize(
    "settings",
    [{"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image_token": "<i>"}}, {"eos_token": "x"}],
)
def test_what_both_read_is_copied_byte_for_byte(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer_config.json").write_text(json.dumps(settings, indent=7))
    copy_description(source, tmp_path / "target")
    assert (tmp_path / "target" / "tokenizer_config.json").read_bytes() == (
        source / "tokenizer_config.json"
    ).read_bytes()


@pytest.mark.slow
def test_transformers_4_reads_the_tokenizer_as_5_does(tmp_path: Path) -> None:
    copy_description(WEIGHTS, tmp_path / "tokenizer")
    older = environment(tmp_path / "venv")

    def read(python: str | Path, folder: Path) -> dict[str, Any]:
        done = subprocess.run([python, "-c", READ, folder], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    newest = read(sys.executable, WEIGHTS)
    assert newest.pop("version") == 5
    # <|user|> 1 2 + 3 4 = <|assistant|> 4 6 <|end|>
    assert newest["ids"] == [3, 21, 22, 15, 23, 24, 33, 4, 24, 26, 1] and newest["plain"] == "12+34=46"
    for python, version in ((sys.executable, 5), (older, 4)):
        assert read(python, tmp_path / "tokenizer") == {**newest, "version": version}
