"""The recipe in the repository is the one that made the shipped checkpoint."""

from __future__ import annotations

import re

from transformers import AutoTokenizer

from blip2_serve.demo import scenes
from blip2_serve.model.checkpoint import open_checkpoint
from blip2_serve.model.source import DEMO, DEMO_FOLDER
from training import train


def test_the_recipe_makes_the_shipped_tokenizer_and_the_shipped_shapes() -> None:
    tokenizer = train.make_processor().tokenizer
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(DEMO_FOLDER).get_vocab()
    checkpoint = open_checkpoint(DEMO)
    model = train.make_model(tokenizer).requires_grad_(False)
    assert checkpoint.config.text_config.eos_token_id == tokenizer.convert_tokens_to_ids("Ċ")
    checkpoint.load(dict(model.named_parameters()), "shipped checkpoint")  # names and shapes agree


def test_the_shipped_checkpoint_takes_at_most_8_megabytes() -> None:
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) <= 8_000_000


def test_the_log_ships_with_the_figure_reached() -> None:
    log = (DEMO_FOLDER / "train.log").read_text()
    assert f"seed {train.SEED}" in log
    shares = [float(share) for share in re.findall(r"= ([\d.]+)%'", log.splitlines()[-1])]
    assert len(shares) == 3
    assert min(shares) >= 95


def test_what_is_taught_is_what_the_scene_says() -> None:
    tokenizer = train.make_processor().tokenizer
    write = train.Writer(tokenizer, captions=0.5, questions=3)
    for seed in range(20):
        scene = scenes.sample(seed)
        ids, targets = write(scene)
        assert len(ids) == len(targets)
        assert ids[0] == train.BOS
        assert all(
            target in (token, train.IGNORE) for token, target in zip(ids, targets, strict=True)
        )
        assert tokenizer.decode(targets[-1]) == "\n"
        taught = tokenizer.decode([t for t in targets if t != train.IGNORE])
        answers = {answer for _, answer in scene.questions + scene.chat}
        assert scene.caption in taught or any(answer in taught for answer in answers)
