// Elements, and how they are made. Text goes in as text: nothing here parses HTML.

export const $ = (id) => document.getElementById(id);

/** Makes an element: properties whose names begin with "on" are listeners, "data-" and "aria-" attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function button(text, onclick, properties = {}) {
  return h("button", { type: "button", onclick, ...properties }, text);
}

/** Says something to a screen reader. */
export function announce(text) {
  $("status").textContent = text;
}

export function save(name, blob) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000); // the browser has begun to read it by then
}

/** Copies text, and says so on the button. */
export async function copy(text, on) {
  const label = on.textContent;
  try {
    await navigator.clipboard.writeText(text);
    on.textContent = "Copied";
  } catch {
    on.textContent = "Not allowed here"; // without https, or by the browser's settings
  }
  announce(on.textContent);
  setTimeout(() => { on.textContent = label; }, 1500);
}
