// Differences with their intervals, the win matrix, and histograms, as SVG and tables.

const percent = (share) => `${Math.round(share * 1e4) / 100}%`;

/** About `count` round numbers in [low, high]. */
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const misses = (size) => Math.abs((high - low) / size - count);
  const step = [1, 2, 5, 10].map((factor) => factor * power).reduce((best, size) => (misses(size) < misses(best) ? size : best));
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Array.from({ length: last - first + 1 }, (_, index) => {
    const value = (first + index) * step;
    return { value, text: value.toFixed(Math.min(12, digits)).replace(/^-(?=[0.]*$)/, "").replace("-", MINUS) };
  });
}

function verdict(metric, low, high) {
  if (low === 0 && high === 0) return "same";
  if (low <= 0 && high >= 0) return "unclear";
  return better(metric, low) > 0 ? "better" : "worse";
}

// differences

section("differences", () => {
  const rows = data.rows.filter((row) => row.variant !== baseline && row.difference !== null);
  const content = part("differences", "content");
  if (!rows.length) {
    content.append(el("p", { class: "quiet" }, "There is no difference to show."));
    return;
  }
  const chosen = { group: "", variant: "", metric: "" };
  const draw = () => {
    const kept = rows.filter((row) => Object.entries(chosen).every(([kind, value]) => value === "" || String(row[kind]) === value));
    const used = distinct(kept.map((row) => row.metric));
    content.replaceChildren(...used.flatMap((metric) => forest(metric, kept.filter((row) => row.metric === metric))));
  };
  const set = (kind) => (value) => {
    chosen[kind] = value;
    draw();
  };
  const groups = distinct(rows.map((row) => row.group));
  part("differences", "filters").append(
    choice("Prompts", [["", "every group"], ...groups.map((group) => [group, group])], "", set("group")),
    choice("Metric", [["", "every metric"], ...metricOptions(distinct(rows.map((row) => row.metric)))], "", set("metric")),
    choice("Variant", [["", "every variant"], ...variantOptions(distinct(rows.map((row) => row.variant)))], "", set("variant")),
  );
  draw();
});

function forest(metric, rows) {
  const ends = rows.flatMap((row) => [row.low, row.high, row.difference]).filter((value) => value !== null);
  const low = Math.min(0, ...ends);
  const high = Math.max(0, ...ends);
  const wide = high - low || 1;
  const at = (value) => percent(0.03 + (0.94 * (value - low)) / wide);
  const marks = ticks(low, low + wide, 4);
  const direction = metrics[metric].higher ? "right is better" : "left is better";
  return [
    el("h3", {}, ...metricName(metric), " ", el("small", {}, direction)),
    el(
      "table",
      { class: "forest" },
      el("thead", { class: "aside" }, el("tr", {}, ...["Variant", "Interval", "Difference"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...rows.map((row) => forestRow(row, metric, at, marks))),
      el("tfoot", {}, el("tr", {}, el("td", { class: "who" }), el("td", {}, axis(marks, at)), el("td", { class: "figures" }))),
    ),
  ];
}

function forestRow(row, metric, at, marks) {
  const whole = row.low !== null && row.high !== null;
  const word = whole ? verdict(metric, row.low, row.high) : "";
  const numbers = whole ? `${number(row.low, metric, true)} to ${number(row.high, metric, true)}` : "no interval";
  const line = (name, x1, x2, y1, y2) => svg("line", { class: name, x1, x2, y1, y2 });
  const drawing = svg("svg", { role: "img", "aria-label": `${number(row.difference, metric, true)}, ${numbers}, ${word}` });
  drawing.append(...marks.map((mark) => line(mark.value === 0 ? "zero" : "tick", at(mark.value), at(mark.value), -30, 74)));
  if (whole) drawing.append(line(`span ${word}`, at(row.low), at(row.high), 22, 22));
  drawing.append(svg("circle", { class: `dot ${word}`, cx: at(row.difference), cy: 22, r: 6 }));
  const inSample = variants[row.variant].in_sample.includes(metric);
  return el(
    "tr",
    {},
    el(
      "th",
      { class: "who", scope: "row" },
      swatch(row.variant),
      el("b", {}, named(variants[row.variant].label)),
      inSample ? " " : null,
      inSample ? badge() : null,
      el("small", {}, named(row.group)),
    ),
    el("td", {}, drawing),
    el(
      "td",
      { class: "figures" },
      number(row.difference, metric, true),
      " ",
      el("span", { class: `verdict ${word}` }, word),
      el("small", {}, numbers),
      row.label ? el("small", {}, named(row.label)) : null,
    ),
  );
}

function axis(marks, at) {
  const texts = marks.map((mark) => svg("text", { x: at(mark.value), y: 17, "text-anchor": "middle" }, mark.text));
  return svg("svg", { "aria-hidden": "true" }, ...texts);
}

// wins

section("wins", () => {
  const content = part("wins", "content");
  const known = metrics.map((_, metric) => metric).filter((metric) => data.wins[metric].flat().some((rate) => rate !== null));
  content.append(...known.map((metric) => el("div", { class: "card" }, el("h3", {}, ...metricName(metric)), matrix(metric))));
  if (!known.length) content.append(el("p", { class: "quiet" }, "There is nothing to compare."));
});

function matrix(metric) {
  const cell = (row, column) => {
    const rate = data.wins[metric][row][column];
    if (row === column || rate === null) return el("td", { class: "none" }, row === column ? "·" : "–");
    const td = el("td", { class: rate > 0.5 ? "won" : rate < 0.5 ? "lost" : "" }, `${Math.round(100 * rate)}\u202f%`);
    td.style.setProperty("--heat", percent(Math.min(1, 2 * Math.abs(rate - 0.5)) * 0.62));
    return td;
  };
  const columns = variants.map((variant) => el("th", { scope: "col" }, named(variant.label)));
  const rows = variants.map((variant, row) =>
    el("tr", {}, el("th", { scope: "row" }, named(variant.label)), ...variants.map((_, column) => cell(row, column))),
  );
  return el(
    "div",
    { class: "matrix", role: "region", tabindex: 0, "aria-label": `Win matrix of ${metrics[metric].label}` },
    el("table", {}, el("thead", {}, el("tr", {}, el("td", { class: "none" }, el("span", { class: "aside" }, "row beats column")), ...columns)), el("tbody", {}, ...rows)),
  );
}

// histograms

section("scores", () => {
  const content = part("scores", "content");
  const splits = distinct(prompts.map((prompt) => prompt.split)).filter(Boolean);
  const draw = (split) => content.replaceChildren(el("div", { class: "histograms" }, ...scored.map((metric) => histogram(metric, split))));
  if (splits.length > 1) {
    const options = [["", "all prompts"], ...splits.map((split) => [split, `${split} prompts`])];
    part("scores", "filters").append(choice("Prompts", options, "", draw));
  }
  if (!scored.length) content.append(el("p", { class: "quiet" }, "No picture has a score."));
  else draw("");
});

function scoresOf(metric, variant, split) {
  const values = prompts.map((prompt, index) =>
    split && prompt.split !== split ? [] : seeds.map((_, seed) => (paired(metric, index, seed) ? score(metric, variant, index, seed) : null)),
  );
  return present(values.flat());
}

/** Bins of equal width over all variants: by Freedman and Diaconis, 8 to 32; one where all scores are the same. */
function bins(values) {
  const sorted = Float64Array.from(values).sort();
  const low = sorted[0];
  const high = sorted[sorted.length - 1];
  if (low === high) return { low: low - 0.5, high: high + 0.5, count: 1 };
  const quartile = (share) => sorted[Math.floor(share * (sorted.length - 1))];
  const width = (2 * (quartile(0.75) - quartile(0.25))) / Math.cbrt(sorted.length);
  const count = width > 0 ? Math.round((high - low) / width) : 20;
  return { low, high, count: Math.min(32, Math.max(8, count)) };
}

function histogram(metric, split) {
  const scores = variants.map((_, variant) => scoresOf(metric, variant, split));
  const card = el("div", { class: "card" }, el("h3", {}, ...metricName(metric), " ", el("small", {}, `${metrics[metric].higher ? "higher" : "lower"} is better`)));
  const all = scores.flat();
  if (!all.length) {
    card.append(el("p", { class: "quiet" }, "No scores here."));
    return card;
  }
  const { low, high, count } = bins(all);
  const shares = scores.map((values) => {
    const bars = new Array(count).fill(0);
    for (const value of values) bars[Math.min(count - 1, Math.floor(((value - low) / (high - low)) * count))] += 1 / values.length;
    return bars;
  });
  const top = Math.max(...shares.flat()) * 1.12;
  const at = (value) => percent((value - low) / (high - low));
  const layers = variants.map((variant, index) => layer(variant, scores[index], shares[index], top, count, at));
  card.append(frame(layers, metric, scores, top, low, high, at), legend(layers, metric, scores));
  return card;
}

/** One variant: its steps, and a line at its mean. */
function layer(variant, values, bars, top, count, at) {
  const group = svg("g", { class: variant.colour });
  if (!values.length) return group;
  const steps = bars.map((share, index) => `L${index} ${1 - share / top} L${index + 1} ${1 - share / top}`).join(" ");
  const box = svg("svg", { x: 0, y: 0, width: "100%", height: 200, viewBox: `0 0 ${count} 1`, preserveAspectRatio: "none", overflow: "visible" });
  box.append(svg("path", { class: "area", d: `M0 1 ${steps} L${count} 1 Z` }), svg("path", { class: "outline", d: `M0 1 ${steps} L${count} 1` }));
  group.append(box, svg("line", { class: "average", x1: at(mean(values)), x2: at(mean(values)), y1: -2, y2: 200 }));
  return group;
}

function frame(layers, metric, scores, top, low, high, at) {
  const told = variants.map((variant, index) => `${variant.label} ${scores[index].length ? number(mean(scores[index]), metric) : "no scores"}`);
  const plot = svg("svg", { class: "plot", role: "img", "aria-label": `Histogram of ${metrics[metric].label}. Means: ${told.join(", ")}.` });
  // none so high that it meets the title
  const heights = ticks(0, top * 100, 3).filter((tick) => tick.value < 95 * top);
  const y = (tick) => 200 - (tick.value / (100 * top)) * 200;
  plot.append(
    ...heights.map((tick) => svg("line", { class: "tick", x1: 0, x2: "100%", y1: y(tick), y2: y(tick) })),
    ...layers,
    svg("line", { class: "zero", x1: 0, x2: "100%", y1: 200, y2: 200 }),
    ...ticks(low, high, 5).map((tick) => svg("text", { x: at(tick.value), y: 220, "text-anchor": "middle" }, tick.text)),
    ...heights.slice(1).map((tick) => svg("text", { x: 0, y: y(tick) - 4 }, `${tick.text} %`)),
  );
  return plot;
}

/** Boxes that take a variant out; the one that is pointed at stands out. */
function legend(layers, metric, scores) {
  const entries = variants.map((variant, index) => {
    const toggle = el("input", { type: "checkbox", checked: true, onchange: () => (layers[index].style.display = toggle.checked ? "" : "none") });
    const point = (on) => () => layers.forEach((layer, other) => layer.classList.toggle("faded", on && other !== index));
    const value = el("output", {}, scores[index].length ? `mean ${number(mean(scores[index]), metric)}` : "no scores");
    return el(
      "li",
      { onpointerenter: point(true), onpointerleave: point(false), onfocusin: point(true), onfocusout: point(false) },
      el("label", {}, toggle, swatch(index), named(variant.label), value),
    );
  });
  return el("ul", { class: "legend" }, ...entries);
}
