"""Downloads a checkpoint's files from the hub and verifies their pinned checksums.

    python k8s/weights.py pin MODEL      print the lines for settings.yaml
    python weights.py fetch              in a pod: download to /weights/REVISION unless it exists
    python weights.py wait               in a pod: wait until another pod has downloaded it

In a pod, environment variables say what to download: MODEL, REVISION and SHA256, which has lines in
the format of sha256sum. The folder REVISION only ever exists with all files, each verified. The
image has this script as /opt/blip2/weights.py; it depends neither on Ray nor on the package.
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

# (model, file, revision, folder to write the file to)
Download = Callable[[str, str, str, Path], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="Download and verify a checkpoint's files.")
    commands = parser.add_subparsers(dest="command", required=True)
    pin_command = commands.add_parser("pin", help="print the lines for settings.yaml")
    pin_command.add_argument("model", help="hub id, such as Salesforce/blip2-opt-2.7b-coco")
    pin_command.add_argument("--revision", default="main", help="branch, tag or commit")
    fetch_command = commands.add_parser(
        "fetch", help="download the files given by MODEL, REVISION and SHA256"
    )
    fetch_command.add_argument(
        "--without-weights", action="store_true", help="only the small files, for preprocessors"
    )
    commands.add_parser("wait", help="wait until REVISION has been downloaded")
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
    """Parses lines in the format of sha256sum and returns the checksum of each file.

    Exits with a message if there are none or a line is malformed.
    """
    sums = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if match is None or ".." in Path(match[2]).parts or Path(match[2]).is_absolute():
            sys.exit(
                f"SHA256 has a malformed line, {line!r}: copy the output of "
                "`python k8s/weights.py pin MODEL` into settings.yaml"
            )
        sums[match[2]] = match[1]
    if not sums:
        sys.exit("SHA256 is empty: it must have the pinned checksum of every file")
    return sums


def fetch(
    model: str, revision: str, sums: Mapping[str, str], folder: Path, download: Download
) -> None:
    """Downloads files to folder/revision, which is created only once all are verified.

    Exits with a message if a file has another checksum.
    """
    done = folder / revision
    if done.is_dir():
        print(f"{done} exists already")
        return
    partial = folder / f".{revision}"
    partial.mkdir(parents=True, exist_ok=True)
    for name, expected in sums.items():
        print(f"downloading {name}", flush=True)
        download(model, name, revision, partial)
        actual = sha256_of(partial / name)
        if actual != expected:
            (partial / name).unlink()
            sys.exit(f"{name} of {model} has the checksum {actual}, not the pinned {expected}")
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub client's metadata
    partial.rename(done)
    print(f"{done} is complete, {len(sums)} files verified")


def from_hub(model: str, name: str, revision: str, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(model, name, revision=revision, local_dir=folder)


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def wait(folder: Path, poll_s: float = WAIT_S) -> None:
    print(f"waiting for {folder}, which the job blip2-weights-{folder.name} creates", flush=True)
    while not folder.is_dir():
        time.sleep(poll_s)


def pin(model: str, revision: str) -> None:
    """Prints the section `weights` for settings.yaml; downloads only the small files for it."""
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
