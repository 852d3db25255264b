"""The recipe of the shipped checkpoint: `python -m training.train --out FOLDER`.

As BLIP-2 itself was, it is trained in stages, each on the frozen results of the one before:

1. *see*: the ViT. Linear heads, thrown away afterwards, read each scene's attributes (shape, size,
   color of what stands in each quarter; background; number of shapes) off its patches.
2. *ask*: query tokens and Q-Former, on the ViT's outputs computed once. The same kind of heads read
   one quarter off each of the first four queries, the background and the number off the next two.
3. *speak*: projection and OPT, on the Q-Former's outputs computed once. Texts are captions and
   chats in the prompt formats that the server writes; the loss counts answers only, and the newline
   that ends the last one.
4. *answer*: the same with more questions, since those that name a shape ("where is the circle?")
   are learned last.

Only scenes with seeds from `scenes.FIRST_TRAINING_SEED` upwards are drawn. The result is a plain
transformers checkpoint (`Blip2ForConditionalGeneration` and `Blip2Processor`) in float16.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GPT2Tokenizer,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_serve.demo import scenes
from training.tokenizer import BOS, PAD, make_tokenizer

SEED = 7
PIXELS = 112
QUERIES = 8
IGNORE = -100

QUARTER = {"shape": scenes.SHAPES, "size": scenes.SIZES, "color": tuple(scenes.COLORS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and log")
    parser.add_argument("--scenes", type=int, default=40_960, help="training scenes")
    parser.add_argument("--see-steps", type=int, default=2_800)
    parser.add_argument("--ask-steps", type=int, default=1_500)
    parser.add_argument("--speak-steps", type=int, default=1_500)
    parser.add_argument("--answer-steps", type=int, default=2_000)
    parser.add_argument("--eval-scenes", type=int, default=400, help="held-out scenes, from seed 0")
    args = parser.parse_args()

    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "train.log")
    counts = {name: value for name, value in vars(args).items() if name != "out"}
    log(f"seed {SEED}, {counts}, torch {torch.__version__}")

    processor = make_processor()
    model = make_model(processor.tokenizer)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    drawn = [scenes.sample(scenes.FIRST_TRAINING_SEED + i) for i in range(args.scenes)]
    pixels = torch.stack([pixels_of(scene) for scene in drawn])
    log(f"drew {len(drawn):,} scenes")
    stage(args.out / "see.pt", model, lambda: see(model, drawn, pixels, args.see_steps, log))
    seen = vision_outputs(model, pixels)
    stage(args.out / "ask.pt", model, lambda: ask(model, drawn, seen, args.ask_steps, log))
    answers = query_outputs(model, seen)
    write = Writer(processor.tokenizer, captions=0.4, questions=3)
    stage(
        args.out / "speak.pt",
        model,
        lambda: speak(model, write, drawn, answers, args.speak_steps, "speak", log),
    )
    write = Writer(processor.tokenizer, captions=0.2, questions=6)
    speak(model, write, drawn, answers, args.answer_steps, "answer", log)

    model.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    model = Blip2ForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32).eval()
    held_out = [scenes.sample(seed) for seed in range(args.eval_scenes)]
    log(f"held out, greedy, float32: {evaluate(model, processor, held_out)}")


def stage(result: Path, model: nn.Module, train: Callable[[], None]) -> None:
    """Trains and keeps the result; a run that was broken off goes on behind its last stage."""
    if result.exists():
        model.load_state_dict(torch.load(result))
    else:
        train()
        torch.save(model.state_dict(), result)


class Log:
    """Prints lines with the seconds since the start, and adds them to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        line = f"{time.monotonic() - self._start:7.0f} s  {message}"
        print(line, flush=True)
        self._file.write(line + "\n")


# -- the model ---------------------------------------------------------------------------------


def make_processor() -> Blip2Processor:
    """The tokenizer of the scenes' texts, and the resize."""

    def texts() -> Iterator[str]:
        for seed in range(scenes.FIRST_TRAINING_SEED, scenes.FIRST_TRAINING_SEED + 2_000):
            scene = scenes.sample(seed)
            yield scene.caption
            yield f"a photo of {scene.caption}\n"
            for question, answer in scene.questions + scene.chat:
                yield f"Question: {question} Answer: {answer}. Question: {question} Short answer:"

    tokenizer = make_tokenizer(texts(), vocabulary=600, min_frequency=20)
    image_processor = BlipImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES)


def make_model(tokenizer: GPT2Tokenizer) -> Blip2ForConditionalGeneration:
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    config = Blip2Config(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": PIXELS,
            "patch_size": 14,
            "initializer_range": 0.02,
        },
        qformer_config={
            "vocab_size": 1,  # text goes to OPT only: no word embeddings are used
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": math.ceil(len(tokenizer) / 32) * 32,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "init_std": 0.08,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "bos_token_id": BOS,
            "pad_token_id": PAD,
            "eos_token_id": newline,
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    # transformers zeroes the query tokens: all queries would then be one and the same for ever. And
    # at its own scale the position would drown in what the patch shows.
    nn.init.normal_(model.query_tokens, std=0.5)
    nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.3)
    return model


# -- stages 1 and 2: see, ask ----------------------------------------------------------------------


def pixels_of(scene: scenes.Scene) -> Tensor:
    """uint8 [3, PIXELS, PIXELS], resized as the server does."""
    resized = scene.image.resize((PIXELS, PIXELS), resample=3)
    flat = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return flat.view(PIXELS, PIXELS, 3).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    image_processor = BlipImageProcessorPil()
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels / 255 - mean) / std


def see(
    model: Blip2ForConditionalGeneration,
    drawn: list[scenes.Scene],
    pixels: Tensor,
    steps: int,
    log: Log,
) -> None:
    """Trains the ViT; the heads read the mean of each quarter's patches, and the class token.

    Each patch must tell as well which quarter it is in: the heads above do not ask where, so the
    ViT drops it, and no query learns to look at one quarter (not one scene right in 1,000 steps).
    """
    width = model.config.vision_config.hidden_size
    heads, place = Heads(width), nn.Linear(width, 4)
    labels = torch.tensor([attributes(scene) for scene in drawn])
    side = PIXELS // model.config.vision_config.patch_size
    columns = torch.arange(side) * 2 // side
    quarter_of_patch = (2 * columns[:, None] + columns).flatten()

    def loss_of(batch: Tensor) -> tuple[Tensor, float]:
        noisy = pixels[batch].float()
        noisy = (noisy + 4 * torch.randn_like(noisy)).clamp(0, 255)
        output = model.vision_model(normalise(noisy)).last_hidden_state
        patches = output[:, 1:].unflatten(1, (2, side // 2, 2, side // 2))
        quarters = patches.mean((2, 4)).flatten(1, 2)
        loss, share = heads(quarters, output[:, 0], output[:, 0], labels[batch])
        places = place(output[:, 1:]).flatten(0, 1)
        return loss + cross_entropy(places, quarter_of_patch.repeat(len(batch))), share

    parameters = [
        *model.vision_model.parameters(),
        *heads.parameters(),
        *place.parameters(),
    ]
    optimise(parameters, loss_of, len(drawn), batch_size=64, steps=steps, name="see", log=log)


def ask(
    model: Blip2ForConditionalGeneration,
    drawn: list[scenes.Scene],
    features: Tensor,
    steps: int,
    log: Log,
) -> None:
    """Trains query tokens and Q-Former on the ViT's outputs `features` [N, tokens, width]."""
    heads = Heads(model.config.qformer_config.hidden_size)
    labels = torch.tensor([attributes(scene) for scene in drawn])

    def loss_of(batch: Tensor) -> tuple[Tensor, float]:
        output = query(model, features[batch].float())
        loss, share = heads(output[:, :4], output[:, 4], output[:, 5], labels[batch])
        return loss, share

    parameters = [*model.qformer.parameters(), model.query_tokens, *heads.parameters()]
    optimise(parameters, loss_of, len(drawn), batch_size=128, steps=steps, name="ask", log=log)


class Heads(nn.Module):
    """Linear readers of a scene's attributes, shared by its quarters; not kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_quarter = nn.ModuleDict(
            {name: nn.Linear(width, len(values) + 1) for name, values in QUARTER.items()}
        )
        self.background = nn.Linear(width, len(scenes.BACKGROUNDS))
        self.number = nn.Linear(width, len(scenes.NUMBERS))

    def forward(
        self, quarters: Tensor, background: Tensor, number: Tensor, labels: Tensor
    ) -> tuple[Tensor, float]:
        """Summed loss and share of faultless scenes; `quarters` [B, 4, width], `labels` [B, 14]."""
        logits = [head(quarters[:, i]) for i in range(4) for head in self.of_quarter.values()]
        logits += [self.background(background), self.number(number)]
        pairs = list(zip(logits, labels.unbind(1), strict=True))
        loss = torch.stack([cross_entropy(x, y) for x, y in pairs]).sum()
        right = torch.stack([x.argmax(1) == y for x, y in pairs])
        return loss, right.all(0).float().mean().item()


def attributes(scene: scenes.Scene) -> list[int]:
    """Per quarter shape, size, color (0 = empty), then background and number of shapes."""
    taken = {thing.position: thing for thing in scene.things}
    labels = []
    for position in scenes.POSITIONS:
        thing = taken.get(position)
        for name, values in QUARTER.items():
            labels.append(values.index(getattr(thing, name)) + 1 if thing else 0)
    return [*labels, list(scenes.BACKGROUNDS).index(scene.background), len(scene.things)]


def query(model: Blip2ForConditionalGeneration, seen: Tensor) -> Tensor:
    """Q-Former outputs [B, QUERIES, width] of ViT outputs [B, tokens, width]."""
    queries = model.query_tokens.expand(len(seen), -1, -1)
    output: Tensor = model.qformer(
        query_embeds=queries, encoder_hidden_states=seen
    ).last_hidden_state
    return output


@torch.inference_mode()
def vision_outputs(model: Blip2ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """float16, or the outputs of all scenes would not fit a laptop's memory."""
    return torch.cat(
        [model.vision_model(normalise(x)).last_hidden_state.half() for x in pixels.split(256)]
    )


@torch.inference_mode()
def query_outputs(model: Blip2ForConditionalGeneration, features: Tensor) -> Tensor:
    return torch.cat([query(model, batch.float()) for batch in features.split(256)])


# -- stage 3: speak ----------------------------------------------------------------------------


def speak(
    model: Blip2ForConditionalGeneration,
    write: Writer,
    drawn: list[scenes.Scene],
    features: Tensor,
    steps: int,
    name: str,
    log: Log,
) -> None:
    """Trains projection and OPT on the Q-Former's outputs `features` [N, QUERIES, width]."""
    embed = model.get_input_embeddings()

    def loss_of(batch: Tensor) -> tuple[Tensor, float]:
        texts = [write(drawn[i]) for i in batch.tolist()]
        longest = max(len(ids) for ids, _ in texts)
        ids = torch.tensor([x + [PAD] * (longest - len(x)) for x, _ in texts])
        targets = torch.tensor([y + [IGNORE] * (longest - len(y)) for _, y in texts])
        prefix = model.language_projection(features[batch])
        embedded = torch.cat([prefix, embed(ids)], dim=1)
        # Padding is on the right, where causal attention never looks back from a real token.
        hidden = model.language_model.model(inputs_embeds=embedded).last_hidden_state
        hidden, wanted = hidden[:, QUERIES:-1], targets[:, 1:]
        counted = wanted != IGNORE
        logits = model.language_model.lm_head(hidden[counted])
        loss = cross_entropy(logits, wanted[counted])
        wrong = torch.zeros_like(counted)
        wrong[counted] = logits.argmax(1) != wanted[counted]
        return loss, 1 - wrong.any(1).float().mean().item()

    parameters = [*model.language_projection.parameters(), *model.language_model.parameters()]
    optimise(parameters, loss_of, len(drawn), batch_size=128, steps=steps, name=name, log=log)


class Writer:
    """Scene -> (token ids from BOS on, targets: the id where it counts, else IGNORE).

    `captions` is their share of the texts; the others ask up to so many `questions`.
    """

    def __init__(self, tokenizer: GPT2Tokenizer, *, captions: float, questions: int) -> None:
        self._rng = random.Random(SEED)
        self._captions = captions
        self._questions = questions
        self._encode: Callable[[str], list[int]] = lambda text: tokenizer(
            text, add_special_tokens=False
        )["input_ids"]

    def __call__(self, scene: scenes.Scene) -> tuple[list[int], list[int]]:
        ids, targets = [BOS], [IGNORE]
        for text, counts in self._pieces(scene):
            piece = self._encode(text)
            ids += piece
            targets += piece if counts else [IGNORE] * len(piece)
        return ids, targets

    def _pieces(self, scene: scenes.Scene) -> list[tuple[str, bool]]:
        if self._rng.random() < self._captions:
            if self._rng.random() < 0.3:
                return [("a photo of", False), (f" {scene.caption}\n", True)]
            return [(f"{scene.caption}\n", True)]
        if self._rng.random() < 0.4:
            turns = scene.chat
        else:
            turns = self._rng.sample(scene.questions, min(self._questions, len(scene.questions)))
        turns = turns[: self._rng.randint(1, len(turns))]
        word = "Short answer" if len(turns) == 1 and self._rng.random() < 0.3 else "Answer"
        pieces = []
        for number, (question, answer) in enumerate(turns):
            lead = ". " if number else ""
            pieces += [(f"{lead}Question: {question} {word}:", False), (f" {answer}", True)]
        return [*pieces, ("\n", True)]


# -- every stage -------------------------------------------------------------------------------


def optimise(
    parameters: list[nn.Parameter],
    loss_of: Callable[[Tensor], tuple[Tensor, float]],
    examples: int,
    *,
    batch_size: int,
    steps: int,
    name: str,
    log: Log,
    peak_rate: float = 1e-3,
    warmup: int = 200,
) -> None:
    """AdamW with warm-up and cosine decay; logs the mean loss and share of faultless examples."""
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


# -- the figure reached ------------------------------------------------------------------------


def evaluate(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, held_out: list[scenes.Scene]
) -> dict[str, Any]:
    """Share of exactly right captions, answers, and chat turns (own earlier answers as history)."""

    def answer(scene: scenes.Scene, prompt: str) -> str:
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


if __name__ == "__main__":
    main()
