"""transformers without PyTorch, in a process that may import PyTorch all the same; and no garbage collection."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.processes.startup import no_collections
from tests.helpers.paths import ROOT

CODE = """
import sys
from atropos_exp.processes.startup import tokenizers_only
with tokenizers_only():
    from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({folder!r}, local_files_only=True)
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "12+34="}}], add_generation_prompt=True)
print(prompt["input_ids"], tokenizer.is_fast, "torch" in sys.modules)
import torch
with tokenizers_only():
    assert sys.modules["torch"] is torch
print(torch.ones(2).sum().item())
"""


def test_tokenizers_work_and_pytorch_can_be_imported_afterwards() -> None:
    code = CODE.format(folder=str(WEIGHTS))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    # <|user|>, one token per digit and sign, <|assistant|>
    assert done.stdout == "[3, 21, 22, 15, 23, 24, 33, 4] True False\n2.0\n"


def test_collections_go_on_afterwards_if_they_did_before() -> None:
    with pytest.raises(ValueError, match="of the block"), no_collections():
        assert not gc.isenabled()
        raise ValueError("of the block")
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
