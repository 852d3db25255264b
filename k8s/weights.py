"""A checkpoint's files from the hub, each with the checksum that was pinned.

    python k8s/weights.py pin MODEL      prints the lines for settings.yaml
    python weights.py fetch              in a pod: into FOLDER/REVISION, unless it is there
    python weights.py wait               in a pod: until somebody else has fetched it

In a pod the environment says what to fetch: MODEL, REVISION and SHA256, lines as sha256sum writes
them. A folder REVISION exists only with all its files, each of them checked. This script knows
nothing of Ray or of the model; the image has it as /opt/blip2/weights.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

FOLDER = Path("/weights")
WEIGHTS = (".safetensors", ".bin")
WAIT_S = 5.0

# (model, file, revision, folder to put it into)
Download = Callable[[str, str, str, Path], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetches and checks a checkpoint's files.")
    commands = parser.add_subparsers(dest="command", required=True)
    pin_command = commands.add_parser("pin", help="print the lines for settings.yaml")
    pin_command.add_argument("model", help="such as Salesforce/blip2-opt-2.7b-coco")
    pin_command.add_argument("--revision", default="main", help="branch, tag or commit")
    fetch_command = commands.add_parser("fetch", help="fetch what the environment names")
    fetch_command.add_argument(
        "--without-weights", action="store_true", help="only the small files, for preprocessors"
    )
    commands.add_parser("wait", help="wait until what the environment names is there")
    arguments = parser.parse_args()
    if arguments.command == "pin":
        pin(arguments.model, arguments.revision)
        return
    revision = os.environ["REVISION"]
    if arguments.command == "wait":
        wait(FOLDER / revision)
        return
    sums = read_sums(os.environ["SHA256"])
    if arguments.without_weights:
        sums = {name: sha256 for name, sha256 in sums.items() if not name.endswith(WEIGHTS)}
    fetch(os.environ["MODEL"], revision, sums, FOLDER, from_hub)


def read_sums(text: str) -> dict[str, str]:
    """Lines as sha256sum writes them -> the checksum of each file.

    Exits if there are none, or a line is not one.
    """
    sums = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if match is None or ".." in Path(match[2]).parts or Path(match[2]).is_absolute():
            sys.exit(
                f"{line!r} is not a line of checksums: put what `python k8s/weights.py pin MODEL` "
                "prints into weights of settings.yaml"
            )
        sums[match[2]] = match[1]
    if not sums:
        sys.exit("SHA256 is empty: nothing is fetched that is not pinned")
    return sums


def fetch(
    model: str, revision: str, sums: Mapping[str, str], folder: Path, download: Download
) -> None:
    """The files into folder/revision, which appears when they all are there and right."""
    done = folder / revision
    if done.is_dir():
        print(f"{done} is there")
        return
    under_way = folder / f".{revision}"
    under_way.mkdir(parents=True, exist_ok=True)
    for name, expected in sums.items():
        print(f"fetching {name}", flush=True)
        download(model, name, revision, under_way)
        found = sha256_of(under_way / name)
        if found != expected:
            (under_way / name).unlink()
            sys.exit(f"{name} of {model} has the checksum {found}, not {expected}: it is not used")
    shutil.rmtree(under_way / ".cache", ignore_errors=True)  # the hub client's notes
    under_way.rename(done)
    print(f"{done} is complete, {len(sums)} files checked")


def from_hub(model: str, name: str, revision: str, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(model, name, revision=revision, local_dir=folder)


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def wait(folder: Path, poll_s: float = WAIT_S) -> None:
    print(f"waiting for {folder}; the job blip2-weights-{folder.name} makes it", flush=True)
    while not folder.is_dir():
        time.sleep(poll_s)


def pin(model: str, revision: str) -> None:
    """Prints the weights' part of settings.yaml. Downloads the small files only."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(model, revision=revision, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or []}
    kinds = WEIGHTS[:1] if any(name.endswith(WEIGHTS[0]) for name in files) else WEIGHTS[1:]
    print(f"  weights:\n    model: {model}\n    revision: {info.sha}\n    sha256: |")
    for name, file in sorted(files.items()):
        if name.endswith(kinds) and file.lfs:
            print(f"      {file.lfs.sha256}  {name}")
        elif name.endswith((".json", ".txt")):
            path = hf_hub_download(model, name, revision=info.sha)
            print(f"      {sha256_of(Path(path))}  {name}")


if __name__ == "__main__":
    main()
