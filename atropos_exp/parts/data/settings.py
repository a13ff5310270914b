"""The settings of `conf/data`: which prompts a run sees, and in which form."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from atropos_exp.config.settings import Positive, Settings
from atropos_exp.errors import UserError
from atropos_exp.parts.data.paths import as_strings, files_of

Strings = Annotated[tuple[str, ...], BeforeValidator(as_strings)]  # in YAML also one string, or null


class PrepareSettings(Settings):
    """A data set that is built when first needed. Its train.parquet is the first source, its test.parquet held out."""

    builder: str  # a module of data_prep
    folder: str  # parent; each choice of arguments gets a folder of its own inside
    arguments: dict[str, Any]  # of the builder


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry of the configuration that names files or a data set."""

    name: str
    key: str  # the setting that names it
    is_hub: bool  # a data set name rather than a parquet path
    split: str  # used if the name has none


class DataSettings(Settings):
    """The settings of `conf/data`, whose YAML explains each."""

    prepare: PrepareSettings | None
    parquet_paths: Strings
    hf_datasets: Strings
    weights: Annotated[list[Positive] | None, Field(description="leave a source out rather than give it 0")]
    eval_paths: Strings
    format: Literal["chat", "plain"]
    system_prompt: str | None
    chat_template_arguments: dict[str, Any]
    ability: Strings  # to train on; empty: all
    max_prompts: Annotated[int | None, Field(le=10**9)]
    cache: Annotated[str, Field(min_length=1, description="a folder")]
    max_bad_fraction: Annotated[float, Field(ge=0, lt=1, description="0: none")]

    @model_validator(mode="after")
    def _check(self) -> Self:
        wrong = []
        num_sources = (self.prepare is not None) + len(self.parquet_paths) + len(self.hf_datasets)
        if num_sources == 0:
            wrong.append("parquet_paths: it is empty, and so are hf_datasets and prepare; expected at least one source")
        if self.weights is not None and len(self.weights) != num_sources:
            wrong.append(
                f"weights: got {len(self.weights)} for {num_sources} sources; expected one each, in the order "
                "prepare, parquet_paths, hf_datasets (or null: in proportion to their sizes)"
            )
        if self.format == "plain" and self.chat_template_arguments:
            wrong.append("chat_template_arguments: format=plain uses no template; expected {} or format=chat")
        if self.max_prompts is not None and self.max_prompts < num_sources:
            wrong.append(
                f"max_prompts: got {self.max_prompts}, expected at least one per source, {num_sources}, or null"
            )
        if wrong:
            raise UserError("\n".join(wrong))
        return self

    @property
    def has_eval(self) -> bool:
        """Whether any prompts are held out."""
        return self.prepare is not None or bool(self.eval_paths)

    def sources(self, prepared_folder: Path | None) -> list[Entry]:
        """The sources to train on, in the order of `weights`."""
        return [
            *self._prepared(prepared_folder, "train"),
            *(Entry(name=name, key="data.parquet_paths", is_hub=False, split="") for name in self.parquet_paths),
            *(Entry(name=name, key="data.hf_datasets", is_hub=True, split="train") for name in self.hf_datasets),
        ]

    def eval_sources(self, prepared_folder: Path | None) -> list[Entry]:
        """The held-out sources. A name that does not end in .parquet is that of a data set."""
        entries = [
            Entry(name=name, key="data.eval_paths", is_hub=not name.endswith(".parquet"), split="test")
            for name in self.eval_paths
        ]
        return [*self._prepared(prepared_folder, "test"), *entries]

    def preflight(self) -> list[str]:
        """Messages about what is wrong, as far as it shows without tokenizer, network or reading a file."""
        from atropos_exp.parts.data.hub import DatasetName

        problems = []
        for entry in [*self.sources(Path()), *self.eval_sources(Path())]:
            if entry.key == "data.prepare":
                continue
            try:
                if not entry.is_hub:
                    files_of(entry.name, key=entry.key)
                elif problem := DatasetName.parse(entry.name).problem():
                    problems.append(f"{entry.key}: {problem}")
            except UserError as error:
                text = str(error)
                problems.append(text if text.startswith("data.") else f"{entry.key}: {text}")
        return problems

    def file_problems(self) -> list[str]:
        """Messages about parquet files that cannot be used, as far as it shows without reading a row."""
        from atropos_exp.parts.data.early import problems_of

        entries = [*self.sources(Path()), *self.eval_sources(Path())]
        return problems_of((one.key, one.name) for one in entries if not one.is_hub and one.key != "data.prepare")

    def _prepared(self, folder: Path | None, split: str) -> Sequence[Entry]:
        if self.prepare is None:
            return []
        assert folder is not None, (
            "data.prepare is set: run.py passes the folder that data_prep.prepare.ensure returned"
        )
        return [Entry(name=str(folder / f"{split}.parquet"), key="data.prepare", is_hub=False, split=split)]
