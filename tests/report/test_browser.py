"""The page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.report.page import write_report

ATTACK = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def browser(folder: Path, page: Path) -> list[str]:
    """The command that loads `page`, lets it run, and prints its elements."""
    assert CHROMIUM is not None
    return [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        "--virtual-time-budget=3000", "--window-size=1400,2200", f"--user-data-dir={folder / 'profile'}",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the page was not drawn")
@pytest.mark.parametrize("kind", ["several", "one step"])
def test_a_browser_draws_every_chart_without_an_error(tmp_path: Path, kind: str, write_run: Any, parse: Any) -> None:
    folders = [write_run(tmp_path / "a", steps=1)]
    if kind == "several":
        folders = [write_run(tmp_path / name, steps=70, seed=at, text=ATTACK) for at, name in enumerate("bc")]
    report = write_report(folders, tmp_path / "report.html")
    shown = subprocess.run(browser(tmp_path, report), capture_output=True, text=True, timeout=90)
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
    page = parse(shown.stdout)
    assert "<title>taken" not in shown.stdout and page.count("img") == 0
    drawn = parse(report.read_text())
    assert page.count("figure") == drawn.count("figure") == len(drawn.data["charts"]) > 10
    classes = [attributes.get("class") for _, attributes in page.elements]
    num_curves = sum(
        any(value is not None for value in run["values"].get(series["name"], []))
        for chart in drawn.data["charts"] if chart["kind"] == "line"
        for series in chart["series"] for run in drawn.data["runs"]
    )  # fmt: skip
    assert classes.count("curve") == num_curves
    assert classes.count("layer") == 7  # the stages of a step
    assert all("NaN" not in (attributes.get("d") or "") for _, attributes in page.elements)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the page was not used")
def test_pointing_at_a_chart_tells_its_numbers_and_the_legend_hides_a_run(tmp_path: Path, write_run: Any) -> None:
    folders = [write_run(tmp_path / name, steps=4, seed=at) for at, name in enumerate("ab")]
    html = write_report(folders, tmp_path / "report.html").read_text()
    act = """
const plot = drawn[0].svg, box = plot.getBoundingClientRect(), told = [];
const event = (share) => new PointerEvent("pointermove", {clientX: box.left + 56 + share * (box.width - 70)});
const at = (share) => plot.dispatchEvent(event(share));
at(1); told.push(document.getElementById("tip").innerText);
at(0.02); told.push(document.getElementById("tip").innerText);
plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
told.push(document.getElementById("live").innerText);
document.querySelector('[data-x="minutes"]').click();
document.querySelector('[data-run="1"]').click();
told.push(String(drawn[0].lines.length), String(drawn[0].lines[0].x[4]));
document.title = JSON.stringify(told);
"""
    # the page runs no script but its own; this copy may
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    copy = tmp_path / "copy.html"
    copy.write_text(html.replace("</body>", f"<script>{act}</script></body>"))
    shown = subprocess.run(browser(tmp_path, copy), capture_output=True, text=True, timeout=90)
    titled = re.search(r"<title>(.*?)</title>", shown.stdout, re.S)
    assert titled
    told = [" ".join(text.split()) for text in json.loads(unescape(titled[1]))]
    assert told[0] == "step 4 seed=0 0.75 [0.35, 1.15] seed=1 0.75 [0.35, 1.15]"
    assert told[1].startswith("step 1 seed=0 0.375")  # step 0 has no reward: the nearest that has
    assert told[2].startswith("step 2 seed=0 0.5 ")
    assert told[3:] == ["1", str(5 / 60)]
