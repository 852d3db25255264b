"""The presets: settings of LAVIS, BLIP-2's reference code, and the model names that stand for them.

For clients that can send no `preset`, the model NAME is also served as NAME:caption and NAME:vqa.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, get_args

from blip2_serve.types import SamplingParams

Preset = Literal["caption", "vqa"]

# For BLIP-2 OPT on COCO captions (blip2_caption_opt2.7b.yaml) and on VQA
# (vqav2_zeroshot_opt_eval.yaml). Lengths are in new tokens.
PRESETS: Mapping[Preset, SamplingParams] = MappingProxyType(
    {
        "caption": SamplingParams(num_beams=5, max_tokens=30, min_tokens=8),
        "vqa": SamplingParams(num_beams=5, max_tokens=10, min_tokens=1, length_penalty=0.0),
    }
)

# The prompt of a request without one. That of "vqa" is a template of chats: it needs a question.
_PROMPTS: Mapping[Preset | None, str] = MappingProxyType({"caption": "a photo of"})


def default_prompt(preset: Preset | None) -> str:
    """What the model continues if a request has neither a prompt nor a question."""
    return _PROMPTS.get(preset, "")


def names_of(model: str) -> dict[str, Preset | None]:
    """The names under which a model is served, its own first, with what each stands for."""
    aliases: dict[str, Preset | None] = {f"{model}:{preset}": preset for preset in get_args(Preset)}
    return {model: None, **aliases}


def within(params: SamplingParams, preset: Preset) -> SamplingParams:
    """`params` with no more tokens than the preset allows.

    A client of an alias does not know the preset: its `max_tokens` is a limit, not a wish.
    """
    limits = [n for n in (params.max_tokens, PRESETS[preset].max_tokens) if n is not None]
    most = min(limits)
    return replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


def without_instructions(question: str, instructions: Sequence[str]) -> str:
    """A question without the instructions at its end, which tools add for other models.

    Compares words: white space, capitals, a full stop at the end and "please" before an
    instruction make no difference.
    """
    tails = [tail for instruction in instructions if (tail := _words(instruction))]
    words = _words(question)
    count = len(words)
    while tail := next((tail for tail in tails if words[-len(tail) :] == tail), []):
        del words[-len(tail) :]
        if words and words[-1].rstrip(",") == "please":
            words.pop()
        if words:
            words[-1] = words[-1].rstrip(".")
    dropped = count - len(words)
    if dropped == count:
        return ""
    return question.rsplit(None, dropped)[0]


def _words(text: str) -> list[str]:
    words = text.casefold().split()
    return [*words[:-1], *(word.rstrip(".") for word in words[-1:])]
