// One turn of a conversation: a question, its answer as it comes, and what can be done with both.

import { button, copy, h } from "./dom.js";
import * as insight from "./insight.js";
import { asCurl, asPython } from "./snippets.js";

/** A turn's data is plain, so that the browser can keep it. */
export function newTurn(question) {
  return { question, text: "", tokens: [], beams: [], timing: null, replaced: [], ended: false, error: null };
}

export class AnswerView {
  /** `actions` has what the buttons call: again, edit, stop, body, needKey. */
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.text = h("p", { className: "answer" });
    this.notice = h("p", { className: "notice", hidden: true });
    this.live = h("div", { className: "live", "aria-hidden": "true" }); // beams while they change
    this.bar = h("div", { className: "bar" });
    this.more = h("div", { className: "more" });
    const question = turn.question
      ? h("p", { className: "question" }, turn.question)
      : h("p", { className: "question caption" }, "Caption");
    this.question = question;
    this.element = h("li", { className: "turn" }, question, this.text, this.notice, this.live, this.bar, this.more);
    this.draw();
  }

  /** Empties the answer, before it is asked for again. */
  restart() {
    Object.assign(this.turn, newTurn(this.turn.question));
    this.draw();
  }

  /** Takes a chunk of the stream. */
  add(chunk) {
    const { turn } = this;
    if (chunk.event?.type === "replica_replaced") turn.replaced.push(turn.text.length);
    if (chunk.beams) turn.beams = chunk.beams;
    if (chunk.timing) turn.timing = chunk.timing;
    for (const choice of chunk.choices) {
      turn.text += choice.delta.content ?? "";
      turn.tokens.push(...(choice.logprobs?.content ?? []));
    }
    this.drawText();
    this.live.replaceChildren(...(turn.beams.length ? [insight.beams(turn.beams)] : []));
  }

  waiting(seconds) {
    this.tell(seconds ? `The server is busy. Trying again in ${seconds} s …` : "");
  }

  finish() {
    this.turn.ended = true;
    this.draw();
  }

  fail(error) {
    this.turn.ended = true;
    this.turn.error = error.message;
    this.draw();
    if (error.needsKey) this.notice.append(" ", button("Enter the key", this.actions.needKey));
  }

  tell(text) {
    this.notice.hidden = !text;
    this.notice.replaceChildren(text);
  }

  draw() {
    const { turn } = this;
    this.drawText();
    this.tell(turn.error ?? "");
    this.live.replaceChildren();
    this.bar.replaceChildren(...(turn.ended ? this.endedButtons() : [button("Stop", this.actions.stop, { className: "stop" })]));
    this.more.replaceChildren(...(turn.ended ? this.insights() : []));
    this.element.ariaBusy = String(!turn.ended);
  }

  drawText() {
    const { text, replaced, ended } = this.turn;
    const pieces = [];
    let from = 0;
    for (const at of replaced) {
      pieces.push(text.slice(from, at), h("span", {
        className: "replaced", role: "img", title: "A replica was lost here; another one went on.",
        "aria-label": "a replica was replaced here",
      }, "⟲"));
      from = at;
    }
    pieces.push(text.slice(from));
    if (!ended) pieces.push(h("span", { className: "cursor" }));
    this.text.replaceChildren(...pieces);
  }

  endedButtons() {
    const { turn, actions } = this;
    const onCopy = (make) => (event) => copy(make(), event.currentTarget);
    return [
      button("Copy", onCopy(() => turn.text)),
      button("Regenerate", actions.again),
      turn.question ? button("Edit", () => this.edit()) : null,
      button("Copy as curl", onCopy(() => asCurl(actions.body(), actions.pictureName()))),
      button("Copy as Python", onCopy(() => asPython(actions.body(), actions.pictureName()))),
    ].filter(Boolean);
  }

  edit() {
    const field = h("textarea", { rows: 2, value: this.turn.question, "aria-label": "Question" });
    const done = () => form.replaceWith(this.question);
    const form = h("form", {
      className: "edit",
      onsubmit: (event) => {
        event.preventDefault();
        done();
        if (field.value.trim()) this.actions.edit(field.value.trim());
      },
    }, field, h("button", { type: "submit", className: "main" }, "Ask again"), button("Cancel", done));
    this.question.replaceWith(form);
    field.focus();
  }

  insights() {
    const { tokens, beams, timing } = this.turn;
    return [
      tokens.length ? fold("Words", insight.words(tokens)) : null,
      beams.length ? fold("Beams", insight.beams(beams)) : null,
      timing ? fold("Time", insight.waterfall(timing)) : null,
    ].filter(Boolean);
  }
}

function fold(title, content) {
  return h("details", {}, h("summary", {}, title), content);
}
