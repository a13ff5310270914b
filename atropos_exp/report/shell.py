"""The frame of every report: one HTML file that contains its styles, scripts and numbers."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atropos_exp import __version__
from atropos_exp.report.html import escape, tag
from atropos_exp.report.sections import swatch

_HERE = Path(__file__).parent


def document(
    title: str, body: Sequence[str], *, series: Sequence[dict[str, Any]], charts: Sequence[dict[str, Any]], source: str
) -> str:
    """Return the page.

    `series` and `charts` are what charts.js draws into the figures of `chart_figure`; `source` names the files that the
    numbers are from.
    """
    script = (_HERE / "charts.js").read_text() + (_HERE / "page.js").read_text()
    # only this script may run and nothing may be fetched, whatever a model wrote into a sample
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    footer = tag("footer", f"Written by atropos_exp {escape(__version__)} from {source}.")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            tag("title", escape(title)),
            f"<style>{(_HERE / 'style.css').read_text()}</style></head><body>",
            tag("main", *body, footer),
            '<div id="tip" class="card" hidden></div><div id="live" class="spoken" aria-live="polite"></div>',
            f'<script type="application/json" id="data">{_embedded({"runs": series, "charts": charts})}</script>',
            f"<script>{script}</script></body></html>\n",
        ]
    )


def curves(charts: Sequence[dict[str, Any]], zeros: Sequence[str], labels: Sequence[str]) -> str:
    """Return the section of charts, with a legend of the runs."""
    if not charts:
        return tag("h2", "Curves") + tag("p", "There are no steps to draw yet.", class_="muted")
    axis = "".join(
        tag("button", name, type="button", data_x=key, aria_pressed=str(key == "step").lower())
        for key, name in (("step", "steps"), ("minutes", "minutes"))
    )
    smooth = '<input id="smooth" type="range" min="0" max="0.95" step="0.05" aria-label="smoothing">'
    legend = "".join(
        tag("button", swatch(at), escape(label), type="button", data_run=at, aria_pressed="true")
        for at, label in enumerate(labels)
    )
    tools = tag(
        "div", tag("h2", "Curves"), tag("div", "x axis", axis, class_="group"),
        tag("label", "smoothing", smooth, class_="group"),
        tag("div", legend, class_="group runs") if len(labels) > 1 else "", class_="tools",
    )  # fmt: skip
    figures = "".join(chart_figure(at, chart) for at, chart in enumerate(charts))
    silent = tag("p", f"Zero at every step: {escape(', '.join(zeros))}.", class_="muted small zeros") if zeros else ""
    return tools + tag("noscript", "The curves need JavaScript.") + tag("div", figures, class_="charts") + silent


def chart_figure(at: int, chart: dict[str, Any]) -> str:
    """Return the empty figure that charts.js draws chart number `at` into."""
    unit = tag("span", f" {chart['unit']}", class_="unit") if chart["unit"] else ""
    label = f"enlarge {chart['title']}"
    grow = tag("button", "⤢", class_="grow", type="button", title="larger or smaller", aria_label=label)
    about = tag("p", escape(chart["about"]), class_="about")
    caption = tag("figcaption", tag("h3", escape(chart["title"]), unit), grow, about)
    return tag("figure", caption, tag("div", class_="series"), tag("div", class_="plot"), class_="card", data_chart=at)


def _embedded(content: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
