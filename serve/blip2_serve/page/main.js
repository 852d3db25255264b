// The page: what is shown, and the keys and buttons that change it.

import { ApiError } from "./api.js";
import * as conversation from "./conversation.js";
import { $, announce } from "./dom.js";
import * as gallery from "./gallery.js";
import * as intake from "./intake.js";
import { askForKey } from "./keys.js";
import { introduce } from "./server.js";
import * as sessions from "./sessions.js";
import * as settings from "./settings.js";
import * as stages from "./stages.js";

function showOnly(section) {
  for (const id of ["start", "conversation", "gallery"]) $(id).hidden = id !== section;
}

function take(files) {
  gallery.close();
  if (files.length > 1) {
    conversation.close();
    showOnly("gallery");
    gallery.begin(files, askAbout);
  } else {
    askAbout(files[0]);
  }
}

function askAbout(file) {
  showConversation();
  conversation.begin(file);
  $("question").focus({ preventScroll: true });
}

function showConversation() {
  showOnly("conversation");
  $("another").textContent = gallery.isOpen() ? "Back to the gallery" : "Another picture";
}

function toggle(name, changed) {
  const button = $(`${name}-toggle`);
  button.addEventListener("click", () => {
    const open = $(name).hidden;
    $(name).hidden = !open;
    button.ariaExpanded = String(open);
    changed(open);
  });
}

function openKept(session) {
  showConversation();
  conversation.open(session);
}

function leaveConversation() {
  conversation.close();
  showOnly(gallery.isOpen() ? "gallery" : "start");
}

function composer() {
  const field = $("question");
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = field.value.trim();
    if (!question) return;
    field.value = "";
    conversation.ask(question);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("composer").requestSubmit();
  });
}

function shortcuts() {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("key-dialog").open) conversation.stop();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, textarea, select, dialog")) return;
    if (event.key === "/" && conversation.isOpen()) {
      event.preventDefault();
      $("question").focus();
    }
    if (event.key === "o") $("files").click();
  });
}

async function meet() {
  try {
    await introduce();
  } catch (error) {
    if (error instanceof ApiError && error.needsKey && await askForKey()) return meet();
    $("model").textContent = error.message;
    announce(error.message);
  }
}

settings.setUp();
intake.setUp(take);
gallery.setUp(() => showOnly("start"));
composer();
shortcuts();
toggle("sessions", (open) => open && sessions.list(openKept));
toggle("stages", stages.watch);
$("another").addEventListener("click", leaveConversation);
$("home").addEventListener("click", (event) => { event.preventDefault(); gallery.close(); leaveConversation(); });
$("key-open").addEventListener("click", async () => { if (await askForKey("The key for this server, if it asks for one.")) meet(); });
meet();
