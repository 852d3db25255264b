// Conversations are kept in this browser, and nowhere else.

import { $, button, h } from "./dom.js";

const MOST = 30;
const STORE = "sessions";

let opening = null;

function database() {
  opening ??= new Promise((done, failed) => {
    const request = indexedDB.open("blip2-serve", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
  return opening;
}

async function run(mode, act) {
  const transaction = (await database()).transaction(STORE, mode);
  const request = act(transaction.objectStore(STORE));
  return new Promise((done, failed) => {
    transaction.oncomplete = () => done(request.result);
    transaction.onerror = transaction.onabort = () => failed(transaction.error);
  });
}

export async function all() {
  const found = await run("readonly", (store) => store.getAll());
  return found.sort((a, b) => b.changed - a.changed);
}

/** Keeps a conversation, and forgets the oldest of too many. */
export async function keep(session) {
  try {
    await run("readwrite", (store) => store.put(session));
    for (const old of (await all()).slice(MOST)) await forget(old.id);
  } catch (error) { // a private window, or no room: it stays on the page
    console.debug("not kept:", error);
  }
}

export const forget = (id) => run("readwrite", (store) => store.delete(id));

/** Lists the conversations; `open` is called with the one that is chosen. */
export async function list(open) {
  const found = await all().catch(() => []);
  const items = found.map((session) => {
    const last = session.turns.at(-1);
    const title = `${session.name}: ${last?.question || last?.text || "…"}`;
    return h("li", {},
      button(title, () => open(session), { className: "link" }),
      button("Forget", async () => { await forget(session.id); list(open); }, { "aria-label": `Forget ${title}` }));
  });
  $("session-list").replaceChildren(...(items.length ? items : [h("li", {}, "Nothing yet.")]));
  $("sessions-clear").onclick = async () => { await run("readwrite", (store) => store.clear()); list(open); };
}
