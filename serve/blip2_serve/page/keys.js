// The API key, for servers that ask for one.

import { key } from "./api.js";
import { $ } from "./dom.js";

let asking = null;

/** Asks for the key; whether one was given. */
export function askForKey(why = "This server answers to those who have a key.") {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-why").textContent = why;
    $("key").value = key.get();
    $("key-keep").checked = key.isKept();
    dialog.returnValue = "cancel"; // what Escape means
    dialog.addEventListener("close", () => {
      asking = null;
      const given = dialog.returnValue === "save";
      if (given) key.set($("key").value.trim(), $("key-keep").checked);
      resolve(given);
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
