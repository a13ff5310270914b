"""From the GGUF of SmolLM2 to a Hugging Face folder: weights by transformers, tokenizer by hand.

transformers' own conversion of this tokenizer is wrong in two ways: it names `<|im_start|>` as the end of a
sequence, so no turn would ever end, and it forgets that SmolLM2 splits off every digit before the merges.
"""

import json
from pathlib import Path
from typing import Any

VERSION = 1  # of the result: raise it with every change that changes a byte
BOS, EOS, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_CONTROL = 3  # GGUF's token type of special tokens


def convert(gguf: Path, folder: Path) -> None:
    """Write config, bfloat16 weights, tokenizer and generation settings into the new `folder`."""
    folder.mkdir()
    fields = read_fields(gguf)
    write_tokenizer(fields, folder)
    _write_weights(gguf, fields, folder)


def read_fields(gguf: Path) -> dict[str, Any]:
    """The metadata of the file, by GGUF's names."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    return {name: field.contents() for name, field in reader.fields.items()}


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write a byte-level BPE that splits off single digits first, as the original tokenizer.json does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "smollm"
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == EOS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # others rebuild the pre-tokenizer without the digits
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": UNKNOWN,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_weights(gguf: Path, fields: dict[str, Any], folder: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.to(torch.bfloat16)  # the precision of the original
    model.config.rms_norm_eps = round(fields["llama.attention.layer_norm_rms_epsilon"], 8)  # 1e-5 less float32's error
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = fields["tokenizer.ggml.bos_token_id"]
        settings.eos_token_id = fields["tokenizer.ggml.eos_token_id"]
        settings.pad_token_id = fields["tokenizer.ggml.padding_token_id"]
    assert model.config.tie_word_embeddings
    model.save_pretrained(folder)
