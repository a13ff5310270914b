"""A tiny real tokenizer, and files as users bring them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atropos_exp.parts.data.raw import make_row
from atropos_exp.parts.data.verl import VerlData

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if shout is defined and shout %}!{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level: one token per byte, special tokens of the template aside; plain text starts with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<system>", "<user>", "<assistant>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    """verl rows, one per content; the answer is the content reversed."""

    def make(contents: Sequence[str], *, split: str = "train", source: str = "toy", ability: str = "toy") -> Any:
        return [
            make_row(
                data_source=source, content=text, ability=ability, ground_truth=text[::-1], split=split, index=index
            )
            for index, text in enumerate(contents)
        ]

    return make


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., Path]:
    """`write_rows(path, rows, **options of pyarrow's writer)`."""

    def write(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
        return path

    return write


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., VerlData]:
    """VerlData with the values of conf/data/*.yaml less `prepare`, changed as given."""

    def make(**changes: Any) -> VerlData:
        values: dict[str, Any] = {
            "prepare": None,
            "parquet_paths": [],
            "hf_datasets": [],
            "weights": None,
            "eval_paths": [],
            "format": "chat",
            "system_prompt": None,
            "chat_template_arguments": {},
            "ability": None,
            "max_prompts": None,
            "max_bad_fraction": 0.0,
            "cache": tmp_path / "cache",
        }
        values |= changes
        return VerlData(**{key: str(value) if isinstance(value, Path) else value for key, value in values.items()})

    return make


@pytest.fixture
def open_loader(tokenizer: Any, settings: Callable[..., VerlData], tmp_path: Path) -> Callable[..., Any]:
    """`open_loader(seed=..., max_prompt_length=..., **settings)`."""

    def make(*, seed: int = 0, max_prompt_length: int = 1000, **changes: Any) -> Any:
        return settings(**changes).loader(
            tokenizer,
            seed=seed,
            max_prompt_length=max_prompt_length,
            max_response_length=16,
            run_folder=tmp_path / "run",
        )

    return make


@pytest.fixture(scope="session")
def raw_gsm8k() -> dict[str, list[dict[str, Any]]]:
    """The real columns. Train holds a duplicate, a test question in other spacing, and a row without an answer."""

    def solved(question: str, left: int, right: int) -> dict[str, Any]:
        total = left + right
        return {
            "question": question,
            "answer": f"There are {left} + {right} = <<{left}+{right}={total}>>{total} of them.\n#### {total:,}",
        }

    train = [solved(f"Ann has {n} pears and buys {n * 300} more. How many has she?", n, n * 300) for n in range(1, 9)]
    test = [solved(f"Bob has {n} plums and finds {n + 40} more. How many has he?", n, n + 40) for n in range(1, 5)]
    leak = {**test[2], "question": test[2]["question"].replace(" ", "  ").upper()}
    broken = {"question": "Who knows?", "answer": "Nobody."}
    return {"train": [*train, train[0], leak, broken], "test": test}


@pytest.fixture(scope="session")
def raw_math() -> dict[str, list[dict[str, Any]]]:
    """The real columns of MATH."""

    def row(problem: str, solution: str) -> dict[str, Any]:
        return {"problem": problem, "level": "Level 3", "type": "Algebra", "solution": solution}

    train = [
        row("Simplify $\\sqrt{72}$.", "We have $\\sqrt{36 \\cdot 2} = \\boxed{6\\sqrt{2}}$."),
        row("What is $3/4 + 1/2$?", "The sum is $\\frac{3}{4}+\\frac{2}{4}=\\boxed{\\frac{5}{4}}$."),
        row("Compute $7^2$.", "It is $7 \\cdot 7$, or $\\boxed{49}$."),
        row("Compute $7^2$.", "It is $\\boxed{49}$."),
        row("Solve $x+1=4$.", "First \\boxed{4} is wrong, so $x=\\boxed 3$."),
    ]
    test = [
        row("Find $|{-5}|$.", "It is $\\boxed{5}$."),
        row("Expand $(x+1)^2$.", "It is $\\boxed{x^2+2x+1}$."),
    ]
    return {"train": train, "test": test}


@pytest.fixture(scope="session")
def raw_hellaswag() -> dict[str, list[dict[str, Any]]]:
    """The real columns. The hub's test split has empty labels."""

    def row(number: int, label: str, split: str) -> dict[str, Any]:
        return {
            "ind": number,
            "activity_label": "Making tea",
            "ctx_a": f"[header] How to make tea [title] Boil water [step] Fill kettle number {number}.",
            "ctx_b": "then she",
            "ctx": f"[header] How to make tea [title] Boil water [step] Fill kettle number {number}. then she",
            "endings": [f"{verb} the {split} kettle." for verb in ("heats", "eats", "paints", "sells")],
            "source_id": f"wikihow~{number}",
            "split": split,
            "split_type": "indomain",
            "label": label,
        }

    return {
        "train": [row(number, str(number % 4), "train") for number in range(8)],
        "validation": [row(number, str(number % 4), "val") for number in range(20, 24)],
        "test": [row(number, "", "test") for number in range(30, 32)],
    }
