"use strict";
// Everything written by a model or a data set reaches the screen through text nodes alone.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const CARDS_AT_A_TIME = 12;
const LONG_CHARACTERS = 700;
const WORDS = {
  correct: "✓ correct", wrong: "✗ wrong", unparsable: "? unparsable", truncated: "✂ truncated",
  timed_out: "⏱ timed out", failed: "⚠ failed", ungraded: "– ungraded", disputed: "⇄ disputed",
};
// The depth of a colour at its strongest, and the number of nats that has it.
const DEEPEST = 0.72;
const LOG_PROB_NATS = 6, ENTROPY_NATS = 4, DIFFERENCE_NATS = 3, NEGLIGIBLE_NATS = 0.1;

// Elements and text

function element(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

// Controls, bidirectional marks, invisible spaces and lone surrogates; line ends and tabs may pass.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function codePoint(character) {
  return "U+" + character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
}

function addText(parent, text) {
  if (Array.isArray(text)) {
    const [head, numLeftOut, tail] = text;
    addText(parent, head);
    parent.append(element("span", "left-out", ` … ${numLeftOut.toLocaleString("en")} characters left out … `));
    return addText(parent, tail);
  }
  let done = 0;
  for (const match of text.matchAll(UNSEEN)) {
    parent.append(text.slice(done, match.index), element("span", "control", codePoint(match[0])));
    done = match.index + 1;
  }
  parent.append(text.slice(done));
  return parent;
}

// A true minus sign.
const signed = (value, decimals) => value.toFixed(decimals).replace("-", "−");
const textBox = (name, text) => addText(element("div", name), text);
const plain = (text) => (Array.isArray(text) ? text[0] + text[2] : text ?? "");

function visible(piece) {
  if (piece === "") return "(part of a character)";
  return piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣").replace(UNSEEN, codePoint);
}

// What is shown

const COLORS = {
  none: "none",
  ...(data.model && { "log-prob": "log-probability", entropy: "entropy" }),
  ...(data.against && { difference: "difference of two models" }),
};
const state = { kind: "all", task: "all", step: "all", order: "page", color: data.against ? "difference" : data.model ? "log-prob" : "none", search: "" };

const kindsOf = (sample) => [sample.status, ...(sample.truncated && sample.status !== "truncated" ? ["truncated"] : []), ...(sample.second ? ["disputed"] : [])];
const KINDS = ["all", ...Object.keys(WORDS).filter((kind) =>
  ["correct", "wrong", "disputed", "truncated", "unparsable"].includes(kind) || data.cards.some((card) => card.samples.some((one) => kindsOf(one).includes(kind))))];
const shareCorrect = (card) => (card.statuses.correct ?? 0) / card.m;

data.cards.forEach((card, place) => {
  card.place = place;
  card.words = [card.id, card.group, plain(card.prompt), plain(card.answer)].join("\n").toLowerCase();
  for (const sample of card.samples) sample.words = [plain(sample.text), plain(sample.extracted)].join("\n").toLowerCase();
});

let shown = [];
let numDrawn = 0;

// The address names the view, so that it can be sent to someone.
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(state)) {
    const control = byId(name);
    const allowed = name === "search" || (control ? [...control.options].some((one) => one.value === asked.get(name)) : KINDS.includes(asked.get(name)));
    if (asked.has(name) && allowed) state[name] = asked.get(name);
    if (control) control.value = state[name];
  }
}

function writeAddress() {
  history.replaceState(null, "", "#" + new URLSearchParams(state));
}

function select() {
  const words = state.search.toLowerCase();
  const counts = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
  shown = [];
  for (const card of data.cards) {
    if (state.task !== "all" && card.task !== state.task) continue;
    if (state.step !== "all" && String(card.step) !== state.step) continue;
    const found = card.words.includes(words) ? card.samples : card.samples.filter((one) => one.words.includes(words));
    for (const one of found) for (const kind of ["all", ...kindsOf(one)]) counts[kind] += one.indices.length;
    const samples = state.kind === "all" ? found : found.filter((one) => kindsOf(one).includes(state.kind));
    if (samples.length) shown.push({ card, samples });
  }
  if (state.order !== "page") {
    const sign = state.order === "hard" ? 1 : -1;
    shown.sort((a, b) => sign * (shareCorrect(a.card) - shareCorrect(b.card)) || a.card.place - b.card.place);
  }
  for (const button of byId("kinds").children) {
    button.setAttribute("aria-pressed", String(button.value === state.kind));
    button.lastChild.textContent = counts[button.value].toLocaleString("en");
  }
  const numSamples = shown.flatMap((one) => one.samples).reduce((sum, one) => sum + one.indices.length, 0);
  byId("shown").textContent = `${shown.length.toLocaleString("en")} questions, ${numSamples.toLocaleString("en")} responses`;
  draw(CARDS_AT_A_TIME);
}

function draw(numCards) {
  byId("cards").replaceChildren();
  numDrawn = 0;
  drawLegend();
  writeAddress();
  drawMore(numCards);
}

function drawMore(numCards = CARDS_AT_A_TIME) {
  const next = shown.slice(numDrawn, numDrawn + numCards);
  byId("cards").append(...next.map((one, i) => drawCard(one.card, one.samples, numDrawn + i)));
  numDrawn += next.length;
  byId("end").textContent = numDrawn < shown.length ? "…" : shown.length ? "That is all." : "Nothing matches these filters.";
  // asked anew, because the end may have stayed in sight
  nearEnd.unobserve(byId("end"));
  nearEnd.observe(byId("end"));
}

const nearEnd = new IntersectionObserver(
  (entries) => entries.some((one) => one.isIntersecting) && numDrawn < shown.length && drawMore(),
  { rootMargin: "1500px" },
);

// The same questions in another colour, where the reader is.
function recolor() {
  const at = [...byId("cards").children].indexOf(document.activeElement.closest?.(".card"));
  const top = scrollY;
  draw(numDrawn);
  byId("cards").children[at]?.focus({ preventScroll: true });
  scrollTo(0, top);
}

// A question

function drawCard(card, samples, place) {
  const article = element("article", "card");
  article.tabIndex = -1;
  article.setAttribute("aria-label", `Question ${place + 1}`);
  const tally = element("span", "tally", `${card.statuses.correct ?? 0} of ${card.m} correct`, drawShare(card));
  const header = element("header", "", element("strong", "", `${place + 1}`), addText(element("span"), card.task));
  if (card.step !== null && state.step === "all") header.append(element("span", "soft", `step ${card.step}`));
  if (card.group) header.append(addText(element("span", "soft"), card.group));
  header.append(addText(element("span", "soft mono"), card.id), tally);
  article.append(header, drawQuestion(card), drawFacts(card));
  const list = element("ol", "samples", ...samples.map((one) => drawSample(one)));
  article.append(list);
  return article;
}

function drawShare(card) {
  const bar = element("span", "share");
  const order = ["correct", "wrong", "truncated"];
  const names = Object.keys(card.statuses).sort((a, b) => (order.indexOf(a) + 9) % 9 - (order.indexOf(b) + 9) % 9);
  for (const name of names) {
    const part = element("i", name);
    part.style.width = `${(100 * card.statuses[name]) / card.m}%`;
    bar.append(part);
  }
  bar.title = names.map((name) => `${name.replace("_", " ")} ${card.statuses[name]}`).join(", ");
  return bar;
}

function drawQuestion(card) {
  const box = element("div", "question");
  if (card.prompt === null) {
    box.append(element("span", "soft", "The question was not kept with these samples; its id is all there is."));
    return box;
  }
  if (card.prefix !== undefined) {
    const prefix = data.prefixes[card.prefix];
    const length = Array.isArray(prefix) ? prefix[0].length + prefix[1] + prefix[2].length : prefix.length;
    const fold = element("details", "", element("summary", "", `${length.toLocaleString("en")} characters before it that all these prompts share`));
    fold.addEventListener("toggle", () => fold.children.length > 1 || fold.append(textBox("text mono shared", prefix)));
    box.append(fold);
  }
  // of a long prompt the end stays in sight: the question comes after instructions and worked examples
  box.append(...foldLong(element("div", "from-end", textBox("text mono", card.prompt)), plain(card.prompt)));
  return box;
}

function drawFacts(card) {
  const facts = element("div", "facts");
  if (card.answer !== null) facts.append(element("span", "soft", "Gold answer"), " ", addText(element("strong", "mono vote"), card.answer));
  if (card.votes.length) facts.append(element("span", "soft", " Vote "));
  const most = card.votes.length ? card.votes[0][2] : 0;
  for (const [answer, status, count] of card.votes) {
    const chip = element("span", `vote ${status}${count === most && most > 1 ? " first" : ""}`);
    chip.append((WORDS[status] ?? status).slice(0, 2));
    addText(chip, answer);
    chip.append(` ×${count}`);
    chip.title = visible(plain(answer));
    facts.append(chip);
  }
  const numOther = card.num_answers - card.votes.length;
  if (numOther > 0) facts.append(element("span", "soft", `and ${numOther} other${numOther > 1 ? "s" : ""}`));
  return facts;
}

// Opens and closes a long text; a short one stays as it is.
function foldLong(box, text) {
  if (text.length <= LONG_CHARACTERS && text.split("\n").length <= 10) return [box];
  box.classList.add("closed");
  const button = element("button", "link opener", "show all");
  button.addEventListener("click", () => {
    button.textContent = box.classList.toggle("closed") ? "show all" : "show less";
  });
  return [box, button];
}

// A response

function drawSample(sample) {
  const item = element("li");
  item.sample = sample;
  const meta = element("div", "meta", element("span", `badge ${sample.status}`, WORDS[sample.status] ?? sample.status), drawIndices(sample.indices));
  if (sample.extracted !== undefined) meta.append(element("span", "", "answer ", addText(element("span", "value mono"), sample.extracted)));
  if (sample.second) meta.append(element("span", "disputed", `${WORDS.disputed}: a second grader says ${sample.second.replace("_", " ")}`));
  if (sample.truncated && sample.status !== "truncated") meta.append(element("span", "truncated", "✂ cut at the limit"));
  meta.append(element("span", "", `${sample.num_tokens.toLocaleString("en")} tokens`), element("span", "", `log p ${signed(sample.log_prob, 1)}`));
  const colored = state.color !== "none" && sample.tokens;
  if (state.color !== "none" && !sample.tokens) {
    const without = element("span", "", "(not coloured)");
    without.title = "Only the first questions and responses are: see “What is shown” above.";
    meta.append(without);
  }
  const box = colored ? drawTokens(sample) : textBox("text mono", sample.text);
  item.append(meta, ...foldLong(box, plain(sample.text)));
  return item;
}

// Equal responses are drawn once.
function drawIndices(indices) {
  const few = indices.slice(0, 5).join(", ") + (indices.length > 5 ? ", …" : "");
  const words = element("span", "", indices.length > 1 ? `samples ${few} ` : `sample ${few}`);
  if (indices.length > 1) words.append(element("strong", "", `×${indices.length}`));
  words.title = indices.join(", ");
  return words;
}

function depthOf(tokens, i) {
  if (state.color === "entropy") return ["entropy", tokens.entropy[i] / ENTROPY_NATS];
  if (state.color === "log-prob") return ["log-prob", -tokens.log_prob[i] / LOG_PROB_NATS];
  const difference = tokens.log_prob[i] - tokens.other[i];
  const depth = Math.abs(difference) < NEGLIGIBLE_NATS ? 0 : Math.abs(difference) / DIFFERENCE_NATS;
  return [difference > 0 ? "more" : "less", depth];
}

function drawTokens(sample) {
  const { tokens } = sample;
  const box = element("div", "text mono");
  tokens.pieces.forEach((piece, i) => {
    const [name, depth] = depthOf(tokens, i);
    const span = element("span", `token ${name}`);
    span.style.setProperty("--depth", (DEEPEST * Math.min(1, Math.max(0, depth))).toFixed(3));
    span.place = i;
    for (const [j, line] of piece.split("\n").entries()) {
      if (j) span.append(element("span", "faint", "⏎"), "\n");
      addText(span, line);
    }
    if (piece === "") span.append(element("span", "faint", "·"));
    box.append(span);
  });
  const numMore = sample.num_tokens - tokens.pieces.length;
  if (numMore > 0) box.append(element("span", "left-out", ` … ${numMore.toLocaleString("en")} more tokens, which are not coloured: choose colour “none” to read on`));
  return box;
}

function drawLegend() {
  const legend = byId("legend");
  legend.hidden = state.color === "none";
  const ramp = element("span", "ramp");
  const hue = (name, depth) => `rgb(var(--${name}) / ${depth})`;
  const words = {
    difference: [`blue: more probable under ${data.against}`, `−${DIFFERENCE_NATS} nats`, ramp, `+${DIFFERENCE_NATS} nats`, `red: more probable under ${data.model}`, `(no colour: less than ${NEGLIGIBLE_NATS} apart)`],
    "log-prob": ["p = 100%", ramp, `p ≤ ${(100 * Math.exp(-LOG_PROB_NATS)).toPrecision(2)}%`, `darker: a token that surprises ${data.model}`],
    entropy: ["0 nats", ramp, `${ENTROPY_NATS} nats or more`, `darker: a token where ${data.model} has an open choice`],
  }[state.color] ?? [];
  ramp.style.background = state.color === "difference"
    ? `linear-gradient(90deg, ${hue("less", DEEPEST)}, transparent 48%, transparent 52%, ${hue("more", DEEPEST)})`
    : `linear-gradient(90deg, transparent, ${hue(state.color, DEEPEST)})`;
  legend.replaceChildren(...words.map((one) => (one === ramp ? ramp : element("span", "", one))), element("span", "", "Point at a token for its numbers."));
}

// Numbers of a token

function showTip(event) {
  const token = event.target.closest?.(".token");
  const tip = byId("tip");
  tip.hidden = !token;
  if (!token) return;
  const { tokens } = token.closest("li").sample;
  const i = token.place;
  const rows = [
    ["log-probability", `${signed(tokens.log_prob[i], 3)} nats`],
    ["probability", (100 * Math.exp(tokens.log_prob[i])).toPrecision(3) + "%"],
    ["entropy", `${tokens.entropy[i].toFixed(3)} nats`],
  ];
  if (tokens.other) {
    const difference = tokens.log_prob[i] - tokens.other[i];
    rows.push(["log-probability, other model", `${signed(tokens.other[i], 3)} nats`], ["difference", `${difference > 0 ? "+" : ""}${signed(difference, 3)} nats`]);
  }
  const list = element("dl", "", ...rows.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
  tip.replaceChildren(element("strong", "mono", visible(tokens.pieces[i])), element("span", "soft", ` token ${tokens.ids[i]}`), list);
  const place = token.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const below = place.bottom + 6;
  tip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - size.width - 4))}px`;
  tip.style.top = `${below + size.height < innerHeight ? below : place.top - size.height - 6}px`;
}

// Controls and keys

function options(select, entries) {
  select.append(...entries.map(([value, label]) => Object.assign(element("option", "", label), { value })));
}

function listen(name, event, react) {
  const control = byId(name);
  control.addEventListener(event, () => {
    state[name] = control.value;
    react();
  });
}

function moveTo(change) {
  const cards = byId("cards").children;
  const at = [...cards].indexOf(document.activeElement.closest?.(".card"));
  const next = at < 0 ? [...cards].findIndex((card) => card.getBoundingClientRect().bottom > document.querySelector(".bar").offsetHeight) : at + change;
  if (next >= cards.length) drawMore();
  const card = cards[Math.max(0, next)];
  if (!card) return;
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "start" });
}

function openAll() {
  const openers = [...(document.activeElement.closest?.(".card")?.querySelectorAll(".opener") ?? [])];
  const closed = openers.filter((button) => button.previousSibling.classList.contains("closed"));
  for (const button of closed.length ? closed : openers) button.click();
}

function cycleColor() {
  const names = Object.keys(COLORS);
  state.color = byId("color").value = names[(names.indexOf(state.color) + 1) % names.length];
  recolor();
}

const KEYS = { j: () => moveTo(1), k: () => moveTo(-1), o: openAll, c: cycleColor, "/": () => byId("search").focus() };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") document.activeElement.blur();
  if (/^(INPUT|SELECT)$/.test(document.activeElement.tagName) || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

const tasks = [...new Set(data.cards.map((card) => card.task))];
const steps = [...new Set(data.cards.map((card) => String(card.step)))];
options(byId("task"), [["all", "all"], ...tasks.map((task) => [task, task])]);
options(byId("step"), [["all", "all"], ...steps.map((step) => [step, step === "null" ? "none" : step])]);
options(byId("color"), Object.entries(COLORS));
if (steps.length) state.step = steps[0];
for (const [id, few] of [["task", tasks.length < 2], ["step", steps.length < 2], ["color", !data.model]]) byId(id).parentElement.hidden = few;
for (const kind of KINDS) {
  const button = element("button", "", `${WORDS[kind] ?? "all"} `, element("span", "count"));
  button.value = kind;
  button.addEventListener("click", () => {
    state.kind = kind;
    select();
  });
  byId("kinds").append(button);
}
for (const name of ["task", "step", "order"]) listen(name, "change", select);
listen("color", "change", recolor);
listen("search", "input", select);
document.addEventListener("pointerover", showTip);
readAddress();
new ResizeObserver(([bar]) => document.documentElement.style.setProperty("--bar", `${bar.target.offsetHeight + 8}px`)).observe(document.querySelector(".bar"));
select();
