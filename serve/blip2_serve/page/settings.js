// How to answer: the controls, what they were last time, and the fields of a request.

import { $, h } from "./dom.js";

const STORE = "blip2-serve.settings";
const ALL = ["greedy", "beams", "sampling"];

const METHODS = [
  ["greedy", "Greedy", "always the likeliest word"],
  ["beams", "Beam search", "the likeliest of several sentences"],
  ["sampling", "Sampling", "another answer each time"],
];

// LAVIS is BLIP-2's reference code; the server knows these as presets, with prompts of their own.
const PRESETS = {
  "": ["None", {}],
  caption: ["Caption, as in LAVIS", { method: "beams", num_beams: 5, min_tokens: 8, max_tokens: 30, length_penalty: 1 }],
  vqa: ["Short answers, as in LAVIS", { method: "beams", num_beams: 5, min_tokens: 1, max_tokens: 10, length_penalty: 0 }],
};

const SLIDERS = [
  { name: "num_beams", label: "Beams", methods: ["beams"], min: 2, max: 8, step: 1, usual: 5 },
  { name: "length_penalty", label: "Length penalty", methods: ["beams"], min: -2, max: 3, step: 0.1, usual: 1 },
  { name: "temperature", label: "Temperature", methods: ["sampling"], min: 0.05, max: 2, step: 0.05, usual: 1 },
  { name: "top_p", label: "Top p", methods: ["sampling"], min: 0.05, max: 1, step: 0.05, usual: 1 },
  { name: "top_k", label: "Top k (0: all)", methods: ["sampling"], min: 0, max: 100, step: 1, usual: 0 },
  { name: "max_tokens", label: "At most, tokens", methods: ALL, min: 1, max: 200, step: 1, usual: 64 },
  { name: "min_tokens", label: "At least, tokens", methods: ALL, min: 0, max: 50, step: 1, usual: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", methods: ALL, min: 0.5, max: 2, step: 0.05, usual: 1 },
];

const usual = () => ({ method: "greedy", preset: "", ...Object.fromEntries(SLIDERS.map((s) => [s.name, s.usual])) });

let values = usual();

export function setUp() {
  try {
    values = { ...values, ...JSON.parse(localStorage.getItem(STORE) ?? "{}") };
  } catch { /* of another version */ }
  draw();
}

/** The fields of a request. */
export function fields() {
  const { method, preset } = values;
  const sent = preset ? { preset } : {};
  for (const slider of SLIDERS) {
    const applies = slider.methods.includes(method);
    if (applies && (preset || values[slider.name] !== slider.usual || slider.methods !== ALL)) {
      sent[slider.name] = values[slider.name];
    }
  }
  if (sent.min_tokens) sent.min_tokens = Math.min(sent.min_tokens, values.max_tokens);
  if (preset && method !== "beams") sent.num_beams = 1; // instead of the preset's
  return sent;
}

export const searches = () => values.method === "beams";

function change(changed) {
  values = { ...values, ...changed };
  localStorage.setItem(STORE, JSON.stringify(values));
  draw();
}

function draw() {
  const focused = document.activeElement?.id;
  $("settings-form").replaceChildren(presets(), methods(), ...sliders(), reset());
  if (focused) $(focused)?.focus();
  const [name] = PRESETS[values.preset] ?? PRESETS[""];
  const method = METHODS.find(([id]) => id === values.method)[1];
  $("settings-summary").textContent = values.preset ? `${method} · ${name}` : method;
}

function presets() {
  const options = Object.entries(PRESETS).map(([id, [name]]) =>
    h("option", { value: id, selected: id === values.preset }, name));
  const onchange = (event) => {
    const preset = event.target.value;
    change({ ...usual(), ...PRESETS[preset][1], preset });
  };
  return h("label", {}, "Preset ", h("select", { id: "set-preset", onchange }, ...options));
}

function methods() {
  const radios = METHODS.map(([id, name, hint]) =>
    h("label", { className: "check", title: hint },
      h("input", {
        type: "radio", name: "method", id: `set-${id}`, value: id, checked: id === values.method,
        onchange: () => change({ method: id }),
      }), ` ${name}`));
  return h("fieldset", {}, h("legend", {}, "Method"), ...radios);
}

function sliders() {
  return SLIDERS.filter((slider) => slider.methods.includes(values.method)).map((slider) => {
    const shown = h("span", { className: "value", "aria-hidden": "true" }, String(values[slider.name]));
    const input = h("input", {
      type: "range", id: `set-${slider.name}`, min: slider.min, max: slider.max, step: slider.step,
      oninput: () => { shown.textContent = input.value; },
      onchange: () => change({ [slider.name]: Number(input.value) }),
    });
    input.value = values[slider.name]; // after its limits
    return h("label", { className: "slider" }, `${slider.label} `, input, shown);
  });
}

function reset() {
  return h("button", { type: "button", className: "link", onclick: () => change(usual()) }, "Back to defaults");
}
