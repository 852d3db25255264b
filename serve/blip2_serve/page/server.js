// What is served here, and what its authors say of its limits.

import { get } from "./api.js";
import { $ } from "./dom.js";

let name;

/** The model's name; undefined until the server has told it. */
export const model = () => name;

export async function introduce() {
  const { data: [card] } = await get("v1/models");
  name = card.id;
  $("model").textContent = name;
  for (const place of document.querySelectorAll(".limits")) place.textContent = card.limitations;
  $("demo-hint").hidden = name !== "demo";
}
