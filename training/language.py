"""Stages "speak" and "answer": train projection and OPT on texts; and the final evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from blip2_serve.demo.scenes import Scene
from training.loop import Log, optimise
from training.model import QUERIES
from training.texts import IGNORE, Writer
from training.tokenizer import PAD


def speak(
    model: Blip2ForConditionalGeneration,
    write: Writer,
    drawn: list[Scene],
    query_outputs: Tensor,
    steps: int,
    name: str,
    log: Log,
) -> None:
    """Trains projection and OPT on the Q-Former's outputs [N, QUERIES, width]."""
    embed = model.get_input_embeddings()

    def loss_of(batch: Tensor) -> tuple[Tensor, float]:
        texts = [write(drawn[i]) for i in batch.tolist()]
        longest = max(len(ids) for ids, _ in texts)
        ids = torch.tensor([x + [PAD] * (longest - len(x)) for x, _ in texts])
        targets = torch.tensor([y + [IGNORE] * (longest - len(y)) for _, y in texts])
        features = model.language_projection(query_outputs[batch])
        embedded = torch.cat([features, embed(ids)], dim=1)
        # No attention mask: padding comes last, and causal attention only looks back.
        hidden = model.language_model.model(inputs_embeds=embedded).last_hidden_state
        hidden, expected = hidden[:, QUERIES:-1], targets[:, 1:]
        counted = expected != IGNORE
        logits = model.language_model.lm_head(hidden[counted])
        loss = cross_entropy(logits, expected[counted])
        wrong = torch.zeros_like(counted)
        wrong[counted] = logits.argmax(1) != expected[counted]
        return loss, 1 - wrong.any(1).float().mean().item()

    parameters = [*model.language_projection.parameters(), *model.language_model.parameters()]
    optimise(parameters, loss_of, len(drawn), batch_size=128, steps=steps, name=name, log=log)


def evaluate(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, held_out: list[Scene]
) -> dict[str, Any]:
    """Returns the shares of exactly right captions, answers and chat turns.

    In a chat, each prompt has the model's own earlier answers.
    """

    def answer(scene: Scene, prompt: str) -> str:
        inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return str(processor.tokenizer.decode(new, skip_special_tokens=True)).strip()

    captions = [answer(scene, "") == scene.caption for scene in held_out]
    answers, turns = [], []
    for scene in held_out:
        answers += [answer(scene, f"Question: {q} Answer:") == a for q, a in scene.questions]
        history = ""
        for question, expected in scene.chat:
            given = answer(scene, f"{history}Question: {question} Answer:")
            history += f"Question: {question} Answer: {given}. "
            turns.append(given == expected)
    return {
        name: f"{sum(right)}/{len(right)} = {sum(right) / len(right):.2%}"
        for name, right in (("captions", captions), ("answers", answers), ("chat turns", turns))
    }
