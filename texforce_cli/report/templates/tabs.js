// Sections as tabs, made when they are first looked at, and the explanations that appear beside things.

const makers = {};
const returns = {};

/** `make` fills a section when it is first shown; what it returns runs each time it is shown again. */
function section(id, make) {
  makers[id] = make;
}

const tabs = [...document.querySelectorAll("[role=tab]")];
const panelOf = (tab) => byId(tab.getAttribute("aria-controls"));
const shownSection = () => tabs.find((tab) => tab.getAttribute("aria-selected") === "true").getAttribute("aria-controls");

function show(id) {
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === id;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    panelOf(tab).hidden = !chosen;
    if (chosen) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  if (makers[id]) {
    const make = makers[id];
    delete makers[id];
    returns[id] = make();
  } else if (returns[id]) returns[id]();
}

function choose(tab) {
  const id = tab.getAttribute("aria-controls");
  const bar = document.querySelector(".tabs");
  show(id);
  // a section begins at its beginning, also when the one before was scrolled
  if (bar.getBoundingClientRect().top <= 0) window.scrollTo(0, bar.parentElement.querySelector(".top").offsetHeight);
  history.replaceState(null, "", `#${id}`);
}

function startTabs() {
  document.documentElement.classList.add("script");
  for (const tab of tabs) tab.addEventListener("click", () => choose(tab));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    const tab = tabs[(to + tabs.length) % tabs.length];
    tab.focus();
    choose(tab);
  });
  const asked = () => tabs.some((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
  window.addEventListener("hashchange", () => asked() && show(location.hash.slice(1)));
  show(asked() ? location.hash.slice(1) : "summary");
}

// explanations: on hover, on focus, on a tap; Escape sends them away

const tip = byId("tip");
let explained = null;

function explain(target) {
  explained = target;
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  target.setAttribute("aria-describedby", "tip");
  const box = target.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 8 : box.top - 8 - tip.offsetHeight}px`;
}

function startTips() {
  const away = () => (tip.hidden = true);
  const about = (event) => event.target instanceof Element && event.target.closest("[data-tip]");
  for (const name of ["pointerover", "focusin", "click"]) {
    document.addEventListener(name, (event) => (about(event) ? explain(about(event)) : name === "click" && away()));
  }
  document.addEventListener("pointerout", (event) => about(event) && away());
  document.addEventListener("focusout", away);
  // what has the focus is scrolled into view: its explanation goes along
  const follow = () => !tip.hidden && (explained === document.activeElement ? explain(explained) : away());
  document.addEventListener("scroll", follow, { capture: true, passive: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && away());
}
