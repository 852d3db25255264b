// What the stages are doing, while somebody looks.

import { get } from "./api.js";
import { $, h } from "./dom.js";

const EVERY_MS = 2000;
const UNITS = { preprocessor: "images/s", encoder: "images/s", generator: "answers/s" };

let timer = null;

export function watch(on) {
  clearTimeout(timer);
  if (on) update();
}

async function update() {
  try {
    const { stages, ready } = await get("v1/status");
    $("stage-rows").replaceChildren(...stages.map(row));
    $("stages-note").textContent = ready ? "" : "The server is not ready for requests.";
  } catch (error) {
    $("stages-note").textContent = error.message;
  }
  timer = setTimeout(document.hidden ? wait : update, EVERY_MS);
}

function wait() {
  timer = setTimeout(document.hidden ? wait : update, EVERY_MS);
}

function row({ name, replicas, waiting, rate_per_s, capacity_per_s }) {
  const unit = UNITS[name] ?? "";
  const rate = (value, what) => (value === null || value === undefined ? "" : `${value.toFixed(value < 10 ? 1 : 0)} ${what}`);
  return h("tr", {},
    h("th", { scope: "row" }, name),
    h("td", {}, ...dots(replicas)),
    h("td", {}, waiting === null ? "" : String(waiting)),
    h("td", {}, rate(rate_per_s, name === "generator" ? "tokens/s" : unit)),
    h("td", {}, rate(capacity_per_s, unit)));
}

function dots(replicas) {
  const list = Object.entries(replicas).flatMap(([state, count]) =>
    Array.from({ length: count }, () => h("span", { className: `dot ${state}`, role: "img", "aria-label": state, title: state })));
  return list.length ? list : ["none"];
}
