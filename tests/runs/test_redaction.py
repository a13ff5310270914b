from __future__ import annotations

import os

import pytest

from atropos_exp.runs.redaction import REDACTED, is_secret_name, redact


@pytest.mark.parametrize(
    "name",
    ["api_key", "apiKey", "WANDB_API_KEY", "wandb-key-secret", "hf_token", "token", "accessToken", "password",
     "DB_PASSWD", "aws_secret_access_key", "authorization", "credentials", "ssh.private_key"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "tokenizer", "pad_token", "eos_token", "stop_token_ids", "num_tokens", "tokens_per_micro_batch",
     "key", "keep", "monkey", "seconds_per_token", "author", "secretary"],
)  # fmt: skip
def test_names_of_settings(name: str) -> None:
    assert not is_secret_name(name)


def test_a_tree_loses_its_secrets_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"HF_TOKEN": "planted-canary", "PATH": "/usr/bin/long/enough", "SHORT_TOKEN": "abc"}
    monkeypatch.setattr(os, "environ", environ)
    tree = {
        "engine": {"api_key": "k", "args": ["--x=planted-canary", "--hf_token=q1"], "password": None},
        "proxy": "http://user:pw@proxy:3128/x",
        "path": "/usr/bin/long/enough",
        "note": "abc and hf_abcdefghijklmnopqrstuvwx",
        "git": "92d63d4",
        "max_tokens": 16,
    }
    assert redact(tree) == {
        "engine": {"api_key": REDACTED, "args": [f"--x={REDACTED}", f"--hf_token={REDACTED}"], "password": None},
        "proxy": f"http://{REDACTED}@proxy:3128/x",
        "path": "/usr/bin/long/enough",
        "note": f"abc and {REDACTED}",
        "git": "92d63d4",
        "max_tokens": 16,
    }


def test_the_given_tree_is_left_alone() -> None:
    tree = {"token": "x" * 10, "inner": [{"password": "y"}]}
    redact(tree)
    assert tree == {"token": "x" * 10, "inner": [{"password": "y"}]}
