"""Measures how soon the page shows first words about a picture that is dropped on it.

    python -m loadtest.bench.first_words --pictures 30

Starts a server with the shipped checkpoint, opens its page in Chromium and drops new pictures, one
after the other, each once the answer to the one before is whole. By the browser's clock, from the
drop to the frame that shows the first words. Prints a table and writes first_words.json. Needs
Playwright, and Chromium as `chromium`.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from blip2_serve.demo import scenes
from loadtest.bench import script, servers
from loadtest.results import machine, markdown_table, write_json

WARM_UP = 3  # pictures
FIRST_SCENE = 7_000

# Drops a picture; returns the seconds until words are shown, and the whole answer.
DROP = """async (encoded) => {
  const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "scene.png", { type: "image/png" }));
  const before = document.querySelector(".turn");
  const shown = (found) => new Promise((done) => {
    const look = () => { const value = found(); if (value) { watch.disconnect(); done(value); } };
    const watch = new MutationObserver(look);
    watch.observe(document.body, { childList: true, subtree: true, characterData: true });
    look();
  });
  const turn = () => { const now = document.querySelector(".turn"); return now !== before && now; };
  const start = performance.now();
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
  await shown(() => turn() && turn().querySelector(".answer").textContent);
  await new Promise(requestAnimationFrame);
  const seconds = (performance.now() - start) / 1000;
  await shown(() => turn().ariaBusy === "false");
  const answer = turn().querySelector(".answer").textContent;
  return { seconds, answer };
}"""


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    port = servers.free_port()
    command = servers.command("blip2-serve", Path("demo"), port)
    with (
        script.one_line_failures(),
        servers.started(command, port, args.output / "server.log") as endpoint,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.goto(endpoint.url.removesuffix("v1"))
        measured = drops(page, range(FIRST_SCENE, FIRST_SCENE + WARM_UP + args.pictures))[WARM_UP:]
        browser.close()
    seconds = sorted(drop["seconds"] for drop in measured)
    figures = {
        "pictures": len(seconds),
        "p50_s": statistics.median(seconds),
        "p90_s": seconds[int(0.9 * len(seconds))],
        "max_s": seconds[-1],
        "right": sum(drop["right"] for drop in measured),
    }
    print(markdown_table([*figures], [[f"{value:.3g}" for value in figures.values()]]))
    write_json(args.output / "first_words.json", {"machine": machine(), **figures, "all": seconds})


def drops(page: Page, seeds: Sequence[int]) -> list[Any]:
    """Drops a scene for each seed; `right` says whether its caption is the scene's."""
    found = []
    for seed in seeds:
        scene, file = scenes.sample(seed), io.BytesIO()
        scene.image.save(file, "PNG")
        drop = page.evaluate(DROP, base64.b64encode(file.getvalue()).decode())
        found.append({**drop, "right": drop["answer"] == scene.caption})
    return found


def arguments() -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--pictures", type=int, default=30, help="to measure")
    parser.add_argument("--output", type=Path, default=Path("results/first_words"), help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
