"""Where tests of the engine compute: on a GPU if there is one."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # conftest.py imports this before anybody imports Triton
