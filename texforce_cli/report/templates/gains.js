// The prompts on which a variant gains and loses most against the baseline, with their pictures.

const EXTREMES = 8;
const SEEDS_SHOWN = 3;

section("gains", () => {
  const content = part("gains", "content");
  if (!others.length || !scored.length) {
    content.append(el("p", { class: "quiet" }, "There is nothing to compare."));
    return;
  }
  const chosen = { variant: others[0], metric: scored[0], split: "" };
  const draw = () => content.replaceChildren(halves(chosen));
  const set = (name) => (value) => {
    chosen[name] = name === "split" ? value : Number(value);
    draw();
  };
  const splits = distinct(prompts.map((prompt) => prompt.split)).filter(Boolean);
  part("gains", "filters").append(
    choice("Variant", variantOptions(others), chosen.variant, set("variant")),
    choice("Metric", metricOptions(scored), chosen.metric, set("metric")),
    splits.length > 1
      ? choice("Prompts", [["", "all prompts"], ...splits.map((split) => [split, `${split} prompts`])], "", set("split"))
      : "",
  );
  draw();
});

function halves({ variant, metric, split }) {
  const found = prompts
    .map((prompt, index) => ({ prompt: index, gain: !split || prompt.split === split ? promptGain(metric, variant, index) : null }))
    .filter((entry) => entry.gain !== null)
    .sort((a, b) => better(metric, b.gain) - better(metric, a.gain));
  const gains = found.filter((entry) => better(metric, entry.gain) > 0);
  const losses = found.filter((entry) => better(metric, entry.gain) < 0).reverse();
  const inSample = variants[variant].in_sample.includes(metric);
  const half = (title, list) =>
    el(
      "div",
      {},
      el("h3", {}, `${title} `, el("small", {}, `${list.length} of ${plural(found.length, "prompt")}`)),
      ...list.slice(0, EXTREMES).map((entry) => extreme(entry, variant, metric)),
      list.length ? null : el("p", { class: "quiet" }, "None."),
    );
  return el(
    "div",
    {},
    inSample ? el("p", {}, badge(), el("small", {}, " This variant was trained on what this metric measures.")) : null,
    el("div", { class: "halves" }, half("Gains", gains), half("Losses", losses)),
  );
}

function extreme({ prompt, gain: difference }, variant, metric) {
  const entries = seeds.map((_, seed) => ({ prompt, seed }));
  const pairs = el("div", { class: "pairs" });
  const shown = entries.slice(0, SEEDS_SHOWN);
  // several seeds stand above each other in columns, one seed has its two pictures side by side
  pairs.style.setProperty("--columns", Math.max(2, shown.length));
  for (const one of [baseline, variant]) {
    pairs.append(...shown.map(({ seed }, at) => el("figure", {}, pictureButton(one, entries, at), caption(one, prompt, seed, metric))));
  }
  const left = seeds.length - SEEDS_SHOWN;
  return el(
    "article",
    { class: "extreme" },
    el(
      "div",
      { class: "words" },
      el("div", { class: "figure" }, signed(difference, metric)),
      promptText(prompt),
      tags(prompt, null),
      left > 0 ? el("p", {}, el("small", {}, `and ${plural(left, "seed")} more in the zoom`)) : null,
    ),
    pairs,
  );
}
