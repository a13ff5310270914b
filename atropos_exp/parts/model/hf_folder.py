"""Facts about a Hugging Face model folder, read from its JSON files without loading the model."""

import json
import shutil
from pathlib import Path
from typing import Any

from atropos_exp.errors import UserError

# Chat templates end a turn with one of these, whatever the configuration files name as end of text.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
# All of a model but its weights.
DESCRIPTION = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "*.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def problems(folder: Path) -> list[str]:
    """Why the model in `folder` cannot be trained, one message each; empty if nothing is missing."""
    if folder.is_file():
        use = "data go to data.parquet_paths" if folder.suffix == ".parquet" else "its folder may be what you mean"
        return [f"path: got {folder}, which is a file; expected the folder of a Hugging Face model ({use})"]
    if not folder.is_dir():
        return [f"path: got {folder}, which does not exist; expected a folder, or a hub id such as org/name"]
    messages = []
    if not (folder / "config.json").is_file():
        messages.append(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    if not (folder / "tokenizer.json").is_file():
        messages.append(f"{folder} has no tokenizer.json (a fast tokenizer)")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            messages.append(f"{folder} lacks {len(missing)} of {len(shards)} weight files, the first is {missing[0]}")
    elif not (folder / "model.safetensors").is_file():
        messages.append(f"{folder} has no model.safetensors; pickled weights (*.bin) are not read, convert them first")
    return messages


def context_length(folder: Path) -> int | None:
    """The longest sequence in tokens; None if the configuration does not say."""
    config = read_json(folder / "config.json")
    for section in (config, config.get("text_config") or {}):
        for key in _LENGTH_KEYS:
            if key in section:
                return int(section[key])
    return None


def stop_token_ids(folder: Path) -> tuple[int, ...]:
    """Every token that ends a turn: those of generation_config.json (else config.json), the tokenizer's
    end-of-sequence token, and the end-of-turn marker that the chat template writes. Where the template writes one of
    generation_config.json's, it has no other: `<|end|>` may end a channel, after which the turn goes on."""
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json", optional=True)
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    vocabulary = {
        token["content"]: int(token["id"]) for token in read_json(folder / "tokenizer.json").get("added_tokens", ())
    }
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    named = settings.get("eos_token")
    names = [named["content"] if isinstance(named, dict) else named]
    template = chat_template(folder)
    if not any(name in template for name, token in vocabulary.items() if token in ids):
        names += [marker for marker in TURN_ENDS if marker in template]
    ids += [vocabulary[name] for name in names if name in vocabulary]
    if not ids:
        raise UserError(f"{folder} names no token that ends a turn (eos_token_id in generation_config.json)")
    return tuple(dict.fromkeys(ids))


def token_problems(folder: Path) -> list[str]:
    """Why the tokenizer in `folder` does not fit the model's embedding, one message each.

    Special tokens beyond it are let pass unless they end a turn: text has none, and some models (Gemma 3) have one for
    images only. So is a config.json that does not say how many rows there are.
    """
    config = read_json(folder / "config.json")
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if rows is None:
        return []
    tokenizer = read_json(folder / "tokenizer.json")
    added = tokenizer.get("added_tokens", ())
    tokens = _token_ids(tokenizer) | {
        token["content"]: int(token["id"]) for token in added if not token.get("special", False)
    }
    special = {token["content"] for token in added if token.get("special", False)}
    beyond = sorted(
        (token_id, token) for token, token_id in tokens.items() if token_id >= rows and token not in special
    )
    messages = []
    if beyond:
        messages.append(
            f"{folder}: {len(beyond)} tokens of tokenizer.json have no row in the embedding, the first is "
            f"{beyond[0][1]!r} with id {beyond[0][0]}; expected ids below {rows}, the vocab_size of config.json. Take "
            "the tokenizer that belongs to the model, or give the model rows for these tokens "
            "(resize_token_embeddings)"
        )
    if stops := [token for token in stop_token_ids(folder) if token >= rows]:
        messages.append(
            f"{folder}: it ends a turn with token {stops[0]}, which has no row in the embedding; expected ids below "
            f"{rows}, the vocab_size of config.json. Correct eos_token_id in generation_config.json or config.json"
        )
    return messages


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """The ids of a tokenizer's model, by token: a mapping for BPE and word pieces, a list of pairs for unigrams."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        return {token: int(token_id) for token, token_id in vocabulary.items()}
    return {entry[0]: number for number, entry in enumerate(vocabulary)}


def chat_template(folder: Path) -> str:
    """The Jinja text of the default chat template; empty if there is none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json", optional=True).get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
    return str(template)


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in `path`; {} for a missing file if `optional`. Raises UserError."""
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def copy_description(folder: Path, target: Path) -> None:
    """Copy everything but the weights into `target`: configuration, generation settings, tokenizer, own code. Versions
    4 and 5 of transformers can both read the tokenizer there."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in DESCRIPTION:
        for path in folder.glob(pattern):
            shutil.copyfile(path, target / path.name)
    settings = target / "tokenizer_config.json"
    if settings.is_file():
        found = read_json(settings)
        if (readable := _for_both_versions(found)) != found:
            settings.write_text(json.dumps(readable, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _for_both_versions(settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json of transformers 5 under the names of version 4, which version 5 reads too."""
    readable = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        readable["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # version 4 has a mapping of names here
        del readable["extra_special_tokens"]
        readable["additional_special_tokens"] = [*(settings.get("additional_special_tokens") or ()), *extra]
    return readable


def vocab_size(model_folder: Path) -> int:
    """The number of rows of the model's embedding, which may exceed the tokenizer's number of tokens."""
    config = read_json(model_folder / "config.json")
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
