"""Serve BLIP-2 OPT models: captions, visual question answering and chat about an image."""

__version__ = "0.1.0"
