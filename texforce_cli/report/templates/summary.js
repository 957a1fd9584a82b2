// The table of the summary: sorted by its heads, filtered by what its rows are about; and the first pictures of the set.

function startTable() {
  const panel = byId("summary");
  const body = panel.querySelector("table.summary tbody");
  const rows = [...body.rows];
  const kinds = ["group", "metric", "variant"];
  const chosen = { group: rows.some((row) => row.dataset.group === "all prompts") ? "all prompts" : "", metric: "", variant: "" };
  const count = panel.querySelector(".count");

  const filter = () => {
    for (const row of rows) row.hidden = kinds.some((kind) => chosen[kind] && row.dataset[kind] !== chosen[kind]);
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${plural(rows.length, "row")}`;
  };
  const words = { group: "every group", metric: "every metric", variant: "every variant" };
  const titles = { group: "Prompts", metric: "Metric", variant: "Variant" };
  part("summary", "filters").append(
    ...kinds.map((kind) => {
      const options = distinct(rows.map((row) => row.dataset[kind])).map((value) => [value, value]);
      return choice(titles[kind], [["", words[kind]], ...options], chosen[kind], (value) => {
        chosen[kind] = value;
        filter();
      });
    }),
  );
  filter();

  for (const button of panel.querySelectorAll("thead button")) {
    button.addEventListener("click", () => sortBy(button, body, rows));
  }
}

/** Sort by the column of `button`: numbers begin with the largest, words with A; what is empty stays at the end. */
function sortBy(button, body, rows) {
  const head = button.closest("th");
  const numeric = button.dataset.kind === "number";
  const before = head.getAttribute("aria-sort");
  const ascending = before ? before === "descending" : !numeric;
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const value = (row) => {
    const cell = row.cells[head.cellIndex];
    if (!numeric) return cell.querySelector("bdi").textContent;
    return cell.dataset.sort === undefined || !Number.isFinite(Number(cell.dataset.sort)) ? null : Number(cell.dataset.sort);
  };
  const order = (a, b) => (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const sorted = rows
    .map((row) => ({ row, value: value(row) }))
    .sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
      return ascending ? order(a.value, b.value) : order(b.value, a.value);
    });
  body.append(...sorted.map((entry) => entry.row));
}

/** The first prompts of the set at its first seed, one line a variant: a look at the pictures, not a selection. */
function startStrip() {
  const strip = part("summary", "strip");
  const first = prompts.map((_, prompt) => prompt).slice(0, 8);
  if (!media.length || !first.length) return;
  const entries = first.map((prompt) => ({ prompt, seed: 0 }));
  const table = el(
    "table",
    {},
    el("thead", {}, el("tr", {}, el("td", {}), ...first.map((prompt) => el("td", {}, promptText(prompt))))),
    el(
      "tbody",
      {},
      ...variants.map((variant, index) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, el("span", { class: "line" }, swatch(index), named(variant.label))),
          ...entries.map((entry, at) => el("td", {}, pictureButton(index, entries, at))),
        ),
      ),
    ),
  );
  table.prepend(el("colgroup", {}, el("col"), ...first.map(() => el("col", { class: "one" }))));
  const rest = prompts.length > first.length ? `The first ${first.length} prompts` : "The prompts";
  const seed = seeds.length > 1 ? `, seed ${seeds[0]}` : "";
  strip.before(el("p", { class: "quiet" }, `${rest} of the set${seed}, not chosen. Press a picture to see it large.`));
  strip.append(table);
}

section("summary", () => {
  startStrip();
  if (metrics.length) startTable();
});
