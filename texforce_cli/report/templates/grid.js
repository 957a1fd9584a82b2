// All pictures: variants beside each other, a row for each prompt and seed, made as one scrolls.

const ROWS_AT_ONCE = 24;

section("pictures", () => {
  const chosen = {
    words: "", split: "", category: "", seed: "", order: "set",
    metric: scored.length ? scored[0] : null,
    variant: others.length ? others[0] : null,
    columns: new Set(variants.keys()),
  };
  const content = part("pictures", "content");
  const count = part("pictures", "count");
  const list = el("div", { class: "rows" });
  const end = el("div", { class: "end" });
  content.append(list, end);

  let entries = [];
  let made = 0;
  const more = () => {
    const rows = entries.slice(made, made + ROWS_AT_ONCE).map((_, at) => gridRow(entries, made + at, chosen));
    made += rows.length;
    list.append(...rows);
  };
  const draw = () => {
    entries = gridEntries(chosen);
    made = 0;
    list.replaceChildren();
    list.style.setProperty("--columns", Math.max(1, chosen.columns.size));
    count.textContent = `${entries.length.toLocaleString("en")} of ${plural(prompts.length * seeds.length, "row")}`;
    more();
  };
  // the end comes near: more rows; again while it stays near
  new IntersectionObserver((seen, observer) => {
    if (!seen.some((entry) => entry.isIntersecting) || made >= entries.length) return;
    more();
    observer.unobserve(end);
    observer.observe(end);
  }, { rootMargin: "1500px" }).observe(end);

  gridFilters(chosen, draw);
  draw();
});

function gridFilters(chosen, draw) {
  const set = (name, read = (value) => value) => (value) => {
    chosen[name] = read(value);
    draw();
  };
  const search = el("input", { type: "search", placeholder: "words of the prompt", oninput: () => set("words")(search.value) });
  const filters = [el("label", { class: "wide" }, "Find prompts", search)];
  const kinds = [["split", "Prompts", prompts.map((prompt) => prompt.split)], ["category", "Category", prompts.flatMap((prompt) => prompt.categories)]];
  for (const [kind, title, all] of kinds) {
    const values = distinct(all).filter(Boolean);
    if (values.length > 1) filters.push(choice(title, [["", "all"], ...values.map((value) => [value, value])], "", set(kind)));
  }
  if (seeds.length > 1) filters.push(choice("Seed", [["", "all"], ...seeds.map((seed, at) => [at, seed])], "", set("seed")));
  if (scored.length) filters.push(choice("Metric", metricOptions(scored), chosen.metric, set("metric", Number)));
  if (scored.length && others.length) {
    const orders = [["set", "as in the set"], ["gain", "largest gain first"], ["loss", "largest loss first"]];
    filters.push(choice("Gain of", variantOptions(others), chosen.variant, set("variant", Number)));
    filters.push(choice("Order", orders, "set", set("order")));
  }
  if (variants.length > 1) filters.push(columnChecks(chosen, draw));
  part("pictures", "filters").append(...filters);
}

function columnChecks(chosen, draw) {
  const checks = variants.map((variant, index) => {
    const toggle = () => {
      if (box.checked) chosen.columns.add(index);
      else chosen.columns.delete(index);
      draw();
    };
    const box = el("input", { type: "checkbox", checked: true, onchange: toggle });
    return el("label", {}, box, swatch(index), named(variant.label));
  });
  return el("fieldset", { class: "wide" }, el("legend", {}, "Variants"), el("div", { class: "checks" }, ...checks));
}

/** The rows that the filters leave, in the order that is asked for. */
function gridEntries({ words, split, category, seed, order, metric, variant }) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const entries = [];
  prompts.forEach((prompt, index) => {
    const text = `${prompt.text} ${prompt.label}`.toLowerCase();
    if ((split && prompt.split !== split) || (category && !prompt.categories.includes(category))) return;
    if (!wanted.every((word) => text.includes(word))) return;
    seeds.forEach((_, at) => (seed === "" || Number(seed) === at) && entries.push({ prompt: index, seed: at }));
  });
  if (order === "set" || metric === null || variant === null) return entries;
  const sign = order === "gain" ? -1 : 1;
  return entries
    .map((entry) => ({ ...entry, gain: gain(metric, variant, entry.prompt, entry.seed) }))
    .sort((a, b) => {
      if (a.gain === null || b.gain === null) return (a.gain === null) - (b.gain === null);
      return sign * (better(metric, a.gain) - better(metric, b.gain));
    });
}

function gridRow(entries, at, { columns, metric }) {
  const { prompt, seed } = entries[at];
  const shown = [...variants.keys()].filter((variant) => columns.has(variant));
  return el(
    "article",
    { class: "row", "data-prompt": prompt, "data-seed": seed },
    el("div", { class: "words" }, promptText(prompt), tags(prompt, seed)),
    el(
      "div",
      { class: "cells" },
      ...shown.map((variant) => el("figure", {}, pictureButton(variant, entries, at), caption(variant, prompt, seed, metric))),
    ),
  );
}
