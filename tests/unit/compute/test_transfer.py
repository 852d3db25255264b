from __future__ import annotations

import torch

from blip2_serve.compute.transfer import download, pinned, upload

CPU = torch.device("cpu")


def test_without_a_gpu_nothing_is_copied() -> None:
    tensor = torch.arange(3)

    assert pinned(tensor, CPU) is tensor
    assert upload(tensor, CPU) is tensor
    assert download(tensor) is tensor
