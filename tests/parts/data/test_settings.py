"""conf/data: the shipped options, and mistakes that are told before anything is read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from atropos_exp.config.build import build
from atropos_exp.errors import UserError
from atropos_exp.parts.data.verl import VerlData
from data_prep.prepare import configure, preflight
from tests.helpers.paths import CONF, ROOT

Make = Callable[..., Any]
DATA = CONF / "data"
OPTIONS = sorted(DATA.glob("*.yaml"))


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_every_option_builds(path: Path) -> None:
    values = yaml.safe_load(path.read_text().replace("${output_dir}", "outputs"))
    settings = build(values, "data")
    assert isinstance(settings, VerlData)
    assert settings.preflight() == []
    assert settings.prepare is not None
    assert preflight(settings.prepare) == []
    builder = configure(settings.prepare.builder, settings.prepare.arguments)
    assert list(settings.prepare.arguments) == list(type(builder).model_fields)
    assert builder == type(builder)()  # one set of defaults: the command line's and the configuration's are equal


def test_there_are_five_options() -> None:
    assert [path.stem for path in OPTIONS] == ["arithmetic", "gsm8k", "hellaswag", "math", "reasoning_gym"]


def test_settings_are_light() -> None:
    code = (
        "import sys, atropos_exp.parts.data.settings as s, data_prep.prepare as p; "
        "[p.preflight(s.PrepareSettings(builder=b, folder='x', arguments={})) for b in p.BUILDERS]; "
        "names = {'torch', 'verl', 'transformers', 'datasets', 'pyarrow', 'pandas', 'reasoning_gym'}; "
        "heavy = names & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parquet_paths": []}, "parquet_paths: it is empty, and so are hf_datasets and prepare"),
        ({"parquet_paths": 3}, "parquet_paths: must be a non-empty string or a list of them; got 3"),
        ({"parquet_paths": ["a.parquet", ""]}, "parquet_paths: must be"),
        ({"weights": [1.0, 2.0]}, "weights: got 2 for 1 sources"),
        (
            {"weights": [0.0]},
            r"weights: got \[0.0\], "
            r"expected a list \(each item a number, above 0 and at most 1e\+09\), or null \(leave a source out",
        ),
        ({"format": "alpaca"}, "format: got 'alpaca', expected one of chat, plain"),
        (
            {"format": "plain", "chat_template_arguments": {"a": 1}},
            "chat_template_arguments: format=plain uses no template",
        ),
        ({"max_prompts": 0}, "max_prompts: got 0, expected at least one per source, 1"),
        ({"max_bad_fraction": 1.0}, "max_bad_fraction: got 1.0"),
    ],
)
def test_ranges(settings: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**{"parquet_paths": "a.parquet", **changes})


def test_missing_files_are_told_with_their_neighbours(
    tmp_path: Path, rows_of: Make, write_rows: Make, settings: Make
) -> None:
    write_rows(tmp_path / "gsm8k" / "train.parquet", rows_of(["a"]))
    folder = tmp_path / "gsm8k"
    problems = settings(
        parquet_paths=[f"{folder}/trian.parquet", f"{folder}/part-*.parquet", f"{folder}", f"{tmp_path}/gsm/x.parquet"],
        hf_datasets=[f"{tmp_path}/nothing", "not a name", "openai/gsm8k:main@train"],
        eval_paths=[f"{folder}/test.parquet"],
    ).preflight()
    assert len(problems) == 7
    assert f"did you mean {folder}/train.parquet?" in problems[0] and problems[0].startswith("data.parquet_paths: ")
    assert f"no file matches {folder}/part-*.parquet" in problems[1]
    assert f"{folder} is a folder; name the files, such as {folder}/train.parquet" in problems[2]
    assert f"{tmp_path}/gsm/x.parquet does not exist" in problems[3] and f"did you mean {folder}?" in problems[3]
    assert problems[4] == f"data.hf_datasets: data set folder {tmp_path}/nothing does not exist"
    assert "'not a name' is neither a folder nor a hub id" in problems[5]
    assert problems[6].startswith("data.eval_paths: ") and f"{folder}/test.parquet does not exist" in problems[6]


def test_globs_and_home(
    tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in "cab":
        write_rows(tmp_path / "many" / f"{name}.parquet", rows_of([name]))
    write_rows(tmp_path / "odd" / "x[1].parquet", rows_of(["x"]))
    loader = open_loader(parquet_paths=["~/many/*.parquet", "~/odd/x[1].parquet"])
    assert {prompt.text for prompt in loader.take(4)} == {"a", "b", "c", "x"}
    assert [Path(file["name"]).name for file in loader.state()["files"]] == [
        "a.parquet", "b.parquet", "c.parquet", "x[1].parquet",
    ]  # fmt: skip
    assert len(loader.counts.sources) == 2
