"use strict";
// Draws every <figure data-chart="N"> as SVG from the JSON in #data. No library, no network.
// Text only ever enters through textContent, so nothing that a model wrote becomes markup.
const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";
const DASHES = ["", "5 4", "1.5 3.5", "8 3 2 3"];
const MARGIN = { left: 56, right: 14, top: 10, bottom: 26 };
const many = runs.length > 1;
const longest = Math.max(...runs.map((run) => run.x.step.length), 0);
const state = { x: "step", smooth: longest > 60 ? 0.6 : 0, hidden: new Set(), at: null };
const drawn = [];

function make(tag, attributes = {}, text = "") {
  const svg = ["svg", "g", "path", "line", "circle", "text", "rect", "clipPath"].includes(tag);
  const node = svg ? document.createElementNS(NS, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "color") node.style.setProperty("--c", value);
    else node.setAttribute(key, value);
  }
  if (text !== "") node.textContent = text;
  return node;
}

function format(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("e+", "e").replace("e-", "e−").replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(+value.toPrecision(4));
}

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(+(k * step).toPrecision(12));
  return found;
}

function smoothed(values, weight) {
  // exponential moving average with the bias of its start removed, as Adam does
  let mean = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

function linesOf(chart) {
  const found = [];
  runs.forEach((run, r) => {
    if (state.hidden.has(r)) return;
    chart.series.forEach((series, s) => {
      const raw = run.values[series.name];
      if (!raw || raw.every((value) => value === null)) return;
      const banded = series.band.length && !(many && s > 0);
      let low = banded ? run.values[series.band[0]] : null;
      let high = banded ? run.values[series.band[1]] : null;
      const std = series.std && runs.length < 3 ? run.values[series.std] : null;
      if (std) {
        low = raw.map((value, i) => (value === null || std[i] === null ? null : value - std[i]));
        high = raw.map((value, i) => (value === null || std[i] === null ? null : value + std[i]));
      }
      const weight = series.exact || chart.scale === "log" ? 0 : state.smooth;
      found.push({
        label: many ? (chart.series.length > 1 ? `${run.label} · ${series.label}` : run.label) : series.label,
        color: `var(--c${(many ? r : s) % 8})`, dash: many ? DASHES[s % 4] : "", sparse: series.sparse, weight,
        x: run.x[state.x], raw, y: smoothed(raw, weight),
        low: low && smoothed(low, weight), high: high && smoothed(high, weight),
      });
    });
  });
  return found;
}

function stackOf(chart) {
  const run = runs.find((_, r) => !state.hidden.has(r));
  if (!run) return [];
  const n = run.x.step.length;
  let base = new Array(n).fill(0);
  return chart.series.map((series, s) => {
    const raw = (run.values[series.name] || new Array(n).fill(null)).map((value) => value || 0);
    const top = raw.map((value, i) => base[i] + value);
    const line = { label: series.label, color: `var(--c${s % 8})`, x: run.x[state.x], raw, y: top, base, stacked: true };
    base = top;
    return line;
  });
}

function core(values) {
  // a few wild values of the unsmoothed curve may leave the chart
  const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
  return sorted.slice(Math.floor(sorted.length * 0.02), Math.ceil(sorted.length * 0.98));
}

function domain(chart, lines) {
  const log = chart.scale === "log";
  const given = lines.flatMap((line) => [line.y, line.weight ? core(line.raw) : line.raw, line.low || [], line.high || []].flat())
    .filter((value) => value !== null && (!log || value > 0));
  if (!given.length) return null;
  let low = given.reduce((a, b) => Math.min(a, b)), high = given.reduce((a, b) => Math.max(a, b));
  if (log) return [10 ** Math.floor(Math.log10(low)), 10 ** Math.max(Math.ceil(Math.log10(high)), Math.floor(Math.log10(low)) + 1)];
  const [bottom, top] = [low, high];
  if (chart.floor !== null) low = Math.min(low, chart.floor);
  if (chart.ceiling !== null) high = Math.max(high, chart.ceiling);
  // smoothing a constant leaves rounding noise, which is no range to draw
  const size = Math.max(Math.abs(low), Math.abs(high));
  const room = (high - low > size * 1e-6 ? high - low : size || 1) * 0.06;
  return [low === chart.floor && bottom >= low ? low : low - room, high === chart.ceiling && top <= high ? high : high + room];
}

function draw(view) {
  const { figure, chart } = view;
  const width = view.plot.clientWidth, height = figure.classList.contains("wide") ? 360 : 220;
  view.plot.replaceChildren();
  view.lines = chart.kind === "stack" ? stackOf(chart) : linesOf(chart);
  const range = domain(chart, view.lines);
  if (!range || width < 80) {
    view.scaleX = null;
    view.plot.append(make("p", { class: "empty" }, "nothing was measured"));
    return;
  }
  const xs = view.lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
  const scale = chart.scale === "log" ? Math.log10 : (value) => value;
  const [y0, y1] = range.map(scale);
  const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
  const X = (value) => MARGIN.left + ((value - x0) / (x1 - x0)) * (right - MARGIN.left);
  const Y = (value) => bottom - ((scale(value) - y0) / (y1 - y0)) * (bottom - MARGIN.top);
  const svg = make("svg", { width, height, role: "img", tabindex: "0", "aria-label": `${chart.title}: ${spoken(view.lines)}` });
  const yTicks = chart.scale === "log"
    ? ticks(y0, y1, Math.min(5, y1 - y0)).filter(Number.isInteger).map((power) => 10 ** power) : ticks(range[0], range[1], 4);
  for (const value of yTicks) {
    svg.append(make("line", { class: "grid", x1: MARGIN.left, x2: right, y1: Y(value), y2: Y(value) }));
    svg.append(make("text", { class: "tick", x: MARGIN.left - 8, y: Y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  const xTicks = ticks(x0, x1, Math.max(2, Math.min(8, width / 90))).filter((value) => state.x !== "step" || Number.isInteger(value));
  for (const value of xTicks) {
    svg.append(make("text", { class: "tick", x: X(value), y: height - 8, "text-anchor": "middle" }, format(value)));
  }
  svg.append(make("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }));
  const id = `clip${drawn.indexOf(view)}`, clip = make("clipPath", { id });
  clip.append(make("rect", { x: MARGIN.left - 4, y: 0, width: right - MARGIN.left + 8, height: bottom + 1 }));
  const marks = make("g", { "clip-path": `url(#${id})` });
  for (const line of view.lines) mark(marks, line, X, Y, chart.scale === "log");
  svg.append(clip, marks);
  view.cursor = make("g", { class: "cursor" });
  svg.append(view.cursor);
  Object.assign(view, { scaleX: X, scaleY: Y, x0, x1, top: MARGIN.top, bottom, svg });
  view.plot.append(svg);
  listen(view);
}

function mark(svg, line, X, Y, log) {
  const points = (ys) => ys.map((y, i) => (y === null || y === undefined || (log && y <= 0) ? null : [X(line.x[i]), Y(y)]));
  const path = (list, join) => {
    let d = "", pen = false;
    for (const point of list) {
      if (point) d += `${pen ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
      pen = point ? true : pen && join;
    }
    return d;
  };
  const area = (lows, highs) => {
    const upper = points(highs).filter(Boolean), lower = points(lows).filter(Boolean).reverse();
    return upper.length > 1 ? `${path(upper.concat(lower))}Z` : "";
  };
  if (line.stacked) svg.append(make("path", { class: "layer", d: area(line.base, line.y), color: line.color }));
  else if (line.low && line.high) {
    svg.append(make("path", { class: "band", d: area(line.low, line.high), color: line.color }));
    if (line.sparse) line.x.forEach((x, i) => {
      if (line.low[i] === null || line.low[i] === undefined) return;
      svg.append(make("line", { class: "whisker", x1: X(x), x2: X(x), y1: Y(line.low[i]), y2: Y(line.high[i]), color: line.color }));
    });
  }
  if (line.weight) svg.append(make("path", { class: "raw", d: path(points(line.raw), line.sparse), color: line.color }));
  if (line.stacked && line.x.length > 1) return;
  svg.append(make("path", { class: "curve", d: path(points(line.y), line.sparse), color: line.color, "stroke-dasharray": line.dash || "none" }));
  const shown = points(line.y).filter(Boolean);
  if (line.sparse || shown.length < 3) for (const [cx, cy] of shown) svg.append(make("circle", { class: "dot", cx, cy, r: 3, color: line.color }));
}

function spoken(lines) {
  return lines.slice(0, 4).map((line) => {
    const given = line.raw.filter((value) => value !== null);
    return `${line.label} from ${format(given[0])} to ${format(given[given.length - 1])}`;
  }).join("; ");
}

function nearest(line, x) {
  let best = -1;
  line.x.forEach((value, i) => {
    const has = line.stacked || line.raw[i] !== null;
    if (has && (best < 0 || Math.abs(value - x) < Math.abs(line.x[best] - x))) best = i;
  });
  return best;
}

function point(view, spoken) {
  // the crosshair stands at the same place in every chart; the numbers stand beside the one that is pointed at
  for (const other of drawn) {
    if (!other.scaleX) continue;
    other.cursor.replaceChildren();
    if (state.at === null || state.at < other.x0 || state.at > other.x1) continue;
    const x = other.scaleX(state.at);
    other.cursor.append(make("line", { x1: x, x2: x, y1: other.top, y2: other.bottom }));
    for (const line of other.lines) {
      const i = nearest(line, state.at);
      if (i < 0 || line.y[i] === null || (other.chart.scale === "log" && line.y[i] <= 0)) continue;
      other.cursor.append(make("circle", { cx: other.scaleX(line.x[i]), cy: other.scaleY(line.y[i]), r: 3.5, color: line.color }));
    }
  }
  const tip = document.getElementById("tip");
  tip.replaceChildren();
  tip.hidden = state.at === null || !view;
  if (tip.hidden) return;
  const head = state.x === "step" ? `step ${format(state.at)}` : `${format(state.at)} min`;
  tip.append(make("strong", {}, head));
  for (const line of view.chart.kind === "stack" ? view.lines.slice().reverse() : view.lines) {
    const i = nearest(line, state.at);
    if (i < 0) continue;
    const late = line.x[i] !== state.at && state.x === "step" ? ` at step ${format(line.x[i])}` : "";
    const span = line.low && line.low[i] !== null && line.low[i] !== undefined ? ` [${format(line.low[i])}, ${format(line.high[i])}]` : "";
    const row = make("div");
    row.append(make("i", { color: line.color }), make("span", {}, line.label), make("b", {}, format(line.raw[i]) + span + late));
    tip.append(row);
  }
  const box = view.svg.getBoundingClientRect(), x = box.left + view.scaleX(state.at);
  tip.style.top = `${window.scrollY + box.top + 12}px`;
  tip.style.left = `${window.scrollX + (x + 30 + tip.offsetWidth > window.innerWidth ? x - tip.offsetWidth - 14 : x + 14)}px`;
  if (spoken) document.getElementById("live").textContent = tip.innerText;
}

function listen(view) {
  const steps = () => {
    // where anything of this chart was measured
    const found = view.lines.flatMap((line) => line.x.filter((_, i) => line.stacked || line.raw[i] !== null));
    return [...new Set(found)].sort((a, b) => a - b);
  };
  const go = (x, spoken) => {
    const xs = steps();
    state.at = xs.reduce((best, value) => (Math.abs(value - x) < Math.abs(best - x) ? value : best), xs[0]);
    point(view, spoken);
  };
  view.svg.addEventListener("pointermove", (event) => {
    const left = view.svg.getBoundingClientRect().left + MARGIN.left;
    const share = (event.clientX - left) / (view.scaleX(view.x1) - MARGIN.left);
    go(view.x0 + share * (view.x1 - view.x0));
  });
  view.svg.addEventListener("pointerleave", () => { state.at = null; point(null); });
  view.svg.addEventListener("blur", () => { state.at = null; point(null); });
  view.svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const xs = steps(), now = state.at === null ? (move < 0 ? xs.length : -1) : xs.indexOf(state.at);
    go(xs[Math.max(0, Math.min(xs.length - 1, now + move))], true);
  });
}
