// Pictures come in: dropped, pasted, chosen, photographed, by folder, or as an example.

import { $, h } from "./dom.js";

const PICTURE = /\.(jpe?g|png|webp|avif|hei[cf]|gif|tiff?|bmp)$/i;

/** Calls `take` with one or more files, in the order of their names. */
export function setUp(take) {
  const chosen = (files, always = false) => {
    const pictures = [...files].filter((file) => always || isPicture(file));
    if (pictures.length) take(pictures.sort(byName));
    else if (files.length) take([...files].slice(0, 1)); // the server says what is wrong with it
  };

  for (const [button, input] of [["pick", "files"], ["pick-folder", "folder"], ["photograph", "camera"]]) {
    $(button).addEventListener("click", () => $(input).click());
    $(input).addEventListener("change", (event) => {
      chosen(event.target.files, input === "camera");
      event.target.value = ""; // so that the same file can be chosen again
    });
  }
  $("photograph").hidden = !matchMedia("(pointer: coarse)").matches;

  for (const button of document.querySelectorAll("[data-example]")) {
    button.addEventListener("click", async () => {
      const name = button.dataset.example;
      const picture = await (await fetch(`page/examples/${name}`)).blob();
      take([new File([picture], name, { type: picture.type })]);
    });
  }

  document.addEventListener("paste", (event) => {
    const files = event.clipboardData?.files ?? [];
    if (!files.length) return;
    event.preventDefault();
    chosen(files);
  });

  let depth = 0; // of elements entered by what is dragged
  const shade = () => document.body.classList.toggle("dragging", depth > 0);
  document.addEventListener("dragenter", () => { depth++; shade(); });
  document.addEventListener("dragleave", () => { depth--; shade(); });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    depth = 0;
    shade();
    chosen(await dropped(event.dataTransfer));
  });
}

function isPicture(file) {
  return file.type.startsWith("image/") || PICTURE.test(file.name);
}

export const pathOf = (file) => file.path ?? (file.webkitRelativePath || file.name);

function byName(a, b) {
  return pathOf(a).localeCompare(pathOf(b), undefined, { numeric: true });
}

/** The files of a drop, those in folders too. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  const files = [];
  for (const entry of entries) await gather(entry, files);
  return files;
}

async function gather(entry, files) {
  if (entry.isFile) {
    const file = await new Promise((found, failed) => entry.file(found, failed));
    file.path = entry.fullPath.replace(/^\//, "");
    files.push(file);
    return;
  }
  const reader = entry.createReader();
  for (;;) { // it gives at most a hundred at a time
    const some = await new Promise((found, failed) => reader.readEntries(found, failed));
    if (!some.length) return;
    for (const inner of some) await gather(inner, files);
  }
}

export function dataUrl(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

/** Shows a picture; says so where the browser cannot, as with HEIC: the server may know it. */
export function show(image, file) {
  const url = URL.createObjectURL(file);
  image.alt = file.name;
  image.onload = () => URL.revokeObjectURL(url);
  image.onerror = () => {
    URL.revokeObjectURL(url);
    image.replaceWith(h("div", { className: "no-preview", role: "img", "aria-label": file.name }, "no preview"));
  };
  image.src = url;
}
