"""The shipped checkpoint is accurate with int8 weights, on held-out scenes without HTTP and Ray."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from blip2_serve.compute.cpu import int8_product
from blip2_serve.config import AppConfig
from blip2_serve.demo import scenes
from blip2_serve.engine.sequence import Request
from blip2_serve.ingress_config import ChatConfig
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import DEMO_FOLDER
from blip2_serve.stages import language_model
from blip2_serve.types import SamplingParams
from support.checkpoints import load_encoder
from support.images import encode

pytestmark = pytest.mark.skipif(
    not int8_product.available(), reason="this CPU lacks AVX512-VNNI, which int8 weights need"
)

HELD_OUT = range(1_000, 1_060)
RIGHT = 0.95


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_least_95_percent_of_captions_and_answers_are_right(dtype: str) -> None:
    drawn = [scenes.sample(seed) for seed in HELD_OUT]
    config = AppConfig.model_validate(
        {
            "dtype": dtype,
            "generator": {
                "quantize": "int8",
                "kv_slots": 4096,
                "max_num_seqs": 16,
                "max_waiting": 2000,
                "threads": 1,
            },
        }
    )
    with ThreadPoolExecutor(1) as thread:  # it would change this thread's priority
        loaded = thread.submit(language_model.load, config, "cpu").result()
    engine, tokenizer = loaded.engine, loaded.tokenizer
    assert not isinstance(engine._runner._decoder.lm_head, nn.Linear)
    template = ChatConfig().asked
    expected: dict[str, str] = {}
    for scene, features in zip(drawn, _features(drawn, getattr(torch, dtype)), strict=True):
        prompts = [("", scene.caption)]
        prompts += [(template.format(question=q), answer) for q, answer in scene.questions]
        for prompt, answer in prompts:
            name = f"{scene.seed} {prompt}"
            expected[name] = answer
            ids = tokenizer.prompt_ids(prompt)
            params = SamplingParams(max_tokens=64)
            engine.add(Request(name, ids, features, str(scene.seed), params))
    texts = dict.fromkeys(expected, "")
    while engine.has_work:
        for name, event in engine.step().events:
            texts[name] += event.text
    captions = [texts[n] == expected[n] for n in expected if n.endswith(" ")]
    answers = [texts[n].strip() == expected[n] for n in expected if not n.endswith(" ")]
    assert len(captions) == len(drawn)
    assert sum(captions) >= RIGHT * len(captions), f"{sum(captions)} of {len(captions)}"
    assert sum(answers) >= RIGHT * len(answers), f"{sum(answers)} of {len(answers)}"


def _features(drawn: list[scenes.Scene], dtype: torch.dtype) -> torch.Tensor:
    """Returns the scenes' image features [scenes, queries, hidden]."""
    processor = ImageProcessor.load(DEMO_FOLDER)
    pixels = np.stack([processor.pixels(encode(scene.image)) for scene in drawn])
    features: torch.Tensor = load_encoder(DEMO_FOLDER, dtype)(torch.from_numpy(pixels))
    return features
