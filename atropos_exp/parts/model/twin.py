"""A model's small twin: the same architecture with few, narrow layers and random weights, for tests of exactness.

Whether packing, padding or a cache changes what a model computes depends on its architecture, not on its size. The
twin has every kind of layer of the model, windows, chunks and rope lengths that a short sequence exceeds, and weights
so large that a lost mask shows: what holds for it in float32 is known within a second, before anything else starts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LONGER_THAN = 32  # tokens: no window, chunk or original rope length of a twin is longer
NUM_LAYERS, VOCAB_SIZE, NUM_HEADS = 4, 128, 4

LAYERS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"
# The twin's value -> what configurations call such a size. A size that is smaller stays.
SIZES = {
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab",
    64: "hidden_size n_embd d_model embedding_size dim word_embed_proj_dim embed_dim emb_dim lru_width hidden_dim "
    "embedding_dim",
    96: "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size intermediate_size_mlp "
    "dense_intermediate_size dim_ff",
    48: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size shared_intermediate_size moe_latent_size",
    NUM_HEADS: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "attention_heads num_experts n_routed_experts num_local_experts moe_num_experts index_n_heads "
    "linear_num_value_heads",
    16: "head_dim attention_head_dim kv_channels global_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim "
    "linear_value_head_dim d_head index_head_dim index_topk chunk_size mamba_chunk_size hidden_size_per_layer_input "
    "sliding_window attention_chunk_size local_attention window_size attention_window_size dim_head",
    8: "qk_rope_head_dim mamba_d_state ssm_state_size state_size laurel_rank rotary_dim",
    24: "q_lora_rank kv_lora_rank qk_head_dim",
    2: "num_experts_per_tok moe_k moe_topk top_k_experts linear_num_key_heads num_kv_shared_layers zero_expert_num",
    1: "first_k_dense_replace num_dense_layers n_group topk_group",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length",
}
# Bounds that would never be reached by numbers as small as a twin's.
BOUNDS = {
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "logits_soft_cap": 4.0, "output_logit_soft_cap": 4.0,
    "attn_logit_soft_cap": 2.0,
}  # fmt: skip
KEY_VALUE_HEADS = "num_key_value_heads num_kv_heads num_global_key_value_heads swa_num_key_value_heads"
TOKENS = "pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id"


def make_twin(folder: Path, out: Path, *, max_length: int, trust_remote_code: bool) -> Path:
    """Write the twin of the model in `folder` to `out`, a Hugging Face folder in float32, and return `out`.

    `max_length` is the most tokens that a sequence of the run has: only if it exceeds the original length of a rope
    that changes with the length do the twin's sequences exceed theirs.
    Raises UserError if transformers cannot build the architecture, with its own words.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    small = shrink(config, max_length=max_length)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            small, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
        _enlarge(model)
    except Exception as error:  # whatever the architecture's code raises
        raise UserError(
            f"a small model of the architecture {config.model_type!r} cannot be built ({type(error).__name__}: {error})"
        ) from error
    finally:
        torch.set_rng_state(state)
    model.save_pretrained(out)
    for code in folder.glob("*.py"):
        (out / code.name).write_bytes(code.read_bytes())
    return out


def shrink(config: PreTrainedConfig, *, max_length: int) -> PreTrainedConfig:
    """A copy of `config` with the twin's sizes, in its text, vision and other parts alike."""
    config = copy.deepcopy(config)
    _shrink(config, max_length)
    return config


def _shrink(config: PreTrainedConfig, max_length: int) -> None:
    values: dict[str, Any] = config.__dict__  # by the names of this architecture, without aliases
    for value in values.values():
        if isinstance(value, type(config)) or hasattr(value, "model_type"):
            _shrink(value, max_length)
    wide = {name: values.get(name) for name in ("num_attention_heads", "n_head", "num_heads", "qk_rope_head_dim")}
    depth = next((values[name] for name in LAYERS.split() if _is_size(values.get(name))), None)
    if _is_size(values.get("head_dim")) and values["head_dim"] == wide["qk_rope_head_dim"]:
        values["head_dim"] = 8
    for size, names in [(NUM_LAYERS, LAYERS), *SIZES.items()]:
        for name in names.split():
            if _is_size(values.get(name)):
                values[name] = min(size, values[name])
    for name in KEY_VALUE_HEADS.split():
        if _is_size(values.get(name)):
            values[name] = NUM_HEADS if values[name] in wide.values() else min(values[name], 2)
    for name, bound in BOUNDS.items():
        if values.get(name):
            values[name] = bound
    for name, kinds in values.items():  # what a configuration says of each layer
        if isinstance(kinds, list | tuple | str) and len(kinds) == depth and depth > NUM_LAYERS:
            values[name] = _each_kind(kinds)
            if size := next((size for size, names in SIZES.items() if name.removesuffix("_per_layer") in names), 0):
                values[name] = [min(size, value) for value in values[name]]
    for name in TOKENS.split():
        if isinstance(values.get(name), int | list):
            values[name] = 1
    _shrink_states(values)
    _shrink_rope(values, max_length)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _each_kind(kinds: Any) -> Any:
    """The first layers of a pattern, or one of each kind by turns where those would be alike."""
    first = kinds[:NUM_LAYERS]
    every = list(dict.fromkeys(kinds))
    if len(set(first)) < min(len(every), NUM_LAYERS):
        first = (every * NUM_LAYERS)[:NUM_LAYERS]
    return "".join(first) if isinstance(kinds, str) else list(first)


def _shrink_states(values: dict[str, Any]) -> None:
    """State-space layers: heads x head size must be the expanded width."""
    width = 64 * int(values.get("expand") or values.get("mamba_expand") or 2)
    for heads, size in (
        ("mamba_n_heads", "mamba_d_head"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("num_heads", "head_dim"),
    ):
        if heads in values and size in values and (heads != "num_heads" or "state_size" in values):
            values[heads], values[size] = width // 16, 16
    for name in ("mamba_n_groups", "n_groups", "mamba_ngroups"):
        if _is_size(values.get(name)):
            values[name] = 1
    if _is_size(values.get("mamba_d_ssm")):
        values["mamba_d_ssm"] = width
    for name in ("time_step_rank", "mamba_dt_rank"):
        if _is_size(values.get(name)):
            values[name] = 4


def _shrink_rope(values: dict[str, Any], max_length: int) -> None:
    """Original lengths that a twin's sequences exceed, and as many factors as there are frequencies."""
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if not isinstance(rope, dict):
        return
    head = values.get("qk_rope_head_dim") or values.get("head_dim") or 16
    for part in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        _shrink_original(part, max_length)
        share = part.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
        for name in ("short_factor", "long_factor"):
            if isinstance(part.get(name), list):
                part[name] = part[name][: int(head * share) // 2]
    _shrink_original(values, max_length)


def _shrink_original(values: dict[str, Any], max_length: int) -> None:
    original = values.get("original_max_position_embeddings")
    if isinstance(original, int):
        values["original_max_position_embeddings"] = LONGER_THAN if max_length > original else 512


def _enlarge(model: Any) -> None:
    """Add noise, so that attention is uneven, no norm or gate is the identity, and every weight matters."""
    import torch

    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.7 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 0.05
            weight += scale * torch.randn(weight.shape, generator=noise)
