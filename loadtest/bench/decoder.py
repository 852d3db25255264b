"""Decode step of the own OPT decoder against transformers', in one process, alternating.

    python loadtest/bench/decoder.py [--dtype bfloat16] [--batch 1 8 32] [--quantize int8]

Random weights: OPT with 768 wide, 12 layers, 12 heads, 3072, vocabulary 8,064 (85M parameters).
Prints milliseconds per step, medians of several rounds, and how many times as long others take.
`--quantize int8` adds the own decoder with int8 weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from collections.abc import Callable
from functools import partial

import torch
from transformers import DynamicCache, OPTConfig, OPTForCausalLM

from blip2_serve.compute.cpu.int8 import quantize_decoder
from blip2_serve.compute.runner import Runner
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.types import SamplingParams

PROMPT, STEPS, ROUNDS = 48, 20, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--quantize", choices=["int8"])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    config = OPTConfig(
        vocab_size=8064,
        hidden_size=768,
        word_embed_proj_dim=768,
        ffn_dim=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    reference = OPTForCausalLM(config).to(dtype).eval()
    decoder = own_decoder(reference)
    decoder.pack()
    contestants: dict[str, Callable[[int], float]] = {
        "own": partial(own_step, decoder),
        "transformers": partial(reference_step, reference),
    }
    if args.quantize:
        quantized = own_decoder(reference)
        quantize_decoder(quantized)
        contestants["int8"] = partial(own_step, quantized)

    print(f"{args.dtype}, {torch.get_num_threads()} threads, prompt {PROMPT}, {STEPS} steps")
    for batch in args.batch:
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, step in contestants.items():
                taken[name].append(step(batch))
        own = statistics.median(taken["own"])
        for name, times in taken.items():
            ms = statistics.median(times)
            print(f"batch {batch:3}: {name:12} {ms:6.1f} ms, {ms / own:.2f} x own")


def own_decoder(reference: OPTForCausalLM) -> OptDecoder:
    """The own decoder with the reference's weights, as they are."""
    decoder = OptDecoder(reference.config).to(reference.dtype).eval().requires_grad_(False)
    tensors = {f"language_model.{name}": t for name, t in reference.state_dict().items()}
    for name, parameter in decoder.checkpoint_tensors().items():
        parameter.copy_(tensors[name])
    return decoder


def own_step(decoder: OptDecoder, batch: int) -> float:
    """Milliseconds of one decode step after the prompts."""
    reach = PROMPT + STEPS
    runner = Runner(decoder, rows=batch * reach, sequences=batch, longest=reach)
    image = torch.empty(0, decoder.config.hidden_size)
    sequences = []
    for i in range(batch):
        rows = array("q", range(i * reach, (i + 1) * reach))
        request = Request(str(i), [5] * PROMPT, image, "", SamplingParams(), unused=rows[PROMPT:])
        sequences.append(Sequence(request, slots=rows[:PROMPT]))
    for sequence in sequences:
        runner.run([Chunk(sequence, 0, PROMPT)])
        sequence.append(7)
    start = time.perf_counter()
    for _ in range(STEPS):
        logits = runner.run([Chunk(s, s.length - 1, s.length) for s in sequences])
        for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
            if sequence.request.unused:
                sequence.append(token)
    return (time.perf_counter() - start) / STEPS * 1000


@torch.inference_mode()
def reference_step(model: OPTForCausalLM, batch: int) -> float:
    """The same with transformers' model and cache."""
    cache = DynamicCache(config=model.config)
    model(torch.full((batch, PROMPT), 5), past_key_values=cache, logits_to_keep=1)
    token = torch.full((batch, 1), 7)
    start = time.perf_counter()
    for _ in range(STEPS):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        token.flatten().tolist()
    return (time.perf_counter() - start) / STEPS * 1000


if __name__ == "__main__":
    main()
