"""The device that tests compute on: a GPU if there is one.

Imports nothing that imports Triton, which reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
