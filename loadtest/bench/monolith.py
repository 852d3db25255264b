"""The baseline: BLIP-2 in one Ray Serve deployment, with Serve's own batching around `generate`.

    python -m loadtest.bench.monolith CHECKPOINT --port 8000

An afternoon's work with transformers and Ray Serve: waiting requests form a batch of at most 32,
padded on the left and generated up to the longest answer, and each answer is cut to its own length.
/v1/chat/completions takes one user message of an image and a text, and behaves as with
`ignore_eos`: it always returns `max_tokens` tokens.
"""

import argparse
import base64
import io
import logging
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI, Request
from PIL import Image
from ray import serve
from ray.serve.schema import LoggingConfig
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from blip2_serve import machine

MAX_BATCH_SIZE = 32
BATCH_WAIT_S = 0.05
CORES = machine.cores()

app = FastAPI()


@dataclass(frozen=True)
class Job:
    image: bytes
    prompt: str
    max_tokens: int


# Above the class, because serve.ingress copies the globals when it is applied.
def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@serve.deployment(max_ongoing_requests=256)
@serve.ingress(app)
class Monolith:
    def __init__(self, folder: str) -> None:
        self.name = Path(folder).name
        self.processor = Blip2Processor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        # On a CPU, a step of 32 sequences takes 100 ms with this attention, 120 with the default.
        self.model = Blip2ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
        self.decoders = ThreadPoolExecutor(CORES)

    @app.get("/ready")
    async def ready(self) -> dict[str, str]:
        return {"status": "ready"}

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.name, "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        parts = {part["type"]: part for part in body["messages"][0]["content"]}
        image = base64.b64decode(parts["image_url"]["image_url"]["url"].partition(",")[2])
        prompt = f"Question: {parts['text']['text']} Answer:"
        ids = await self.generate(Job(image, prompt, body["max_tokens"]))
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        message = {"role": "assistant", "content": text}
        return {
            "object": "chat.completion",
            "model": self.name,
            "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
            "usage": {"completion_tokens": len(ids)},
        }

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
    async def generate(self, jobs: list[Job]) -> list[list[int]]:
        # On the event loop: requests that arrive meanwhile wait at the proxy and form the next
        # batch. In a thread, Serve would cut them into smaller ones.
        return self.run(jobs)

    @torch.inference_mode()
    def run(self, jobs: list[Job]) -> list[list[int]]:
        """The new token ids of each job."""
        # Ray sets OMP_NUM_THREADS to 1, and torch's setting is per calling thread.
        torch.set_num_threads(CORES)
        images = list(self.decoders.map(decode, [job.image for job in jobs]))
        prompts = [job.prompt for job in jobs]
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        longest = max(job.max_tokens for job in jobs)
        ids = self.model.generate(
            **inputs, max_new_tokens=longest, min_new_tokens=longest, do_sample=False
        )
        new = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [tokens[: job.max_tokens] for tokens, job in zip(new, jobs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="The baseline of the comparison.")
    parser.add_argument("checkpoint", help="folder")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING")
    serve.start(http_options={"port": args.port}, logging_config=quiet)
    # After ray.init, whose native code installs its own handler.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.run(Monolith.bind(args.checkpoint), logging_config=quiet)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
