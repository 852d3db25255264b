"""The optimisation loop and the log that all stages share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

# Indices of a batch's examples -> (loss, share of examples without any mistake)
Loss = Callable[[Tensor], tuple[Tensor, float]]


class Log:
    """Prints lines with the seconds since the start, and appends them to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        line = f"{time.monotonic() - self._start:7.0f} s  {message}"
        print(line, flush=True)
        self._file.write(line + "\n")


def optimise(
    parameters: list[nn.Parameter],
    loss_of: Loss,
    examples: int,
    *,
    batch_size: int,
    steps: int,
    name: str,
    log: Log,
    peak_rate: float = 1e-3,
    warmup: int = 200,
) -> None:
    """Runs AdamW with warm-up and cosine decay over batches of `examples` shuffled examples.

    Logs the mean loss and the mean share of faultless examples every 100 steps.
    """
    optimiser = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01),
    )
    losses: list[float] = []
    shares: list[float] = []
    order: Iterator[Tensor] = iter(())
    for step in range(1, steps + 1):
        batch = next(order, None)
        if batch is None or len(batch) < batch_size:
            order = iter(torch.randperm(examples).split(batch_size))
            batch = next(order)
        loss, share = loss_of(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        shares.append(share)
        if step % 100 == 0:
            log(f"{name} {step}/{steps}: loss {mean(losses):.4f}, faultless {mean(shares):.2%}")
            losses, shares = [], []


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
