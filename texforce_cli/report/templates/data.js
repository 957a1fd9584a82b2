// What the page knows, and the few ways to ask for it. Text enters the page as text nodes only.

const data = JSON.parse(document.getElementById("page-data").textContent);
const { variants, metrics, prompts, seeds, media, baseline } = data;
const others = variants.map((_, index) => index).filter((index) => index !== baseline);
const MINUS = "\u2212";
const shorten = (text, length) => ([...text].length > length ? `${[...text].slice(0, length).join("")}…` : text);

// the whole name of a variant is in the summary; elsewhere one of 300 letters would fill the page
for (const variant of variants) variant.label = shorten(variant.label, 48);

/** An element: `properties` are attributes, or listeners where their name begins with "on". */
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A name that somebody chose: it keeps its direction to itself. */
const named = (text) => el("bdi", {}, text);
const swatch = (variant) => el("span", { class: `swatch ${variants[variant].colour}` });
const byId = (id) => document.getElementById(id);
const part = (section, name) => byId(section).querySelector(`:scope > .${name}`);
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

const place = (variant, prompt, seed) => (variant * prompts.length + prompt) * seeds.length + seed;
const score = (metric, variant, prompt, seed) => data.scores[metric][place(variant, prompt, seed)];

/** Whether a cell counts, as in the table: every variant has a score there. */
const paired = (metric, prompt, seed) => variants.every((_, variant) => score(metric, variant, prompt, seed) !== null);

/** Difference to the baseline of one picture; null where some variant has no score. */
function gain(metric, variant, prompt, seed) {
  if (!paired(metric, prompt, seed)) return null;
  return score(metric, variant, prompt, seed) - score(metric, baseline, prompt, seed);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const present = (values) => values.filter((value) => value !== null);

/** The mean of `gain` over the seeds of a prompt. */
function promptGain(metric, variant, prompt) {
  const found = present(seeds.map((_, seed) => gain(metric, variant, prompt, seed)));
  return found.length ? mean(found) : null;
}

/** Metrics that score single pictures; others, diversity for one, know only prompts. */
const scored = metrics.map((_, metric) => metric).filter((metric) => data.scores[metric].some((value) => value !== null));
const better = (metric, difference) => (metrics[metric].higher ? difference : -difference);

function number(value, metric, sign = false) {
  if (value === null) return "–";
  const text = value.toFixed(metrics[metric].decimals);
  const zero = Number(text) === 0;
  return (sign && value > 0 && !zero ? "+" : "") + (zero ? text.replace("-", "") : text.replace("-", MINUS));
}

/** A difference with its sign, in the colour of better or worse. */
function signed(value, metric) {
  const good = better(metric, value);
  return el("span", { class: good > 0 ? "up" : good < 0 ? "down" : "" }, number(value, metric, true));
}

const metricName = (metric) => [named(metrics[metric].label), metrics[metric].unit ? ` (${metrics[metric].unit})` : ""];
const plainMetric = (metric) => metrics[metric].label + (metrics[metric].unit ? ` (${metrics[metric].unit})` : "");

function badge() {
  const tip = "In-sample: this variant was trained on what this metric measures, so that a gain here says little about the pictures.";
  return el("button", { type: "button", class: "badge", "data-tip": tip }, "in-sample");
}

/** A labelled choice; `options` are [value, text], and the chosen value arrives as text. */
function choice(label, options, chosen, changed) {
  const select = el("select", { onchange: () => changed(select.value) });
  for (const [value, text] of options) {
    select.append(el("option", { value, selected: String(value) === String(chosen) }, shorten(String(text), 60)));
  }
  return el("label", {}, label, select);
}

const variantOptions = (list) => list.map((variant) => [variant, variants[variant].label]);
const metricOptions = (list) => list.map((metric) => [metric, plainMetric(metric)]);
const distinct = (values) => [...new Set(values)];
