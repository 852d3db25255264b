"""Finds a checkpoint's files: in a folder, in this package, or on the hub. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from blip2_serve.errors import StartupError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "checkpoint"
DEMO_PICTURE = DEMO_FOLDER.parent / "picture.png"

# (single file, index of shards), in the order in which to look for them.
WEIGHT_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def find_folder(model: str, revision: str | None = None) -> Path:
    """Returns the local folder of a checkpoint; downloads a hub id's files, with progress bars.

    Raises:
        StartupError: There is no such checkpoint, or it cannot be downloaded.
    """
    return local_folder(model) or _download(model, revision, weights=True)


def find_configuration(model: str, revision: str | None = None) -> Path:
    """As `find_folder`, but downloads only a hub id's configuration, not its weights."""
    return local_folder(model) or _download(model, revision, weights=False)


def local_folder(model: str) -> Path | None:
    """The folder of a checkpoint that need not be downloaded; None if `model` is a hub id.

    Raises:
        StartupError: `model` looks like a path, and there is no such folder.
    """
    if model == DEMO:
        return DEMO_FOLDER
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model.count("/") != 1
    if looks_like_path or path.exists():
        raise StartupError(
            f"there is no checkpoint folder at {model}: give a folder, a hub id such as "
            f'Salesforce/blip2-opt-2.7b-coco, or "{DEMO}"'
        )
    return None


def _download(model: str, revision: str | None, *, weights: bool) -> Path:
    # Imported late: the hub client takes half a second, and local folders do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def get(*patterns: str) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*patterns]))

    try:
        folder = get("*.json", "*.txt")
        if not weights:
            return folder
        has_safetensors = any((folder / index).exists() for index in WEIGHT_LAYOUTS[0])
        if not has_safetensors:  # a single model.safetensors has no index
            has_safetensors = any(get("*.safetensors").glob("*.safetensors"))
        return get("*.safetensors" if has_safetensors else "*.bin")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StartupError(
            f"cannot download {model} from the hub ({reason}): check the name, the revision and "
            "the network, or give a local folder"
        ) from error
