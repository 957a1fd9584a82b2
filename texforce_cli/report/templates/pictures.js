// Pictures and prompts as they appear in every section.

/** Whether and how a picture is there: its URLs and its own size; null for a gap. */
function picture(variant, prompt, seed) {
  const index = data.pictures[place(variant, prompt, seed)];
  if (index < 0) return null;
  const [large, thumbnail, width, height] = media[index];
  const url = (name) => (name.startsWith("data:") ? name : `media/${name}`);
  return { index, large: url(large), small: url(thumbnail || large), width, height, sha256: data.sha256[index] };
}

/** An <img>; few pixels are enlarged one by one, and `alt` says what the caller may say. */
function image(found, { alt, large = false, lazy = true }) {
  return el("img", {
    class: Math.max(found.width, found.height) < 128 ? "pixels" : null,
    loading: lazy ? "lazy" : null,
    decoding: "async",
    width: found.width,
    height: found.height,
    alt,
    src: large ? found.large : found.small,
    draggable: "false",
  });
}

const gap = () => el("div", { class: "gap" }, "no picture");

/** A picture that opens the zoom, in which one can walk through `entries`, a list of {prompt, seed}. */
function pictureButton(variant, entries, at) {
  const { prompt, seed } = entries[at];
  const found = picture(variant, prompt, seed);
  if (!found) return gap();
  const alt = `${variants[variant].label}, seed ${seeds[seed]}: ${shorten(prompts[prompt].text, 100)}`;
  return el("button", { type: "button", class: "picture", onclick: () => openZoom(variant, entries, at) }, image(found, { alt }));
}

/** The name of a variant, and its score and gain by `metric` (null for none) under a picture. */
function caption(variant, prompt, seed, metric) {
  const line = el("figcaption", {}, el("span", { class: "name" }, swatch(variant), named(variants[variant].label)));
  const value = metric === null ? null : score(metric, variant, prompt, seed);
  if (value !== null) {
    const difference = variant === baseline ? null : gain(metric, variant, prompt, seed);
    line.append(
      el("span", { class: "value" }, number(value, metric), ...(difference === null ? [] : [" ", signed(difference, metric)])),
    );
  }
  return line;
}

// how many letters fit depends on the screen and on the script: it is measured
const cut = new ResizeObserver((seen) => {
  for (const { target } of seen) if (!target.classList.contains("whole")) target.nextElementSibling.hidden = target.scrollHeight <= target.clientHeight;
});

/** A prompt, cut after some lines by the style sheet, with a button for the rest where there is one. */
function promptText(prompt) {
  const text = el("div", { class: "text", dir: "auto" }, prompts[prompt].text || "(empty prompt)");
  if (prompts[prompt].text.length < 20) return text;
  const button = el(
    "button",
    {
      type: "button",
      class: "more",
      hidden: true,
      "aria-expanded": "false",
      onclick: () => {
        const whole = text.classList.toggle("whole");
        text.tabIndex = whole ? 0 : -1;
        button.setAttribute("aria-expanded", whole);
        button.textContent = whole ? "Show less" : "Show all";
      },
    },
    "Show all",
  );
  cut.observe(text);
  return el("div", {}, text, button);
}

/** What a prompt is called, where it belongs, and the seed. */
function tags(prompt, seed) {
  const { label, split, categories } = prompts[prompt];
  const chips = [label, split, ...categories, seed === null || seeds.length < 2 ? "" : `seed ${seeds[seed]}`];
  return el("div", { class: "tags" }, ...chips.filter(Boolean).map((text) => el("span", { class: "chip" }, named(text))));
}
