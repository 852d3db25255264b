"""Images as files, data URLs and chat messages."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Returns the image as a file; `options` are those of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def data_url(image: Image.Image | bytes, media_type: str = "image/png") -> str:
    data = image if isinstance(image, bytes) else encode(image)
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_message(image: Image.Image | bytes, text: str | None = None) -> dict[str, Any]:
    """Returns a user message with an image and an optional question."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    if text is not None:
        content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}
