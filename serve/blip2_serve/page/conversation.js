// A conversation about one picture.

import { chat, patiently } from "./api.js";
import { AnswerView, newTurn } from "./answer.js";
import { $, announce } from "./dom.js";
import { dataUrl, show } from "./intake.js";
import { askForKey } from "./keys.js";
import { keep } from "./sessions.js";
import { fields, searches } from "./settings.js";
import { model } from "./server.js";

const ALTERNATIVES = 5;

let session = null; // {id, name, file, turns, changed}
let url = ""; // of its picture, once that is read
let reading = null;
let views = [];
let running = null; // AbortController

export const isOpen = () => session !== null;

/** Begins a conversation: its first answer is a caption. */
export function begin(file) {
  open({ id: crypto.randomUUID?.() ?? String(Date.now()), name: file.name, file, turns: [], changed: 0 });
  ask("");
}

/** Opens one that may have turns already. */
export function open(kept) {
  stop();
  const mine = session = kept;
  const image = document.createElement("img");
  $("picture").querySelector("img, .no-preview").replaceWith(image);
  show(image, session.file);
  $("picture").querySelector("figcaption").textContent = session.name;
  views = [];
  $("thread").replaceChildren();
  for (const turn of session.turns) addView(turn);
  $("question").value = "";
  url = "";
  reading = dataUrl(session.file).then((read) => { if (session === mine) url = read; });
  reading.catch(() => {}); // who asks is told
}

export function close() {
  stop();
  session = null;
}

export function stop() {
  running?.abort(new DOMException("stopped", "AbortError"));
  running = null;
}

export function ask(question) {
  stop();
  const turn = newTurn(question);
  session.turns.push(turn);
  answer(addView(turn));
}

function addView(turn) {
  const at = session.turns.indexOf(turn);
  const view = new AnswerView(turn, {
    stop,
    again: () => { stop(); view.restart(); answer(view); },
    edit: (question) => {
      session.turns.length = at;
      views.splice(at).forEach((later) => later.element.remove());
      ask(question);
    },
    body: () => body(turn),
    pictureName: () => session.name,
    needKey: () => askForKey().then((given) => given && view.actions.again()),
  });
  views.push(view);
  $("thread").append(view.element);
  return view;
}

/** The request for a turn: questions and answers before it, as OpenAI's clients send them. */
function body(turn) {
  const image = { type: "image_url", image_url: { url } };
  const messages = [];
  if (turn.question) {
    for (const earlier of session.turns.slice(0, session.turns.indexOf(turn))) {
      if (!earlier.question || !earlier.text) continue;
      messages.push({ role: "user", content: earlier.question }, { role: "assistant", content: earlier.text });
    }
    messages.push({ role: "user", content: turn.question });
  } else {
    messages.push({ role: "user", content: "" });
  }
  const [first] = messages;
  first.content = [image, ...(first.content ? [{ type: "text", text: first.content }] : [])];
  return {
    model: model(),
    messages,
    ...fields(),
    logprobs: true,
    top_logprobs: ALTERNATIVES,
    stream_options: { include_timing: true, include_events: true, include_beams: searches() },
  };
}

async function answer(view) {
  const control = running = new AbortController();
  const mine = session;
  const { signal } = control;
  view.control = control; // whoever asks for this answer later is told what comes of it
  view.element.scrollIntoView({ block: "nearest" });
  try {
    await reading;
    await patiently(async () => {
      for await (const chunk of chat(body(view.turn), signal)) view.add(chunk);
    }, (seconds) => view.waiting(seconds), signal);
    view.finish();
    announce(`${view.turn.question ? "Answer" : "Caption"}: ${view.turn.text}`);
  } catch (error) {
    if (view.control !== control) return;
    if (signal.aborted) view.finish();
    else {
      view.fail(error);
      announce(error.message);
    }
  }
  if (running === control) running = null;
  mine.changed = Date.now();
  keep(mine);
}
