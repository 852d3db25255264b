"""Times decode steps of this project's OPT decoder against transformers', in alternation.

    python -m loadtest.bench.decode_step [--dtype bfloat16] [--batch 1 8 32] [--quantize int8]

Random weights in 768 x 12 layers (85M parameters). Prints milliseconds per step, medians of five
rounds, and the ratio to this project's decoder. `--quantize int8` adds it with int8 weights.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable
from functools import partial

import torch
from transformers import DynamicCache, OPTForCausalLM

from blip2_serve.compute.cpu.device import CpuDevice
from blip2_serve.compute.runner import Runner
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.types import SamplingParams
from loadtest.bench import script
from loadtest.bench.weights import shape

PROMPT, STEPS, ROUNDS = 48, 20, 5
DEVICE = CpuDevice(torch.device("cpu"))


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences")
    parser.add_argument("--quantize", choices=["int8"])
    args = parser.parse_args()
    torch.manual_seed(0)
    reference = OPTForCausalLM(shape("medium").text_config).to(getattr(torch, args.dtype)).eval()
    contestants: dict[str, Callable[[int], float]] = {
        "own": partial(own_step, own_decoder(reference)),
        "transformers": partial(reference_step, reference),
    }
    if args.quantize:
        contestants["int8"] = partial(own_step, own_decoder(reference, args.quantize))

    print(f"{args.dtype}, {torch.get_num_threads()} threads, prompt {PROMPT}, {STEPS} steps")
    for batch in args.batch:
        rounds = [{name: step(batch) for name, step in contestants.items()} for _ in range(ROUNDS)]
        medians = {name: statistics.median(r[name] for r in rounds) for name in contestants}
        for name, ms in medians.items():
            print(f"batch {batch:3}: {name:12} {ms:6.1f} ms, {ms / medians['own']:.2f} x own")


def own_decoder(reference: OPTForCausalLM, quantize: str | None = None) -> OptDecoder:
    """This project's decoder with the reference's weights."""
    decoder = OptDecoder(reference.config).to(reference.dtype).eval().requires_grad_(False)
    tensors = {f"language_model.{name}": t for name, t in reference.state_dict().items()}
    for name, parameter in decoder.checkpoint_tensors().items():
        parameter.copy_(tensors[name])
    DEVICE.prepare_decoder(decoder, quantize)
    return decoder


def prefilled(decoder: OptDecoder, batch: int) -> tuple[Runner, list[Sequence]]:
    """A runner, and sequences whose prompts it has computed."""
    length = PROMPT + STEPS
    runner = Runner(decoder, DEVICE, batch * length, max_num_seqs=batch, max_len=length)
    image = torch.empty(0, decoder.config.hidden_size)
    sequences = []
    for i in range(batch):
        slots = array("q", range(1 + i * length, 1 + (i + 1) * length))
        request = Request(str(i), [5] * PROMPT, image, "", SamplingParams(), unused=slots[PROMPT:])
        sequences.append(Sequence(request, slots=slots[:PROMPT]))
        runner.run([Chunk(sequences[-1], 0, PROMPT)])
        sequences[-1].append(7)
    return runner, sequences


def own_step(decoder: OptDecoder, batch: int) -> float:
    """Milliseconds per decode step."""
    runner, sequences = prefilled(decoder, batch)
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
