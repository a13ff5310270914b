// Wires the page: charts into their figures, the toolbar, the legend of runs, the theme.

function redraw() {
  point(null);
  drawn.forEach(draw);
}

function legendOf(view) {
  const box = view.figure.querySelector(".series");
  const known = view.chart.series.filter((series) => runs.some((run) => run.values[series.name]));
  if (known.length < 2) return;
  known.forEach((series, s) => {
    const item = make("span", many && view.chart.kind !== "stack" ? { color: "var(--muted)" } : { color: `var(--c${s % 8})` });
    const key = make("svg", { width: 22, height: 8, "aria-hidden": "true" });
    key.append(make("line", { x1: 0, x2: 22, y1: 4, y2: 4, "stroke-dasharray": (many && view.chart.kind !== "stack" && DASHES[s % 4]) || "none" }));
    item.append(key, make("span", {}, series.label));
    box.append(item);
  });
}

function toolbar() {
  for (const button of document.querySelectorAll("[data-x]")) {
    button.addEventListener("click", () => {
      state.x = button.dataset.x;
      for (const other of document.querySelectorAll("[data-x]")) other.setAttribute("aria-pressed", String(other === button));
      redraw();
    });
  }
  const slider = document.getElementById("smooth");
  if (slider) {
    slider.value = String(state.smooth);
    slider.addEventListener("input", () => { state.smooth = Number(slider.value); redraw(); });
  }
  for (const button of document.querySelectorAll("[data-run]")) {
    const r = Number(button.dataset.run);
    button.addEventListener("click", () => {
      if (state.hidden.has(r)) state.hidden.delete(r);
      else state.hidden.add(r);
      button.setAttribute("aria-pressed", String(!state.hidden.has(r)));
      redraw();
    });
  }
}

function theme() {
  const root = document.documentElement, button = document.getElementById("theme");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  name();
}

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const view = { figure, chart: charts[Number(figure.dataset.chart)], plot: figure.querySelector(".plot"), lines: [], scaleX: null };
  drawn.push(view);
  legendOf(view);
  figure.querySelector(".grow").addEventListener("click", () => {
    figure.classList.toggle("wide");
    draw(view);
  });
  let width = 0;
  new ResizeObserver(() => {
    if (view.plot.clientWidth === width) return;
    width = view.plot.clientWidth;
    draw(view);
  }).observe(view.plot);
  draw(view);
}
toolbar();
theme();
