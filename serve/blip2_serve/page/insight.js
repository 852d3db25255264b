// What an answer was made of: its words and what they might have been, its beams, its time.

import { h } from "./dom.js";

const SPANS = [
  ["admission_s", "request"],
  ["image_decode_s", "decode image"],
  ["image_encode_s", "encode image"],
  ["queue_s", "queue"],
  ["first_token_s", "first token"],
  ["tokens_s", "tokens"],
];

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return `${share >= 10 || share === 0 ? share.toFixed(0) : share.toPrecision(2)}%`;
};

const visible = (token) => token.replaceAll("\n", "↵").replaceAll(" ", "␣") || "∅";

/** The tokens of an answer as buttons; the one in focus shows what else there was. */
export function words(tokens) {
  const table = h("table", { className: "alternatives" });
  const buttons = tokens.map((token, index) => h("button", {
    type: "button",
    tabIndex: index ? -1 : 0,
    className: "token",
    "aria-label": `${visible(token.token)}, ${percent(token.logprob)}`,
    onclick: () => choose(index),
    onfocus: () => choose(index),
  }, visible(token.token)));
  tokens.forEach((token, index) => {
    buttons[index].style.setProperty("--sure", Math.exp(token.logprob).toFixed(3));
  });

  function choose(index) {
    buttons.forEach((other, at) => {
      other.tabIndex = at === index ? 0 : -1;
      other.classList.toggle("chosen", at === index);
    });
    const chosen = tokens[index];
    const listed = chosen.top_logprobs.some((other) => other.token === chosen.token)
      ? chosen.top_logprobs : [...chosen.top_logprobs, chosen];
    table.replaceChildren(...listed.map((other) => {
      const bar = h("meter", { min: 0, max: 1, value: Math.exp(other.logprob), "aria-label": "probability" });
      return h("tr", { className: other.token === chosen.token ? "chosen" : "" },
        h("th", { scope: "row" }, visible(other.token)), h("td", {}, bar), h("td", {}, percent(other.logprob)));
    }));
  }

  const row = h("div", { className: "tokens", role: "toolbar", "aria-label": "Tokens" }, ...buttons);
  row.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = buttons[buttons.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  choose(0);
  return h("div", {}, row, table);
}

/** The beams of a search, best first. */
export function beams(found) {
  const best = Math.max(...found.map((beam) => beam.score));
  return h("ol", { className: "beams" }, ...found.map((beam) => {
    const item = h("li", { className: beam.ended ? "ended" : "" },
      h("span", { className: "text" }, beam.text.trim() || "…"),
      h("span", { className: "score" }, `${beam.score.toFixed(2)}${beam.ended ? " ✓" : ""}`));
    item.style.setProperty("--share", Math.exp(beam.score - best).toFixed(3));
    return item;
  }));
}

/** Where the time went, as a waterfall. */
export function waterfall(timing) {
  const total = Object.values(timing).reduce((sum, seconds) => sum + seconds, 0) || 1;
  let before = 0;
  const rows = SPANS.map(([name, label]) => {
    const bar = h("div", { className: "span" });
    bar.style.marginLeft = `${100 * before / total}%`;
    bar.style.width = `${100 * timing[name] / total}%`;
    before += timing[name];
    return h("tr", {},
      h("th", { scope: "row" }, label),
      h("td", { className: "track" }, bar),
      h("td", { className: "number" }, `${(1000 * timing[name]).toFixed(timing[name] < 0.01 ? 1 : 0)} ms`));
  });
  return h("table", { className: "waterfall" },
    h("caption", {}, `${(1000 * total).toFixed(0)} ms in the server`), h("tbody", {}, ...rows));
}
