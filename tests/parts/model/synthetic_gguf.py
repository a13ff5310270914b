"""A SmolLM2 of one layer in the format of the real file, with weights that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_SIZE = 64, 96, 4, 2, 16


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of query and key: halves of a head become pairs."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def quantised(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q4_1 blocks of 32 (float16 step and minimum, then 4-bit counts), and what they decode to; by the format."""
    blocks = weight.reshape(-1, 32)
    low = blocks.min(1).astype(np.float16)
    step = ((blocks.max(1) - blocks.min(1)) / 15).astype(np.float16)
    counts = np.clip(np.rint((blocks - low[:, None]) / step[:, None].astype(np.float32)), 0, 15).astype(np.uint8)
    packed = counts[:, :16] | counts[:, 16:] << 4
    header = np.stack([step, low], 1).view(np.uint8)
    decoded = counts * step[:, None].astype(np.float32) + low[:, None].astype(np.float32)
    raw = np.concatenate([header, packed], 1).reshape(weight.shape[0], -1)
    return raw, decoded.reshape(weight.shape).astype(np.float32)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer SmolLM2 with a small vocabulary; returns the weights by their Hugging Face names."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = ["ab", "Ġ1", "12", "ĠĠ", "Ġab"]  # the digit merges must never be used
    merges = ["a b", "Ġ 1", "1 2", "Ġ Ġ", "Ġ ab"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + merged
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    generator = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": ("token_embd.weight", (len(tokens), HIDDEN)),
        "model.norm.weight": ("output_norm.weight", (HIDDEN,)),
        "model.layers.0.input_layernorm.weight": ("blk.0.attn_norm.weight", (HIDDEN,)),
        "model.layers.0.post_attention_layernorm.weight": ("blk.0.ffn_norm.weight", (HIDDEN,)),
        "model.layers.0.self_attn.q_proj.weight": ("blk.0.attn_q.weight", (HEADS * HEAD_SIZE, HIDDEN)),
        "model.layers.0.self_attn.k_proj.weight": ("blk.0.attn_k.weight", (KV_HEADS * HEAD_SIZE, HIDDEN)),
        "model.layers.0.self_attn.v_proj.weight": ("blk.0.attn_v.weight", (KV_HEADS * HEAD_SIZE, HIDDEN)),
        "model.layers.0.self_attn.o_proj.weight": ("blk.0.attn_output.weight", (HIDDEN, HEADS * HEAD_SIZE)),
        "model.layers.0.mlp.gate_proj.weight": ("blk.0.ffn_gate.weight", (FFN, HIDDEN)),
        "model.layers.0.mlp.up_proj.weight": ("blk.0.ffn_up.weight", (FFN, HIDDEN)),
        "model.layers.0.mlp.down_proj.weight": ("blk.0.ffn_down.weight", (HIDDEN, FFN)),
    }
    weights = {}
    for name, (gguf_name, shape) in shapes.items():
        weight = generator.standard_normal(shape).astype(np.float32)
        stored = weight
        if "q_proj" in name or "k_proj" in name:
            stored = interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
        if "mlp" in name:  # as in the real file: 4 bits
            raw, weight = quantised(weight)
            writer.add_tensor(gguf_name, raw, raw_dtype=GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(gguf_name, stored)
        weights[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
