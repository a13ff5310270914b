"""HTML by hand, escaped by default: every text goes through `escape`, every number through `figure`."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

__all__ = ["bytes_figure", "card_table", "escape", "figure", "seconds_figure", "signed", "tag"]


def tag(name: str, *children: str, **attributes: Any) -> str:
    """Return an element around children that are HTML already. `class_` is class, `data_x` is data-x."""
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return f"<{name}{shown}>{''.join(children)}</{name}>"


def figure(value: Any, digits: int = 4) -> str:
    """Format a number for people: 0.5, 12,346, 3.1e−6; a dash for None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        shown = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return shown.replace("e-", "e−")  # a line never breaks at this minus
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def signed(value: Any) -> str:
    """Format a number with its sign, for advantages and differences."""
    shown = figure(value, 3)
    return f"+{shown}" if isinstance(value, (int, float)) and value > 0 else shown.replace("-", "−", 1)


def seconds_figure(value: Any) -> str:
    """Format seconds: 0.045 is 45 ms, 75.0 is 1 min 15 s."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    if value < 1:
        return f"{figure(value * 1000, 3)} ms"
    if value < 60:
        return f"{figure(value, 3)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def bytes_figure(value: Any) -> str:
    """Format bytes: 6710272 is 6.71 MB."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{figure(value / size, 3)} {unit}"
    return f"{figure(value)} B"


def card_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numeric_from: int = 1) -> str:
    """Return a table in a card. Cells are HTML already; the columns from `numeric_from` on hold numbers."""
    kind = ["n" if at >= numeric_from else "name" for at in range(len(heads))]
    head = tag("tr", *(tag("th", escape(text), class_=kind[at]) for at, text in enumerate(heads)))
    body = "".join(tag("tr", *(tag("td", cell, class_=kind[at]) for at, cell in enumerate(row))) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="card scroll")
