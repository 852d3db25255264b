"""Stages "see" and "ask": train the ViT, then the Q-Former, to recognise a scene's attributes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Blip2ForConditionalGeneration

from blip2_serve.demo import scenes
from training.loop import Log, optimise
from training.model import PIXELS, normalise, query

# The attributes of a shape and their values.
ATTRIBUTES = {"shape": scenes.SHAPES, "size": scenes.SIZES, "color": tuple(scenes.COLORS)}


def see(
    model: Blip2ForConditionalGeneration,
    drawn: list[scenes.Scene],
    pixels: Tensor,
    steps: int,
    log: Log,
) -> None:
    """Trains the ViT on `pixels`, uint8 [N, 3, PIXELS, PIXELS].

    Heads read each quarter's attributes from the mean of its patches, and those of the whole scene
    from the class token. Another head reads from each patch the quarter it lies in. Without it, the
    ViT drops the position, which no other head needs, and no query learns to look at one quarter
    (not a single scene was right after 1,000 steps).
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
    patches: Tensor,
    steps: int,
    log: Log,
) -> None:
    """Trains query tokens and Q-Former on the ViT's outputs `patches` [N, tokens, width]."""
    heads = Heads(model.config.qformer_config.hidden_size)
    labels = torch.tensor([attributes(scene) for scene in drawn])

    def loss_of(batch: Tensor) -> tuple[Tensor, float]:
        output = query(model, patches[batch].float())
        loss, share = heads(output[:, :4], output[:, 4], output[:, 5], labels[batch])
        return loss, share

    parameters = [*model.qformer.parameters(), model.query_tokens, *heads.parameters()]
    optimise(parameters, loss_of, len(drawn), batch_size=128, steps=steps, name="ask", log=log)


class Heads(nn.Module):
    """Linear classifiers of a scene's attributes, discarded after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_quarter = nn.ModuleDict(
            {name: nn.Linear(width, len(values) + 1) for name, values in ATTRIBUTES.items()}
        )
        self.background = nn.Linear(width, len(scenes.BACKGROUNDS))
        self.number = nn.Linear(width, len(scenes.NUMBERS))

    def forward(
        self, quarters: Tensor, background: Tensor, number: Tensor, labels: Tensor
    ) -> tuple[Tensor, float]:
        """Returns the summed loss and the share of scenes without any mistake.

        Args:
            quarters: [B, 4, width], to read the shapes from.
            background: [B, width].
            number: [B, width], to read the number of shapes from.
            labels: int64 [B, 14], as `attributes` returns them.
        """
        logits = [head(quarters[:, i]) for i in range(4) for head in self.of_quarter.values()]
        logits += [self.background(background), self.number(number)]
        pairs = list(zip(logits, labels.unbind(1), strict=True))
        loss = torch.stack([cross_entropy(x, y) for x, y in pairs]).sum()
        right = torch.stack([x.argmax(1) == y for x, y in pairs])
        return loss, right.all(0).float().mean().item()


def attributes(scene: scenes.Scene) -> list[int]:
    """Returns 14 labels: shape, size and color per quarter, background, number of shapes.

    The labels of an empty quarter are 0.
    """
    taken = {thing.position: thing for thing in scene.things}
    labels = []
    for position in scenes.POSITIONS:
        thing = taken.get(position)
        for name, values in ATTRIBUTES.items():
            labels.append(values.index(getattr(thing, name)) + 1 if thing else 0)
    return [*labels, list(scenes.BACKGROUNDS).index(scene.background), len(scene.things)]
