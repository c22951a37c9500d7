"""Pairs of the author's passages and of what a stage wrote in their places, with a tiny random stage."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_curriculum import call_main

from eval import generation
from eval.tasks.texts import once
from prep import pairs
from prep.common import sha256

OUT, PART = Path("data/2d.jsonl"), Path("data/2d.part.json")


@pytest.fixture
def novel(place: Path) -> Path:
    Path("data/2c.manifest.json").write_text('{"tokenizer": {"path": "models/base", "sha256": "0"}}')
    return place


def draw(*arguments: str) -> list[dict[str, str]]:
    """Run prep/pairs.py as from the command line; the pairs."""
    sizes = ["--pairs", "6", "--prompt-words", "12", "--words", "8", "--device", "cpu"]
    call_main(pairs, *sizes, *arguments)
    return [json.loads(line) for line in OUT.read_text(encoding="utf-8").splitlines()]


def test_a_pair_is_the_author_and_the_stage_after_the_same_lines(novel: Path) -> None:
    drawn, texts = draw(), once(Path("data/2c.jsonl"))
    assert len({pair["prompt"] for pair in drawn}) == 6
    for pair in drawn:
        assert any(pair["prompt"] + pair["chosen"] in text for text in texts)
        assert pair["rejected"] != pair["chosen"]
        assert (
            pair["rejected"].startswith(" ") and len(pair["rejected"].split(" ")) <= len(pair["chosen"].split(" ")) == 9
        )
    manifest = json.loads(OUT.with_suffix(".manifest.json").read_text())
    assert manifest["train"] == {"rows": 6, "sha256": sha256(OUT)} and manifest["stage"]["name"] == "2c"


def test_killed_and_resumed_it_writes_the_same_bytes(novel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw()
    undisturbed = {path: path.read_bytes() for path in (OUT, OUT.with_suffix(".manifest.json"))}

    def interrupt() -> None:
        while not PART.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command in the background ignores it
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        draw()
    begun = json.loads(PART.read_text())["pairs"]
    assert 0 < len(begun) < 6
    capsys.readouterr()
    assert draw()[: len(begun)] == begun and f"/{6 - len(begun)} " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in undisturbed} == undisturbed and not PART.exists()
    assert draw("--seed", "43") != begun


def test_of_several_draws_the_worst_is_taken(novel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, loop = " Il vint. Puis il s'en alla vers le village.", " il vint il vint il vint il vint il vint"
    words = [" Il zorbla. Puis il s'en fut vers le vlage.", " Il vint et puis il s'en alla vers le"]
    assert pairs.failing(good) < min(map(pairs.failing, words)) and max([good, loop, *words], key=pairs.failing) == loop

    real, drawn = generation.draw, []

    def recorded(*all: Any, **more: Any) -> list[Any]:
        drawn.append(real(*all, **more))
        return drawn[-1]

    monkeypatch.setattr(generation, "draw", recorded)
    for pair, samples in zip(draw("--candidates", "3"), drawn, strict=True):
        sides = [pairs.side(sample.text.lstrip().split(" ")[:8]) for sample in samples]
        assert len(sides) == 3 and pair["rejected"] == max(sides, key=pairs.failing)
