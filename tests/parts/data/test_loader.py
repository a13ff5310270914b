"""The stream: formats, filters, counts, exact resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.errors import UserError
from atropos_exp.types import Prompt

Make = Callable[..., Any]
WORDS = [f"word {number:02d}" for number in range(20)]


@pytest.fixture
def words(tmp_path: Path, rows_of: Make, write_rows: Make) -> Path:
    path: Path = write_rows(tmp_path / "words.parquet", rows_of(WORDS))
    return path


def same(left: list[Prompt], right: list[Prompt]) -> bool:
    return len(left) == len(right) and all(
        one.prompt_id == other.prompt_id
        and one.text == other.text
        and one.ground_truth == other.ground_truth
        and one.token_ids.tolist() == other.token_ids.tolist()
        and one.extra_info == other.extra_info
        for one, other in zip(left, right, strict=True)
    )


def test_a_prompt_carries_all_of_its_row(words: Path, open_loader: Make, tokenizer: Any) -> None:
    prompts = {prompt.text: prompt for prompt in open_loader(parquet_paths=words).take(20)}
    prompt = prompts["word 07"]
    assert prompt.prompt_id == "toy/train/7"
    assert (prompt.data_source, prompt.ability, prompt.ground_truth) == ("toy", "toy", "70 drow")
    assert prompt.extra_info == {"split": "train", "index": 7}
    assert prompt.token_ids.dtype == np.int32
    assert tokenizer.decode(prompt.token_ids) == "<user>word 07</s><assistant>"
    assert len(prompt.token_ids) == 1 + 7 + 1 + 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "plain"}, "<s>word 07"),
        ({"format": "plain", "system_prompt": "Reply."}, "<s>Reply.\n\nword 07"),
        ({"system_prompt": "Reply."}, "<system>Reply.</s><user>word 07</s><assistant>"),
        ({"chat_template_arguments": {"shout": True}}, "<user>word 07</s>!<assistant>"),
    ],
)
def test_formats(words: Path, open_loader: Make, tokenizer: Any, changes: dict[str, Any], expected: str) -> None:
    prompts = {prompt.text: prompt for prompt in open_loader(parquet_paths=words, **changes).take(20)}
    assert tokenizer.decode(prompts["word 07"].token_ids) == expected


def test_several_messages(tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make, tokenizer: Any) -> None:
    row = rows_of(["and 3?"])[0]
    row["prompt"] = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 3?"},
    ]
    path = write_rows(tmp_path / "turns.parquet", [row])
    (own,) = open_loader(parquet_paths=path).take(1)
    (replaced,) = open_loader(parquet_paths=path, system_prompt="Sum.").take(1)
    (plain,) = open_loader(parquet_paths=path, format="plain").take(1)
    turns = "<user>1+1?</s><assistant>2</s><user>and 3?</s><assistant>"
    assert own.text == "and 3?"
    assert tokenizer.decode(own.token_ids) == "<system>Add.</s>" + turns
    assert tokenizer.decode(replaced.token_ids) == "<system>Sum.</s>" + turns
    assert tokenizer.decode(plain.token_ids) == "<s>Add.\n\n1+1?\n\n2\n\nand 3?"


def test_chat_needs_a_template(words: Path, settings: Make, tmp_path: Path) -> None:
    class Bare:
        chat_template = None

    with pytest.raises(UserError, match=r"format=chat needs a tokenizer with a chat template.*plain"):
        settings(parquet_paths=words).loader(
            Bare(), seed=0, max_prompt_length=9, max_response_length=9, run_folder=tmp_path
        )


def test_overlong_prompts_are_left_out_and_counted(
    tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make
) -> None:
    path = write_rows(tmp_path / "long.parquet", rows_of(["x" * length for length in range(1, 11)]))
    loader = open_loader(parquet_paths=path, max_prompt_length=9)  # three tokens of template: up to six of text
    assert sorted(len(prompt.text) for prompt in loader.take(6)) == [1, 2, 3, 4, 5, 6]
    assert (loader.counts.total.num_prompts, loader.counts.total.num_overlong) == (6, 4)
    with pytest.raises(
        UserError, match=r"long\.parquet gives no prompt: of 10 rows 10 are longer than max_prompt_length=3"
    ):
        open_loader(parquet_paths=path, max_prompt_length=3)


def test_ability(tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make) -> None:
    rows = [*rows_of(["a", "b"], ability="math"), *rows_of(["c"], ability="code"), *rows_of(["d"], ability="chess")]
    path = write_rows(tmp_path / "rows.parquet", rows)
    loader = open_loader(parquet_paths=path, ability="math")
    assert {prompt.text for prompt in loader.take(4)} == {"a", "b"}
    assert loader.counts.total.num_other_ability == 2
    assert {prompt.text for prompt in open_loader(parquet_paths=path, ability=["math", "chess"]).take(3)} == {
        "a",
        "b",
        "d",
    }
    with pytest.raises(UserError, match=r"not of ability maths \(there: \['chess', 'code', 'math'\]\)"):
        open_loader(parquet_paths=path, ability="maths")


def test_max_prompts_is_shared_out_by_size(tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make) -> None:
    small = write_rows(tmp_path / "small.parquet", rows_of([f"s{i}" for i in range(10)], source="small"))
    large = write_rows(tmp_path / "large.parquet", rows_of([f"l{i}" for i in range(30)], source="large"))
    loader = open_loader(parquet_paths=[str(small), str(large)], max_prompts=8)
    assert {prompt.text for prompt in loader.take(8)} == {"s0", "s1", "l0", "l1", "l2", "l3", "l4", "l5"}
    assert loader.counts.total.num_prompts == 8
    assert loader.counts.total.num_beyond_cap == 32
    assert loader.counts.lines()[1] == f"{large}: 6 prompts of 30 rows, 6 an epoch (left out: 24 beyond max_prompts)"


def test_weights_mix_sources(tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make) -> None:
    paths = [write_rows(tmp_path / f"{name}.parquet", rows_of(list(name * 9), source=name)) for name in "ab"]
    paths.append(write_rows(tmp_path / "c.parquet", rows_of([f"c{i}" for i in range(82)], source="c")))
    loader = open_loader(parquet_paths=[str(path) for path in paths], weights=[0.5, 0.3, 0.2])
    for _ in range(3):
        assert Counter(prompt.data_source for prompt in loader.take(100)) == {"a": 50, "b": 30, "c": 20}
    assert loader.counts.shares == (50, 30, 20)


def test_prompt_ids_are_unique(tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make) -> None:
    rows = rows_of(["a", "b"])
    bare = [
        {key: value for key, value in row.items() if key not in ("extra_info", "ability")} for row in rows_of(["c"])
    ]
    paths = [write_rows(tmp_path / "one.parquet", rows), write_rows(tmp_path / "two.parquet", rows_of(["x"]))]
    paths.append(write_rows(tmp_path / "bare.parquet", bare))
    loader = open_loader(parquet_paths=[str(path) for path in paths])
    ids = {prompt.text: prompt.prompt_id for prompt in loader.take(4)}
    assert ids == {"a": "toy/train/0", "b": "toy/train/1", "x": "toy/train/0~2", "c": "toy/bare/0"}
    assert loader.counts.num_renamed_ids == 1


def test_eval_prompts_are_never_trained_on(tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make) -> None:
    train = write_rows(tmp_path / "train.parquet", rows_of([*WORDS, "Held  Out "]))
    test = write_rows(tmp_path / "test.parquet", rows_of(["WORD 03", "held out", "word\n11", "new"], split="test"))
    loader = open_loader(parquet_paths=train, eval_paths=test)
    seen = {prompt.text for prompt in loader.take(100)}
    assert seen == set(WORDS) - {"word 03", "word 11"}  # compared without case and spacing
    assert loader.counts.total.num_eval_overlap == 3
    assert loader.counts.num_eval_rows == 4
    with pytest.raises(UserError, match=r"gives no prompt: of 4 rows 4 are eval prompts"):
        open_loader(parquet_paths=test, eval_paths=test)


def test_eval_prompts_are_a_fixed_choice(
    words: Path, tmp_path: Path, rows_of: Make, write_rows: Make, settings: Make, tokenizer: Any
) -> None:
    test = write_rows(tmp_path / "test.parquet", rows_of([f"t{i:02d}" for i in range(30)], split="test"))
    chosen = settings(parquet_paths=words, eval_paths=test)
    five = chosen.eval_prompts(tokenizer, num_prompts=5, max_prompt_length=99)
    every = chosen.eval_prompts(tokenizer, num_prompts=99, max_prompt_length=99)
    assert len(five) == 5 and len(every) == 30
    assert same(five, every[:5])
    assert {prompt.prompt_id for prompt in every} == {f"toy/test/{i}" for i in range(30)}
    assert tokenizer.decode(five[0].token_ids) == f"<user>{five[0].text}</s><assistant>"
    with pytest.raises(UserError, match=r"data\.eval_paths: it is empty"):
        settings(parquet_paths=words).eval_prompts(tokenizer, num_prompts=5, max_prompt_length=99)


def test_resume_is_exact_at_every_cursor(
    words: Path, tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make
) -> None:
    other = write_rows(tmp_path / "other.parquet", rows_of(["p", "q", "r"], source="other"))
    sources = {"parquet_paths": [str(words), str(other)], "weights": [1.0, 1.0]}
    whole = open_loader(**sources)
    stream, states = [], []
    for _ in range(3 * 23 + 5):  # three epochs and a bit
        states.append(json.loads(json.dumps(whole.state())))
        stream.extend(whole.take(1))
    resumed = open_loader(**sources)
    for cursor, state in enumerate(states):
        resumed.restore(state)
        assert resumed.state()["cursor"] == cursor
        assert same(resumed.take(7), stream[cursor : cursor + 7]) or cursor + 7 > len(stream)
        assert same(resumed.take(0), [])
    steps = open_loader(**sources)
    assert same([prompt for _ in range(10) for prompt in steps.take(7)], stream[:70])


def test_equal_arguments_give_an_equal_stream_and_another_seed_another(words: Path, open_loader: Make) -> None:
    first, again, other = (open_loader(parquet_paths=words, seed=seed).take(45) for seed in (5, 5, 6))
    assert same(first, again)
    assert not same(first, other)


def test_a_changed_file_is_named_with_both_fingerprints(
    words: Path, rows_of: Make, write_rows: Make, open_loader: Make
) -> None:
    state = open_loader(parquet_paths=words).state()
    before = state["files"][0]["content_hash"]
    write_rows(words, rows_of(WORDS), compression="gzip", row_group_size=3)  # the same rows in other bytes
    open_loader(parquet_paths=words).restore(state)
    write_rows(words, rows_of([*WORDS[:-1], "changed"]))
    changed = open_loader(parquet_paths=words)
    after = changed.state()["files"][0]["content_hash"]
    assert before != after
    with pytest.raises(UserError, match=rf"words\.parquet changed since the checkpoint: .*{before}.*{after}"):
        changed.restore(state)


def test_a_moved_folder_resumes(words: Path, tmp_path: Path, open_loader: Make) -> None:
    loader = open_loader(parquet_paths=words)
    loader.take(9)
    state, rest = loader.state(), loader.take(30)
    moved = words.rename(tmp_path / "elsewhere.parquet")
    again = open_loader(parquet_paths=moved)
    again.restore(state)
    assert same(again.take(30), rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed changed since the checkpoint: was 0, now 1"),
        ({"format": "plain"}, "data.format changed since the checkpoint: was 'chat', now 'plain'"),
        ({"max_prompts": 5}, "data.max_prompts changed since the checkpoint: was None, now 5"),
        ({"weights": [2.0]}, r"data.weights changed since the checkpoint: was None, now \[2.0\]"),
        ({"max_prompt_length": 999}, "max_prompt_length changed since the checkpoint: was 1000, now 999"),
    ],
)
def test_a_changed_setting_is_named(words: Path, open_loader: Make, changes: dict[str, Any], message: str) -> None:
    state = open_loader(parquet_paths=words).state()
    with pytest.raises(UserError, match=message):
        open_loader(parquet_paths=words, **changes).restore(state)


def test_another_tokenizer_is_noticed(words: Path, settings: Make, tokenizer: Any, tmp_path: Path) -> None:
    def open_with(template: str) -> Any:
        import copy

        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return settings(parquet_paths=words).loader(
            other, seed=0, max_prompt_length=99, max_response_length=9, run_folder=tmp_path
        )

    state = open_with(tokenizer.chat_template).state()
    with pytest.raises(UserError, match=r"the tokenizer or its chat template changed"):
        open_with("{% for message in messages %}Q: {{ message['content'] }} A:{% endfor %}").restore(state)


def test_files_added_or_removed_are_noticed(
    words: Path, tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make
) -> None:
    more = write_rows(tmp_path / "wzz.parquet", rows_of(["q"]))
    state = open_loader(parquet_paths=words).state()
    with pytest.raises(
        UserError, match=r"had 1 data files at the checkpoint and has 2 now \(difference: .*wzz\.parquet\)"
    ):
        open_loader(parquet_paths=[str(words), str(more)]).restore(state)
    with pytest.raises(UserError, match=r"had 0 eval files at the checkpoint and has 1 now"):
        open_loader(parquet_paths=words, eval_paths=more).restore(state)


def test_prompt_and_response_must_fit_the_tokenizers_context(
    words: Path, settings: Make, tokenizer: Any, tmp_path: Path
) -> None:
    import copy

    small = copy.deepcopy(tokenizer)
    small.model_max_length = 64
    with pytest.raises(
        UserError, match=r"max_prompt_length=60 \+ max_response_length=5 is 65 tokens.*model_max_length=64"
    ):
        settings(parquet_paths=words).loader(
            small, seed=0, max_prompt_length=60, max_response_length=5, run_folder=tmp_path
        )
