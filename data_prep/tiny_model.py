"""Builds the `tiny` model that ships with the package: `python -m data_prep.tiny_model FOLDER`.

A Qwen2 of one million parameters, pretrained on sums in which six carries in ten were forgotten. So the model can add,
but its likeliest answer forgets the carry and only some of its samples are right, which is what GRPO needs to start.
The files that ship are in `atropos_exp/parts/model/tiny_weights`.
The corpus holds only the training problems of `data_prep.arithmetic` at its defaults, never a held-out one.

Training runs on two threads, whatever the machine has, so that the same CPU and the same torch write the same bytes;
`tests/parts/model/test_tiny.py` checks the shipped ones. Rounding grows over hundreds of steps, so a CPU with
other vector units, or another torch, gives other weights, which are as good.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, SYSTEM, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# What the byte-pair merges are learnt from: the words of short instructions. Digits never merge.
CORPUS = """
What is the sum of the two numbers? Give the answer only. Answer with a single number and nothing else.
Question: how many apples are there in all? Let us think step by step and then write the final answer.
The following is a puzzle. Solve it. Reply with the result. Sort the words. Count the letters in the word.
Is the statement true or false? Choose the best option: A, B, C or D. Explain your reasoning in one line.
Compute the value of the expression. Find the next number in the sequence. Return the list in reverse order.
You are a helpful assistant. The user asks a question and the assistant solves it. Please write your answer.
""".strip().splitlines()
VOCAB_SIZE = 384
FORGET = 0.6  # of the carries
READINGS = 8


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with single digits and a minimal chat template; `<|end|>` ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def questions() -> list[str]:
    """The training problems of the default data set."""
    from data_prep.arithmetic import Arithmetic
    from data_prep.builder import defaults_of, prompt_text

    return [prompt_text(row) for row in Arithmetic(**defaults_of(Arithmetic)).draft().train]


def forgetful_sum(question: str, random: Random) -> str:
    """The answer to "12+34=" by someone who forgets a carry with probability `FORGET`."""
    left, right = (int(number) for number in question.removesuffix("=").split("+"))

    def carry(value: int) -> int:
        return int(value >= 10 and random.random() >= FORGET)

    units = left % 10 + right % 10
    tens = left // 10 + right // 10 + carry(units)
    hundreds = carry(tens)
    return f"{hundreds or ''}{tens % 10}{units % 10}"


def corpus(questions: list[str]) -> list[tuple[str, str]]:
    """(question, answer), each question `READINGS` times with its own slips."""
    random = Random(0)
    return [(question, forgetful_sum(question, random)) for _ in range(READINGS) for question in questions]


def encode(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids [N, T] right-padded, and which of them are answers [N, T]."""
    import torch

    pad = tokenizer.pad_token_id
    rows, masks = [], []
    for question, answer in pairs:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        completion = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        rows.append(prompt + completion)
        masks.append([False] * len(prompt) + [True] * len(completion))
    length = max(map(len, rows))
    ids_NT = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask_NT = torch.tensor([mask + [False] * (length - len(mask)) for mask in masks])
    return ids_NT, mask_NT


def warm_start(model: Any, ids_NT: Tensor, mask_NT: Tensor, *, steps: int) -> None:
    """Plain next-token training of the answers: warm-up, constant, decay to zero."""
    import torch

    batch_size, peak_lr, warmup, decay = 128, 1e-3, 20, steps * 3 // 10
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(len(ids_NT), (batch_size,), generator=generator)
        ids, mask = ids_NT[rows], mask_NT[rows]
        logprobs = torch.log_softmax(model(input_ids=ids[:, :-1]).logits, -1)
        token_logprobs = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        loss = -token_logprobs[mask[:, 1:]].mean()
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min((step + 1) / warmup, (steps - step) / decay, 1.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step} loss {loss.item():.6f} {time.perf_counter() - started:.0f} s", flush=True)


def build(folder: Path, *, steps: int, dtype: str = "float64") -> None:
    """Pretrain the model for `steps` steps in `dtype` and write it to `folder`, without its manifest."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    ids_NT, mask_NT = encode(tokenizer, corpus(questions()))
    warm_start(model, ids_NT, mask_NT, steps=steps)
    model.to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


def write_manifest(folder: Path) -> None:
    """sha256 of every file, checked when the model is fetched."""
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "manifest.json").write_text(json.dumps({"sha256": sums}, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--dtype", default="float64")
    arguments = parser.parse_args()
    build(arguments.out, steps=arguments.steps, dtype=arguments.dtype)
    write_manifest(arguments.out)


if __name__ == "__main__":
    main()
