// A person votes: two variants of the same prompt and seed, in random order and without names.

const STORES = "texforce-votes:";
const STORE = STORES + data.hash;
const ballot = { votes: [], salt: 0, pair: "", kept: true, current: null, ready: false };

/** Numbers in [0, 1) that depend on `seed` alone (mulberry32). */
function randomFrom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

function shuffled(list, random) {
  const copy = [...list];
  for (let last = copy.length - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [copy[last], copy[other]] = [copy[other], copy[last]];
  }
  return copy;
}

/** Every question once: each prompt has its first before any has its second, so that stopping early is fair to prompts. */
function makeDeck(salt) {
  const random = randomFrom(salt);
  const byPrompt = prompts.map((_, prompt) => {
    const questions = [];
    for (const seed of seeds.keys()) {
      for (let a = 0; a < variants.length; a++) {
        for (let b = a + 1; b < variants.length; b++) {
          if (!picture(a, prompt, seed) || !picture(b, prompt, seed)) continue;
          const [left, right] = random() < 0.5 ? [a, b] : [b, a];
          questions.push({ prompt, seed, left, right, pair: `${a}-${b}`, key: `${prompt} ${seed} ${a} ${b}` });
        }
      }
    }
    return shuffled(questions, random);
  });
  const rounds = Math.max(0, ...byPrompt.map((questions) => questions.length));
  return Array.from({ length: rounds }, (_, round) =>
    shuffled(byPrompt.filter((questions) => questions.length > round).map((questions) => questions[round]), random),
  ).flat();
}

// votes are kept under the number of the pictures; where the browser keeps nothing, the page says so

function readVotes() {
  ballot.votes = [];
  try {
    const kept = readStore(STORE);
    ballot.salt = Number.isInteger(kept?.salt) ? kept.salt : 0;
    ballot.votes = kept ? votesOf(kept).map((vote) => ({ ...vote, pictures: shownTo(vote) })) : earlierVotes();
  } catch {
    ballot.kept = false;
  }
  ballot.salt ||= 1 + Math.floor(Math.random() * (2 ** 31 - 1));
  if (ballot.votes.length) keepVotes();
}

const readStore = (name) => JSON.parse(localStorage.getItem(name) || "null");
const votesOf = (kept) => (Array.isArray(kept?.votes) ? kept.votes.filter(keyOf) : []);

/** What was voted on pages of which some pictures are here too, taken from there: a seed or a variant that is added costs no vote. */
function earlierVotes() {
  const found = new Map();
  for (const name of Object.keys(localStorage).filter((key) => key.startsWith(STORES))) {
    try {
      const kept = readStore(name);
      const own = votesOf(kept).filter((vote) => vote.pictures);
      own.forEach((vote) => found.set(keyOf(vote), vote));
      if (own.length) localStorage.setItem(name, JSON.stringify({ ...kept, votes: kept.votes.filter((vote) => !own.includes(vote)) }));
    } catch {
      continue; // not written by such a page
    }
  }
  return [...found.values()];
}

function keepVotes() {
  try {
    localStorage.setItem(STORE, JSON.stringify({ salt: ballot.salt, votes: ballot.votes }));
  } catch {
    ballot.kept = false;
  }
}

const promptNumbers = new Map(prompts.map((prompt, index) => [prompt.id, index]));
const variantNumbers = new Map(variants.map((variant, index) => [variant.name, index]));

/** The SHA-256 of the two pictures of a vote, as they are on this page. */
const shownTo = (vote) =>
  [vote.left, vote.right].map((name) => picture(variantNumbers.get(name), promptNumbers.get(vote.prompt), seeds.indexOf(vote.seed))?.sha256);

/** Which question a vote answers; "" where it answers none of this page, or one about other pictures. */
function keyOf(vote) {
  const prompt = promptNumbers.get(vote?.prompt);
  const seed = seeds.indexOf(vote?.seed);
  const sides = [variantNumbers.get(vote?.left), variantNumbers.get(vote?.right)].sort((a, b) => a - b);
  const known = prompt !== undefined && seed >= 0 && sides.every((side) => side !== undefined) && sides[0] !== sides[1];
  if (known && vote.pictures && String(vote.pictures) !== String(shownTo(vote))) return "";
  return known && ["left", "right", "tie"].includes(vote.winner) ? `${prompt} ${seed} ${sides.join(" ")}` : "";
}

// the section

// whoever pressed the tab with a pointer votes with the arrow keys; by keys alone they go on to the next tab
byId("tab-blind").addEventListener("click", (event) => event.detail && event.currentTarget.blur());

section("blind", () => {
  const content = part("blind", "content");
  readVotes();
  const deck = makeDeck(ballot.salt);
  if (!deck.length) {
    content.append(el("p", { class: "quiet" }, "No two variants have a picture of the same prompt and seed."));
    return undefined;
  }
  const parts = ballotParts(deck);
  content.append(...parts.all);
  document.addEventListener("keydown", (event) => ballotKey(event, parts));
  window.addEventListener("storage", (event) => {
    if (event.key !== STORE) return;
    readVotes();
    nextQuestion(parts);
  });
  nextQuestion(parts);
  return undefined;
});

function ballotParts(deck) {
  const parts = { deck };
  const button = (name, children, press, strong) => (parts[name] = el("button", { type: "button", class: strong ? "button strong" : "button", onclick: press }, ...children));
  const vote = (winner) => () => castVote(parts, winner);
  parts.progress = el("progress", { "aria-label": "Votes" });
  parts.count = el("p", { class: "count", role: "status" });
  parts.prompt = el("div");
  parts.pairs = el("div", { class: "pairs" });
  parts.choices = el(
    "div",
    { class: "choices", role: "group", "aria-label": "Your vote" },
    button("left", [el("kbd", {}, "←"), "Left"], vote("left")),
    button("tie", ["Tie ", el("kbd", {}, "T")], vote("tie")),
    button("right", ["Right", el("kbd", {}, "→")], vote("right")),
  );
  button("undo", ["Undo ", el("kbd", {}, "U")], () => undoVote(parts));
  button("save", ["Download votes.json"], saveVotes, true);
  button("reset", ["Delete all votes"], () => resetVotes(parts));
  button("stack", ["One above the other"], () => parts.stack.setAttribute("aria-pressed", parts.ballot.classList.toggle("stacked")));
  parts.stack.setAttribute("aria-pressed", "false");
  parts.tally = el("details", { class: "tally", ontoggle: () => drawTally(parts) }, el("summary", {}, "Names and votes so far"), el("div"));
  parts.ballot = el(
    "div",
    { class: "ballot" },
    parts.progress,
    parts.count,
    parts.prompt,
    parts.pairs,
    parts.choices,
    el("div", { class: "bar" }, parts.undo, parts.stack, parts.save, parts.reset, ...pairChoice(parts)),
    parts.tally,
  );
  const lead = "Two pictures of the same prompt and seed, without names and in random order. Which one is better, as a picture and as an answer to the words? Stop whenever you like; the votes stay in this browser until you download or delete them.";
  parts.all = [el("p", { class: "lead" }, lead), parts.ballot];
  return parts;
}

function pairChoice(parts) {
  if (variants.length < 3) return [];
  const pairs = distinct(parts.deck.map((question) => question.pair)).sort();
  const text = (pair) => pair.split("-").map((index) => variants[Number(index)].label).join(" and ");
  return [
    choice("Pairs", [["", "all, mixed"], ...pairs.map((pair) => [pair, text(pair)])], "", (value) => {
      ballot.pair = value;
      nextQuestion(parts);
    }),
  ];
}

const asked = (parts) => parts.deck.filter((question) => !ballot.pair || question.pair === ballot.pair);

function nextQuestion(parts) {
  const answered = new Set(ballot.votes.map(keyOf));
  const questions = asked(parts);
  const open = questions.filter((question) => !answered.has(question.key));
  const done = questions.length - open.length;
  ballot.current = open[0] || null;
  parts.progress.max = questions.length;
  parts.progress.value = done;
  const where = ballot.kept ? "" : " This browser keeps nothing for this page: download the votes before you close it.";
  parts.count.textContent = `${done} of ${plural(questions.length, "vote")}.${ballot.current ? "" : " All done, thank you."}${where}`;
  parts.undo.disabled = parts.save.disabled = parts.reset.disabled = !ballot.votes.length;
  drawTally(parts);
  drawQuestion(parts);
  // the next ones are there before they are asked for
  for (const question of open.slice(1, 3)) for (const side of ["left", "right"]) new Image().src = picture(question[side], question.prompt, question.seed).large;
}

function drawQuestion(parts) {
  const question = ballot.current;
  parts.choices.hidden = !question;
  parts.prompt.replaceChildren();
  parts.pairs.replaceChildren();
  setReady(parts, false);
  if (!question) return;
  parts.prompt.append(promptText(question.prompt));
  const pictures = ["left", "right"].map((side) => {
    const found = picture(question[side], question.prompt, question.seed);
    return image(found, { alt: `${side === "left" ? "Left" : "Right"} picture`, large: true, lazy: false });
  });
  parts.pairs.append(...pictures.map((shown) => el("figure", {}, shown)));
  // nobody votes on what is not there yet; a picture that cannot be shown must not stop the vote
  Promise.allSettled(pictures.map((shown) => shown.decode())).then(() => ballot.current === question && setReady(parts, true));
}

function setReady(parts, ready) {
  ballot.ready = ready;
  parts.pairs.classList.toggle("waiting", !ready);
  for (const name of ["left", "tie", "right"]) parts[name].setAttribute("aria-disabled", String(!ready));
}

function castVote(parts, winner) {
  const question = ballot.current;
  if (!question || !ballot.ready) return;
  ballot.votes.push({
    prompt: prompts[question.prompt].id,
    seed: seeds[question.seed],
    left: variants[question.left].name,
    right: variants[question.right].name,
    winner,
    pictures: [question.left, question.right].map((side) => picture(side, question.prompt, question.seed).sha256),
  });
  keepVotes();
  nextQuestion(parts);
}

function undoVote(parts) {
  const taken = ballot.votes.pop();
  if (!taken) return;
  keepVotes();
  // the question that was answered comes back, before all others
  const key = keyOf({ ...taken });
  const at = parts.deck.findIndex((question) => question.key === key);
  if (at > 0) parts.deck.unshift(...parts.deck.splice(at, 1));
  nextQuestion(parts);
}

function resetVotes(parts) {
  if (!window.confirm(`Delete ${plural(ballot.votes.length, "vote")}?`)) return;
  ballot.votes = [];
  keepVotes();
  nextQuestion(parts);
}

function saveVotes() {
  const file = { texforce_votes: 1, data: data.hash, votes: ballot.votes };
  const url = URL.createObjectURL(new Blob([`${JSON.stringify(file, null, 1)}\n`], { type: "application/json" }));
  const link = el("a", { href: url, download: "votes.json" });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function ballotKey(event, parts) {
  const typing = event.target instanceof Element && event.target.closest("input, select, textarea, [role=tablist]");
  if (shownSection() !== "blind" || dialog.open || typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const actions = {
    ArrowLeft: () => castVote(parts, "left"), ArrowRight: () => castVote(parts, "right"),
    t: () => castVote(parts, "tie"), T: () => castVote(parts, "tie"), u: () => undoVote(parts), U: () => undoVote(parts),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

/** What was voted, with names: only for who asks, as it ends the blindness. */
function drawTally(parts) {
  if (!parts.tally.open) return;
  const counts = new Map();
  for (const vote of ballot.votes) {
    const [left, right] = [variantNumbers.get(vote.left), variantNumbers.get(vote.right)];
    const [a, b] = left < right ? [left, right] : [right, left];
    const count = counts.get(`${a} ${b}`) || { a, b, wins: 0, ties: 0, losses: 0 };
    const winner = { left, right, tie: null }[vote.winner];
    count[winner === null ? "ties" : winner === a ? "wins" : "losses"] += 1;
    counts.set(`${a} ${b}`, count);
  }
  const head = el("thead", {}, el("tr", {}, ...["First", "First won", "Ties", "Second won", "Second"].map((name) => el("th", { scope: "col" }, name))));
  const rows = [...counts.values()].sort((x, y) => x.a - y.a || x.b - y.b).map(({ a, b, wins, ties, losses }) =>
    el("tr", {}, el("td", {}, named(variants[a].label)), ...[wins, ties, losses].map((count) => el("td", {}, String(count))), el("td", {}, named(variants[b].label))),
  );
  parts.tally.lastElementChild.replaceChildren(rows.length ? el("table", {}, head, el("tbody", {}, ...rows)) : el("p", { class: "quiet" }, "No votes yet."));
}
