"""Checks that the recipe in the repository matches the shipped checkpoint."""

from __future__ import annotations

import re

from transformers import AutoTokenizer

from blip2_serve.demo import scenes
from blip2_serve.model.checkpoint import open_checkpoint
from blip2_serve.model.source import DEMO, DEMO_FOLDER
from training import train
from training.model import make_model, make_processor
from training.texts import IGNORE, Writer
from training.tokenizer import BOS


def test_the_recipe_gives_the_shipped_tokenizer_and_shapes() -> None:
    tokenizer = make_processor().tokenizer
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(DEMO_FOLDER).get_vocab()
    checkpoint = open_checkpoint(DEMO)
    model = make_model(tokenizer).requires_grad_(False)
    assert checkpoint.config.text_config.eos_token_id == tokenizer.convert_tokens_to_ids("Ċ")
    checkpoint.load(dict(model.named_parameters()), "shipped checkpoint")  # names and shapes agree


def test_the_shipped_checkpoint_has_at_most_8_megabytes() -> None:
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) <= 8_000_000


def test_the_shipped_log_reports_the_accuracy() -> None:
    log = (DEMO_FOLDER / "train.log").read_text()
    assert f"seed {train.SEED}" in log
    shares = [float(share) for share in re.findall(r"= ([\d.]+)%'", log.splitlines()[-1])]
    assert len(shares) == 3
    assert min(shares) >= 95


def test_targets_are_the_captions_and_answers_of_the_scene() -> None:
    tokenizer = make_processor().tokenizer
    write = Writer(tokenizer, captions=0.5, questions=3, seed=0)
    for seed in range(20):
        scene = scenes.sample(seed)
        ids, targets = write(scene)
        assert len(ids) == len(targets)
        assert ids[0] == BOS
        assert all(target in (token, IGNORE) for token, target in zip(ids, targets, strict=True))
        assert tokenizer.decode(targets[-1]) == "\n"
        counted = tokenizer.decode([t for t in targets if t != IGNORE])
        answers = {answer for _, answer in scene.questions + scene.chat}
        assert scene.caption in counted or any(answer in counted for answer in answers)
