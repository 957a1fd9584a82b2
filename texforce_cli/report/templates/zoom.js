// One picture large, or two under a slider. Left and right change the variant, up and down the row, C compares.

const dialog = byId("zoom");
const zoom = { entries: [], at: 0, variant: 0, against: baseline, comparing: false, cut: 50 };

function openZoom(variant, entries, at) {
  Object.assign(zoom, { entries, at, variant });
  drawZoom();
  dialog.showModal();
  // the buttons take the focus; the page behind keeps its place
  dialog.querySelector(".variants [aria-pressed=true]")?.focus();
}

function stepVariant(by) {
  zoom.variant = (zoom.variant + by + variants.length) % variants.length;
  drawZoom();
}

function stepRow(by) {
  zoom.at = Math.min(zoom.entries.length - 1, Math.max(0, zoom.at + by));
  drawZoom();
}

function compare(on) {
  zoom.comparing = on && variants.length > 1;
  if (zoom.comparing && zoom.against === zoom.variant) {
    if (zoom.variant === baseline) zoom.variant = others[0];
    else zoom.against = baseline;
  }
  drawZoom();
}

/** Draw all of it anew; the control that had the focus gets it back. */
function drawZoom() {
  const focused = dialog.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const { prompt, seed } = zoom.entries[zoom.at];
  dialog.classList.toggle("comparing", zoom.comparing);
  dialog.replaceChildren(zoomHead(prompt, seed), el("div", { class: "stage" }, frameOf(prompt, seed)), zoomFoot(prompt, seed));
  const again = focused && dialog.querySelector(`[data-key="${focused}"]`);
  if (again) again.focus();
}

function zoomHead(prompt, seed) {
  const close = el("button", { type: "button", class: "button", "data-key": "close", onclick: () => dialog.close() }, "Close ", el("kbd", {}, "Esc"));
  const text = el("p", { id: "zoom-prompt", dir: "auto", tabindex: prompts[prompt].text.length > 200 ? 0 : null }, prompts[prompt].text || "(empty prompt)");
  return el("div", { class: "zoom-head" }, el("div", {}, text, tags(prompt, seed)), close);
}

function frameOf(prompt, seed) {
  const main = picture(zoom.variant, prompt, seed);
  const frame = el("div", { class: "frame" });
  const put = (variant, name) => {
    const found = picture(variant, prompt, seed);
    const alt = `${variants[variant].label}, seed ${seeds[seed]}: ${shorten(prompts[prompt].text, 100)}`;
    const shown = found ? image(found, { alt, large: true, lazy: false }) : gap();
    if (name) shown.classList.add(name);
    frame.append(shown);
    return found;
  };
  const own = put(zoom.variant, "");
  const first = zoom.comparing ? put(zoom.against, "over") : null;
  const size = own || first || main;
  frame.style.setProperty("--ratio", size ? size.width / size.height : 1);
  if (zoom.comparing) {
    frame.append(
      el("div", { class: "cut" }),
      el("div", { class: "side a", "aria-hidden": "true" }, named(variants[zoom.against].label)),
      el("div", { class: "side b", "aria-hidden": "true" }, named(variants[zoom.variant].label)),
    );
    frame.style.setProperty("--cut", `${zoom.cut}%`);
    const drag = (event) => event.buttons & 1 && setCut(((event.clientX - frame.getBoundingClientRect().left) / frame.offsetWidth) * 100);
    for (const name of ["pointerdown", "pointermove"]) frame.addEventListener(name, drag);
  }
  return frame;
}

function setCut(value) {
  zoom.cut = Math.round(Math.min(100, Math.max(0, value)));
  dialog.querySelector(".frame").style.setProperty("--cut", `${zoom.cut}%`);
  const range = dialog.querySelector("input[type=range]");
  range.value = zoom.cut;
  range.setAttribute("aria-valuetext", cutText());
}

const cutText = () => `${zoom.cut} % ${variants[zoom.against].label}, ${100 - zoom.cut} % ${variants[zoom.variant].label}`;

function zoomFoot(prompt, seed) {
  const foot = el("div", { class: "zoom-foot" });
  if (zoom.comparing) {
    const range = el("input", {
      type: "range", min: 0, max: 100, step: 1, value: zoom.cut, "data-key": "slider",
      "aria-label": "How much of the first picture is shown", "aria-valuetext": cutText(), oninput: () => setCut(range.valueAsNumber),
    });
    foot.append(range);
  }
  foot.append(el("div", { class: "bar variants", role: "group", "aria-label": "Variant" }, ...variantButtons(prompt, seed)), controls());
  return foot;
}

/** A button a variant, with its score by the first metric; while comparing, for the right side of the slider. */
function variantButtons(prompt, seed) {
  return variants.map((variant, index) => {
    const value = scored.length ? score(scored[0], index, prompt, seed) : null;
    const press = () => {
      zoom.variant = index;
      drawZoom();
    };
    return el(
      "button",
      {
        type: "button", class: "button", "data-key": `variant-${index}`, "aria-pressed": String(index === zoom.variant), onclick: press,
        title: value === null ? null : plainMetric(scored[0]),
      },
      swatch(index),
      named(variant.label),
      value === null ? null : el("span", { class: "value" }, number(value, scored[0])),
    );
  });
}

function controls() {
  const button = (key, text, press, more = {}) => el("button", { type: "button", class: "button", "data-key": key, onclick: press, ...more }, ...[text].flat());
  const bar = el("div", { class: "bar" });
  if (zoom.entries.length > 1) {
    bar.append(
      button("back", ["Back ", el("kbd", {}, "↑")], () => stepRow(-1), { disabled: zoom.at === 0 }),
      el("span", { class: "count", role: "status" }, `${zoom.at + 1} of ${zoom.entries.length}`),
      button("next", ["Next ", el("kbd", {}, "↓")], () => stepRow(1), { disabled: zoom.at === zoom.entries.length - 1 }),
    );
  }
  if (variants.length > 1) {
    bar.append(button("compare", ["Compare ", el("kbd", {}, "C")], () => compare(!zoom.comparing), { "aria-pressed": String(zoom.comparing) }));
  }
  if (zoom.comparing) {
    const options = variants.map((variant, index) => [index, variant.label]);
    const against = choice("with", options, zoom.against, (value) => {
      zoom.against = Number(value);
      drawZoom();
    });
    against.querySelector("select").dataset.key = "against";
    bar.append(against);
  }
  return bar;
}

function startZoom() {
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, p") || event.ctrlKey || event.metaKey || event.altKey) return;
    const actions = {
      ArrowRight: () => stepVariant(1), ArrowLeft: () => stepVariant(-1), ArrowDown: () => stepRow(1), ArrowUp: () => stepRow(-1),
      c: () => compare(!zoom.comparing), C: () => compare(!zoom.comparing),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  });
  // a press on the empty margin of the stage closes, as one expects of a picture
  dialog.addEventListener("click", (event) => event.target.classList.contains("stage") && dialog.close());
}
