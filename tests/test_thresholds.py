"""False alarms of the verdicts: on texts made by hand, and, where there is a corpus, as eval/README.md gives them."""

import random
import sys
from pathlib import Path

import pytest

from bench import calibrate_verdicts as thresholds
from eval import verdict
from prep.common import BadInput

ROOT = Path(__file__).parent.parent


def novel(seed: int, words: int = 900) -> str:
    """French words in no order: no two runs of four are alike, but by chance."""
    french = [
        "maison",
        "neige",
        "porte",
        "lampe",
        "table",
        "homme",
        "femme",
        "enfant",
        "village",
        "route",
        "matin",
        "soir",
        "main",
        "voix",
        "pain",
        "chien",
    ]
    draw = random.Random(seed)
    return " ".join(draw.choice(french) + ("." if i % 9 == 8 else "") for i in range(words))


def test_novels_that_repeat_nothing_raise_no_alarm() -> None:
    novels = {"a": novel(1), "b": novel(2), "c": novel(3)}
    result = thresholds.measured(novels, {"a": "X", "b": "X", "c": "Y"}, 10, seed=0)
    assert result["reports"] == 60 and not +result["alarms"]
    inside, outside = result["shared"].values()
    assert 0 < max(inside) < 12
    assert len(inside) == sum(len(thresholds.parts(text, 10)[1]) for text in novels.values())
    assert len(outside) == 2 * 89  # a against b, and b against a; c has no fellow


def test_each_alarm_is_counted() -> None:
    """A novel that says one thing for ever, but for its held-out tenth, and a page that stands twice."""
    quiet = novel(4, 400)
    middle = novel(5, 100)
    looping = f"{'dormir ' * 400}{middle} {'dormir ' * 400}"
    strange = " ".join(["xqzt wrfg", *(["bvnk tplm"] * 199)]) + f" {middle} " + "xqzt bvnk " * 200
    result = thresholds.measured({"l": looping, "s": strange}, {}, 10, seed=0)
    assert result["alarms"]["looping"] == 40 and result["alarms"]["not_french"] == 20
    noisy = f"{quiet} {middle} " + "neige\n\n12\n\nporte " * 200
    assert thresholds.measured({"n": noisy}, {}, 10, seed=0)["alarms"]["artefacts"] > 0
    page = " ".join(middle.split()[40:70])
    twice = f"{quiet} {middle} {quiet} {page}"
    found = thresholds.measured({"t": twice}, {}, 10, seed=0)
    assert max(found["shared"]["held-out pages with the rest of their novel"]) >= 10
    assert "copies" in thresholds.table(found, 1, 10) and str(verdict.COPY_WORDS) in thresholds.table(found, 1, 10)


def test_bad_input_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["thresholds.py", "--texts", str(tmp_path)])
    with pytest.raises(BadInput, match=r"no \.txt"):
        thresholds.main()
    (tmp_path / "short.txt").write_text("Un mot. " * 40, encoding="utf-8")
    with pytest.raises(BadInput, match="short is too short"):
        thresholds.main()
