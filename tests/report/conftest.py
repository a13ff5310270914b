"""Run folders by the real writers, and pages read back as text, elements and data."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.eval.held_out import eval_metrics
from atropos_exp.runs.files import RunFiles, note_command, read_rows, write_summary
from atropos_exp.runs.summary import summarize_run
from atropos_exp.types import SampleRecord, StepMetrics


@pytest.fixture
def write_run() -> Callable[..., Path]:
    return _write_run


@pytest.fixture
def parse() -> Callable[[str], Page]:
    return Page


def _write_run(folder: Path, *, steps: int, seed: int = 0, status: str | None = "finished", text: str = "2") -> Path:
    """A run folder by the real writers. `status`: None leaves summary.json out."""
    files = RunFiles(folder, first_step=0)
    note_command(folder, ["python", "-m", "atropos_exp.run", f"seed={seed}"])
    (folder / "config.yaml").write_text(
        f"name: trial\nseed: {seed}\nmodel:\n  _target_: atropos_exp.parts.model.packaged.Packaged\n  path: tiny\n"
        f"trainer:\n  max_steps: {steps}\nnote: {json.dumps(text)}\n"
    )
    for step in range(steps + 1):
        share = step / max(1, steps)
        values = {
            "time/step_s": 1.0, "time/sync_s": 0.1, "time/proof_s": 0.05, "sync/bytes": 4e6, "sync/tensors": 9.0,
            "sync/digests_compared": 9.0, "sync/canary_gap_mean": 1e-7, "sync/canary_gap_max": 2e-6,
        }  # fmt: skip
        if step == 0:
            values |= {"reward/mean": float("nan"), "rollout/num": 0.0}
        else:
            values |= {
                "reward/mean": 0.25 + share / 2, "reward/std": 0.4, "rollout/num": 8.0, "rollout/num_local": 8.0,
                "rollout/num_tokens": 100.0, "time/rollout_s": 0.5, "time/update_s": 0.25, "grad/norm": 2.0 - share,
                "policy/entropy": 1.0 - share / 2, "policy/mismatch_kl": 1e-8, "policy/logprob_gap_mean": 1e-7,
                "policy/logprob_gap_max": 1e-6, "length/response_mean": 5.0, "length/response_max": 9.0,
                "group/zero_variance_fraction": share / 3, "policy/reference_kl": 0.0, "lr": 1e-3,
            }  # fmt: skip
        if step in (0, steps):
            correct = np.arange(100) < 30 + 60 * share
            values |= eval_metrics(name="arithmetic", correct=correct, num_correct=correct * 4, num_samples=4, k=4)
        files.log(StepMetrics(step=step, values=values))
        if step in (1, steps):
            files.samples(step, [
                SampleRecord(prompt_id=f"p{text}", prompt=f"1+1={text}", completion=f"{text} at {step}", reward=1.0,
                             advantage=0.5, lag=0, finish="stop")
            ])  # fmt: skip
    if status:
        write_summary(
            folder,
            summarize_run(
                read_rows(folder), status=status, error=f"it broke {text}" if status == "failed" else None,
                policy_version=steps, resumed_from=None, seed=seed, git="abc1234", versions={"torch": "2.13.0"},
                config_hash="f00d",
            ),
        )  # fmt: skip
    return folder


class Page(HTMLParser):
    """The text of a page, its elements, and the JSON that its charts are drawn from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data: dict[str, Any] = {}
        self._in: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in.append("data" if dict(attrs).get("id") == "data" else tag)

    def handle_endtag(self, tag: str) -> None:
        self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] == "data":
            self.data = json.loads(data)
        elif not self._in or self._in[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)
