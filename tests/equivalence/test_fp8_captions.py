"""The shipped checkpoint's captions stay the same with its ViT in fp8, without HTTP and Ray."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from blip2_serve.config import AppConfig
from blip2_serve.demo import scenes
from blip2_serve.engine.sequence import Request
from blip2_serve.model import decoder
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import DEMO_FOLDER
from blip2_serve.stages import language_model
from blip2_serve.types import SamplingParams
from support.checkpoints import load_encoder
from support.device import DEVICE
from support.images import encode

NO_TRITON = "Triton is not installed: torch for GPUs brings it, and so do the tests on x86-64 Linux"
fp8 = pytest.importorskip("blip2_serve.compute.cuda.fp8", reason=NO_TRITON)
vision = pytest.importorskip("blip2_serve.compute.cuda.vision", reason=NO_TRITON)

HELD_OUT = range(1_000, 1_100)
SAME = 0.98


def quantize(x: Tensor, with_gelu: bool = False) -> Tensor:
    x = gelu(x.float()) if with_gelu else x.float()
    scales = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return fp8.Quantized((x / scales).to(torch.float8_e4m3fn), scales)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts torch in the place of Triton's interpreter, which would take minutes."""
    if DEVICE.type == "cuda":
        return

    def add_norm(_: object, x: Tensor, more: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        total, normed = decoder.add_norm(x, more, norm)
        return total, quantize(normed)

    monkeypatch.setattr(vision, "add_norm", decoder.add_norm)
    monkeypatch.setattr(fp8.Fp8Products, "add_norm", add_norm)
    monkeypatch.setattr(fp8, "quantize", lambda x, gelu=False: quantize(x, gelu))


def test_captions_are_those_of_the_plain_encoder() -> None:
    processor = ImageProcessor.load(DEMO_FOLDER)
    pictures = [processor.pixels(encode(scenes.sample(seed).image)) for seed in HELD_OUT]
    pixels = torch.from_numpy(np.stack(pictures)).to(DEVICE)
    encoder = load_encoder(DEMO_FOLDER).to(DEVICE)
    encoder.mean, encoder.std = encoder.mean.to(DEVICE), encoder.std.to(DEVICE)
    plain, quantized = encoder(pixels), vision.FusedEncoder(encoder, fp8.Fp8Products())(pixels)
    assert not torch.equal(plain, quantized)
    pairs = list(zip(captions(plain.cpu()), captions(quantized.cpu()), strict=True))
    same = [before == after for before, after in pairs]
    assert len({before for before, _ in pairs}) > len(pairs) / 2
    assert sum(same) >= SAME * len(same), f"{sum(same)} of {len(same)}"


def captions(features: Tensor) -> list[str]:
    config = AppConfig.model_validate(
        {"dtype": "float32", "generator": {"kv_slots": 4096, "max_num_seqs": 16, "threads": 1}}
    )
    with ThreadPoolExecutor(1) as thread:  # it would change this thread's priority
        loaded = thread.submit(language_model.load, config, "cpu").result()
    engine, tokenizer = loaded.engine, loaded.tokenizer
    ids = tokenizer.prompt_ids("")
    for number, image in enumerate(features):
        engine.add(Request(str(number), ids, image, str(number), SamplingParams(max_tokens=64)))
    texts = dict.fromkeys(map(str, range(len(features))), "")
    while engine.has_work:
        for name, event in engine.step().events:
            texts[name] += event.text
    return list(texts.values())
