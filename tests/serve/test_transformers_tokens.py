"""Greedy answers over HTTP have the same token ids as transformers'."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from PIL import Image
from ray import serve
from skimage import data as photographs

from blip2_serve.demo import scenes
from support.checkpoints import Recipe, write_checkpoint
from support.images import data_url
from support.oracle import Oracle
from support.server import App, start_app

REQUESTS = 64
ARRIVAL_SPREAD_S = 1.0

RECIPES = [
    pytest.param(None, id="tied embeddings, one file, two replicas per stage"),
    pytest.param(
        (
            Recipe(
                "untied",
                seed=2,
                image_size=70,
                vision_width=96,
                vision_layers=3,
                queries=5,
                qformer_width=64,
                width=96,
                layers=3,
                heads=6,
                vocabulary=420,
                tied=False,
                layout="sharded",
                text={"do_layer_norm_before": False},
            ),
            # Prompts exceed a step, so they are computed in chunks.
            {"max_num_seqs": 24, "max_num_batched_tokens": 40},
        ),
        id="untied embeddings, post-norm, shards, chunked prefill",
    ),
    pytest.param(
        (
            Recipe(
                "eos",
                seed=3,
                image_size=42,
                vision_width=48,
                queries=12,
                qformer_width=32,
                width=48,
                layers=4,
                heads=3,
                vocabulary=300,
                layout="bin",
            ),
            {"max_num_seqs": 8, "kv_slots": 900},
        ),
        id="two frequent eos ids, .bin shards, few KV slots",
    ),
]


@dataclass(frozen=True)
class Case:
    image: int
    prompt: str
    max_tokens: int
    min_tokens: int
    repetition_penalty: float


def pictures() -> list[Image.Image]:
    drawn = [scenes.sample(seed).image for seed in range(5)]
    photos = [photographs.astronaut(), photographs.chelsea(), photographs.coffee()]
    return drawn + [Image.fromarray(photo).resize((160, 120)) for photo in photos]


def cases(seed: int) -> list[Case]:
    rng = random.Random(seed)
    words = ["what", "is", "a", "the", "red", "circle", "of", "two", "?", "naïve", "東京", "😀"]

    def prompt() -> str:
        kind = rng.randrange(4)
        if kind == 0:
            return rng.choice(["", "a photo of"])
        if kind == 1:
            return f"Question: {' '.join(rng.choices(words, k=6))}? Answer:"
        return " ".join(rng.choices(words, k=rng.randint(1, 45)))

    def case() -> Case:
        max_tokens = rng.randint(1, 40)
        return Case(
            image=rng.randrange(8),
            prompt=prompt(),
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, 0, rng.randint(0, max_tokens)]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.2]),
        )

    return [case() for _ in range(REQUESTS)]


def reference_tokens(oracle: Oracle, images: list[Image.Image], case: Case) -> list[int]:
    extra = {"min_new_tokens": case.min_tokens} if case.min_tokens else {}
    return oracle.tokens(
        images[case.image],
        case.prompt,
        max_new_tokens=case.max_tokens,
        repetition_penalty=case.repetition_penalty,
        **extra,
    )


@pytest.fixture(scope="module", params=RECIPES)
def served(
    request: pytest.FixtureRequest,
    base_url: str,
    random_model: tuple[App, Oracle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[App, Oracle]]:
    if request.param is None:
        yield random_model
        return
    recipe, generator = request.param
    folder = write_checkpoint(tmp_path_factory.mktemp(recipe.name), recipe)
    if recipe.name == "eos":
        folder = write_checkpoint(folder, replace(recipe, eos=frequent_tokens(Oracle(folder))))
    app = start_app(
        base_url,
        recipe.name,
        {"model": str(folder), "dtype": "float32", "generator": generator},
    )
    yield app, Oracle(folder)
    serve.delete(recipe.name)


def frequent_tokens(oracle: Oracle) -> list[int]:
    """Returns the two most frequent tokens of answers; as eos ids they end answers early."""
    images = pictures()
    answers = [reference_tokens(oracle, images, replace(c, max_tokens=30)) for c in cases(0)[:16]]
    counts = Counter(token for answer in answers for token in set(answer[2:]))
    return [token for token, _ in counts.most_common(2)]


async def ask(client: httpx.AsyncClient, urls: list[str], case: Case, after_s: float) -> Any:
    await asyncio.sleep(after_s)
    body = {
        "image": urls[case.image],
        "prompt": case.prompt,
        "max_tokens": case.max_tokens,
        "min_tokens": case.min_tokens,
        "repetition_penalty": case.repetition_penalty,
        "return_token_ids": True,
    }
    response = await client.post("/v1/generate", json=body)
    assert response.status_code == httpx.codes.OK, response.text
    return response.json()["choices"][0]


async def test_tokens_equal_those_of_transformers_under_load_and_alone(
    served: tuple[App, Oracle],
) -> None:
    app, oracle = served
    images = pictures()
    urls = [data_url(image) for image in images]
    todo = cases(seed=1)
    rng = random.Random(2)

    async with app.client() as client:
        arrivals = [rng.uniform(0, ARRIVAL_SPREAD_S) for _ in todo]
        concurrent = await asyncio.gather(
            *(ask(client, urls, c, after) for c, after in zip(todo, arrivals, strict=True))
        )
        alone = [await ask(client, urls, case, 0) for case in todo]

    expected = [reference_tokens(oracle, images, case) for case in todo]
    assert [oracle.without_eos(choice["token_ids"]) for choice in concurrent] == expected
    assert [oracle.without_eos(choice["token_ids"]) for choice in alone] == expected
    # Guard against a trivial comparison: answers differ, and some end early, others late.
    assert len({tuple(answer) for answer in expected}) > REQUESTS / 2
    if app.name == "eos":
        reasons = Counter(choice["finish_reason"] for choice in concurrent)
        assert min(reasons["stop"], reasons["length"]) > REQUESTS / 10


async def test_the_same_prompt_gets_each_images_own_answer(
    served: tuple[App, Oracle],
) -> None:
    app, oracle = served
    images = pictures()
    urls = [data_url(image) for image in images]
    todo = [Case(i, "Question: what is it? Answer:", 20, 20, 1.0) for i in range(len(images))]
    async with app.client() as client:
        answers = await asyncio.gather(*(ask(client, urls, case, 0) for case in todo))
    expected = [reference_tokens(oracle, images, case) for case in todo]
    assert [oracle.without_eos(answer["token_ids"]) for answer in answers] == expected
    assert len({tuple(answer) for answer in expected}) > len(images) / 2
