// Draws the charts of a report. Their data is in #charts, what a step is on each axis in #axes.
"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const axes = read("axes"), figures = read("charts");
const control = (id) => document.getElementById(id);
const AXES = {step: "step", tokens: "tokens", hours: "hours of training", flops: "operations (FLOPs)"};
const settings = {displaylogo: false, responsive: true, displayModeBar: window.innerWidth >= 640, modeBarButtons: [["toImage", "resetScale2d"]]};

// The value of a step on an axis, between two known steps in proportion.
function along(run, axis, step) {
  const steps = axes[run].step, values = axes[run][axis];
  if (step === null || axis === "step" || !values) return step;
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  const [before, after] = [low > 0 ? low - 1 : -1, low];
  const [s0, v0] = before < 0 ? [0, 0] : [steps[before], values[before]];
  const share = steps[after] === s0 ? 1 : Math.min((step - s0) / (steps[after] - s0), 1);
  return v0 + (values[after] - v0) * share;
}

// Exponential mean, corrected for its beginning; gaps stay gaps.
function smooth(values, weight) {
  let mean = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

function traces(figure) {
  const axis = control("axis").value, weight = Number(control("smoothing").value);
  return figure.data.flatMap((trace) => {
    if (trace.meta.fixed) return [trace];
    const moved = {...trace, x: trace.x.map((step) => along(trace.meta.run, axis, step))};
    if (trace.meta.mark) moved.visible = control("marks").checked;
    if (!trace.meta.smooth || weight === 0 || trace.y.length < 10) return [moved];
    const faint = {...moved, opacity: 0.25, mode: "lines", showlegend: false, hoverinfo: "skip", line: {...trace.line, width: 1}};
    return [faint, {...moved, mode: "lines", y: smooth(trace.y, weight)}];
  });
}

function layout(figure) {
  if (figure.data.some((trace) => trace.meta.fixed)) return figure.layout;
  const log = control("log").checked && !figure.data.some((trace) => trace.stackgroup);
  const narrow = window.innerWidth < 640;
  return {
    ...figure.layout,
    height: narrow ? Math.min(figure.layout.height, 300) : figure.layout.height,
    xaxis: {...figure.layout.xaxis, title: {text: AXES[control("axis").value], font: {size: 12}}, nticks: narrow ? 5 : 9},
    yaxis: {...figure.layout.yaxis, type: log ? "log" : "linear"},
  };
}

const places = [...document.querySelectorAll("[data-chart]")];
const figureOf = (place) => figures[Number(place.dataset.chart)];
const draw = () => places.forEach((place) => Plotly.react(place, traces(figureOf(place)), layout(figureOf(place)), settings));

// A stretch of steps chosen in one chart is shown in all.
let following = false;
function follow(event, chosen) {
  const reset = event["xaxis.autorange"], range = event["xaxis.range"] || [event["xaxis.range[0]"], event["xaxis.range[1]"]];
  if (following || (!reset && range[0] === undefined)) return;
  following = true;
  const change = reset ? {"xaxis.autorange": true} : {"xaxis.range": range};
  const others = places.filter((place) => place !== chosen && !figureOf(place).data.some((trace) => trace.meta.fixed));
  Promise.all(others.map((place) => Plotly.relayout(place, change))).finally(() => { following = false; });
}

for (const name of Object.keys(AXES)) {
  control("axis").querySelector(`[value=${name}]`).hidden = !axes.some((run) => run[name]);
}
// On paper a drawing shrinks with its column: see `@media print` in the style.
function scale(place) {
  const {width, height} = place._fullLayout;
  place.style.setProperty("--aspect", `${width} / ${height}`);
  place.querySelectorAll(".main-svg").forEach((svg) => svg.setAttribute("viewBox", `0 0 ${width} ${height}`));
}

draw();
places.forEach((place) => {
  scale(place);
  place.on("plotly_afterplot", () => scale(place));
  place.on("plotly_relayout", (event) => follow(event, place));
});
for (const id of ["axis", "smoothing", "log", "marks"]) control(id).addEventListener("input", draw);
