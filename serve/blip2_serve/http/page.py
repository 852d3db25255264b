"""The page at `/`: files as they are, which use the public API like anybody else."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parents[1] / "page"
FILES = "/page"

# Everything comes from this server, and nothing that it sends can become a script.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


def add_page(app: FastAPI) -> None:
    """Adds `/`, and the files that it loads."""
    app.mount(FILES, StaticFiles(directory=FOLDER))
    app.get("/", include_in_schema=False)(page)


async def page() -> FileResponse:
    """The page for people; it asks for an API key itself, where one is needed."""
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return FileResponse(FOLDER / "index.html", headers=headers)
