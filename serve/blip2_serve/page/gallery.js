// Many pictures: a caption for each, to be edited, filtered and saved.

import { caption, patiently } from "./api.js";
import { $, announce, button, h, save } from "./dom.js";
import { pathOf, show } from "./intake.js";
import { askForKey } from "./keys.js";
import { fields } from "./settings.js";
import { zip } from "./zip.js";

const AT_ONCE = 4;

let cards = [];
let running = null; // AbortController

class Card {
  constructor(file, open) {
    this.file = file;
    this.path = pathOf(file);
    this.state = "waiting";
    const image = h("img", { loading: "lazy", decoding: "async" });
    const picture = button("", () => open(file), { className: "thumb", "aria-label": `Ask about ${this.path}` });
    picture.append(image);
    show(image, file);
    this.text = h("textarea", { rows: 3, "aria-label": `Caption of ${this.path}`, placeholder: "…" });
    this.text.addEventListener("input", () => { if (this.text.value) this.set("done"); });
    this.notice = h("p", { className: "notice", hidden: true });
    this.element = h("li", { className: "card" }, picture, h("p", { className: "name", title: this.path }, this.path), this.text, this.notice);
    this.set("waiting");
  }

  set(state, message = "") {
    this.state = state;
    this.element.dataset.state = state;
    this.notice.hidden = !message;
    this.notice.replaceChildren(message);
    if (state === "failed") this.notice.append(" ", button("Again", () => { this.set("waiting"); work(); }, { className: "link" }));
    count();
  }

  get caption() { return this.text.value.trim(); }

  matches(words) {
    const text = `${this.path} ${this.text.value}`.toLowerCase();
    return words.every((word) => text.includes(word));
  }
}

/** Begins a gallery of these files; `ask` is called with one to talk about. */
export function begin(files, ask) {
  stop();
  cards = files.map((file) => new Card(file, ask));
  $("cards").replaceChildren(...cards.map((card) => card.element));
  $("filter").value = "";
  work();
}

export function stop() {
  running?.abort(new DOMException("stopped", "AbortError"));
  running = null;
}

export const isOpen = () => cards.length > 0;

export function close() {
  stop();
  cards = [];
  $("cards").replaceChildren();
}

export function setUp(closed) {
  $("gallery-stop").addEventListener("click", () => { running ? stop() : work(); count(); });
  $("gallery-close").addEventListener("click", () => { close(); closed(); });
  $("filter").addEventListener("input", filter);
  $("save-zip").addEventListener("click", () => save("captions.zip", zip(sidecars())));
  $("save-jsonl").addEventListener("click", () => save("captions.jsonl", jsonl()));
}

async function work() {
  const control = running ??= new AbortController();
  await Promise.all(Array.from({ length: AT_ONCE }, () => worker(control)));
  if (running === control) running = null;
  count();
  const failed = cards.filter((card) => card.state === "failed").length;
  if (!cards.some((card) => card.state === "waiting")) {
    announce(`${cards.length - failed} captions are there${failed ? `, ${failed} failed` : ""}.`);
  }
}

async function worker({ signal }) {
  for (;;) {
    const card = cards.find((other) => other.state === "waiting");
    if (!card || signal.aborted) return;
    await describe(card, signal);
  }
}

async function describe(card, signal) {
  card.set("working");
  try {
    const text = await patiently(
      () => caption(card.file, fields(), signal),
      (seconds) => card.set("working", seconds ? `The server is busy. Again in ${seconds} s …` : ""),
      signal);
    if (!card.caption) card.text.value = text; // else somebody has written one meanwhile
    card.set("done");
  } catch (error) {
    if (signal.aborted) card.set("waiting");
    else if (error.needsKey && await askForKey()) card.set("waiting");
    else card.set("failed", error.message);
  }
  filter();
}

function filter() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const card of cards) card.element.hidden = !card.matches(words);
}

function count() {
  const done = cards.filter((card) => card.state === "done").length;
  const failed = cards.filter((card) => card.state === "failed").length;
  $("progress").textContent = `${done} of ${cards.length}${failed ? `, ${failed} failed` : ""}`;
  $("gallery-stop").textContent = running ? "Stop" : "Go on";
  $("gallery-stop").hidden = !cards.some((card) => card.state === "waiting" || card.state === "working");
  $("save-zip").disabled = $("save-jsonl").disabled = !done;
}

const finished = () => cards.filter((card) => card.caption);

/** A text file beside each picture, as trainers of image models want them. */
function sidecars() {
  const taken = new Set();
  return finished().map((card) => {
    const stem = card.path.replace(/\.[^./]*$/, "");
    const name = taken.has(`${stem}.txt`) ? `${card.path}.txt` : `${stem}.txt`; // a.png and a.jpg
    taken.add(name);
    return [name, `${card.caption}\n`];
  });
}

function jsonl() {
  const lines = finished().map((card) => JSON.stringify({ file_name: card.path, text: card.caption }));
  return new Blob([lines.map((line) => `${line}\n`).join("")], { type: "application/jsonl" });
}
