"""Draws held-out accuracy over the steps, all held-out sets together, with 95 % (Wilson) intervals:

python docs/results/curves.py OUT.svg TITLE RUN [RUN …]      one finished run per seed
"""

import json
import sys
from pathlib import Path

from atropos_exp.parts.eval.estimators import wilson_interval

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 320, 56, 40, 16, 44
FONT = 'font-family="sans-serif" font-size="13"'
COLOURS = ("#0b62b8", "#c4500a", "#0a7d55")


def curve(run: Path) -> tuple[int, list[tuple[int, float, float, float]]]:
    """(seed, [(step, accuracy, low, high)])"""
    points = []
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        sets = [name.removesuffix("/accuracy") for name in row if name.endswith("/accuracy")]
        total = sum(round(row[f"{name}/num"]) for name in sets)
        right = sum(round(row[f"{name}/accuracy"] * row[f"{name}/num"]) for name in sets)
        if total:
            points.append((row["step"], right / total, *wilson_interval(mean=right / total, num=total)))
    return json.loads((run / "summary.json").read_text())["seed"], points


def main() -> None:
    out, title, *runs = sys.argv[1:]
    curves = sorted(curve(Path(run)) for run in runs)
    last = max(points[-1][0] for _, points in curves)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (1 - value) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-weight="bold" fill="#222">{title}</text>',
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle" fill="#555">training step</text>',
    ]
    for value in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        dash = ' stroke-dasharray="4 4"' if value == 0.9 else ""
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd"{dash}/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#555">{value:g}</text>')
    for step in range(0, last + 1, 10):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 26}" text-anchor="middle" fill="#555">{step}</text>')
    for number, (seed, points) in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        band = [(x(s), y(high)) for s, _, _, high in points] + [(x(s), y(low)) for s, _, low, _ in reversed(points)]
        parts.append(f'<path d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in band)}Z" fill="{colour}" opacity="0.10"/>')
        line = "L".join(f"{x(s):.1f} {y(value):.1f}" for s, value, _, _ in points)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{WIDTH - RIGHT - 8}" y="{y(0.30) + 18 * number:.1f}" text-anchor="end" fill="{colour}">'
            f"seed {seed}: {points[0][1]:.2f} to {points[-1][1]:.2f}</text>"
        )
    Path(out).write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
