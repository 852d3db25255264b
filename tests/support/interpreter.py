"""Corrects what Triton 3.8's interpreter computes otherwise than GPUs do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds to e4m3, and multiplies matrices in bfloat16, as GPUs do.

    The interpreter turns 127 into 64, since it loses a carry into the exponent, and multiplies the
    bits of bfloat16 numbers as integers.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tl, own_convert = interpreter.tl, interpreter._convert_float
    own_dot = interpreter.InterpreterBuilder.create_dot

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return own_convert(values, source, target, mode)
        floats = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return floats.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = own_convert(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return own_dot(builder, widened(a), widened(b), *others)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
