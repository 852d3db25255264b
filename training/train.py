"""Trains the shipped checkpoint: `python -m training.train --out FOLDER`.

Like BLIP-2 itself, the model is trained in stages, each on the frozen outputs of the one before:

1. *see*: the ViT. Linear heads, discarded afterwards, read each scene's attributes (shape, size and
   color in each quarter; background; number of shapes) from its patches.
2. *ask*: query tokens and Q-Former, on the ViT's outputs. The same kind of heads read one quarter
   from each of the first four queries, and background and number from the next two.
3. *speak*: projection and OPT, on the Q-Former's outputs. Texts are captions and chats in the
   server's prompt formats; only answers and the final newline count in the loss.
4. *answer*: the same with more questions, since the model is slowest to learn those that name a
   shape ("where is the circle?").

All scenes have seeds from `scenes.FIRST_TRAINING_SEED` up. The result is a plain transformers
checkpoint (`Blip2ForConditionalGeneration` and `Blip2Processor`) in float16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import Blip2ForConditionalGeneration

from blip2_serve.demo import scenes
from training.language import evaluate, speak
from training.loop import Log
from training.model import make_model, make_processor, pixels_of, query_outputs, vision_outputs
from training.texts import Writer
from training.vision import ask, see

SEED = 7


def main() -> None:
    args = _parse_arguments()
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
    patches = vision_outputs(model, pixels)
    stage(args.out / "ask.pt", model, lambda: ask(model, drawn, patches, args.ask_steps, log))
    queried = query_outputs(model, patches)
    write = Writer(processor.tokenizer, captions=0.4, questions=3, seed=SEED)
    stage(
        args.out / "speak.pt",
        model,
        lambda: speak(model, write, drawn, queried, args.speak_steps, "speak", log),
    )
    write = Writer(processor.tokenizer, captions=0.2, questions=6, seed=SEED)
    speak(model, write, drawn, queried, args.answer_steps, "answer", log)

    model.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    model = Blip2ForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32).eval()
    held_out = [scenes.sample(seed) for seed in range(args.eval_scenes)]
    log(f"held out, greedy, float32: {evaluate(model, processor, held_out)}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Trains the shipped checkpoint. An interrupted run resumes after its last "
        "finished stage.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the checkpoint and the log")
    add("--scenes", type=int, default=40_960, help="number of training scenes")
    add("--see-steps", type=int, default=2_800, help="steps of training the ViT")
    add("--ask-steps", type=int, default=1_500, help="steps of training the Q-Former")
    add("--speak-steps", type=int, default=1_500, help="steps of training OPT")
    add("--answer-steps", type=int, default=2_000, help="further steps of OPT, mostly on questions")
    add("--eval-scenes", type=int, default=400, help="held-out scenes to evaluate on, from seed 0")
    return parser.parse_args()


def stage(result: Path, model: nn.Module, train: Callable[[], None]) -> None:
    """Trains the model and saves it to `result`, or loads it from there if that exists."""
    if result.exists():
        model.load_state_dict(torch.load(result))
    else:
        train()
        torch.save(model.state_dict(), result)


if __name__ == "__main__":
    main()
