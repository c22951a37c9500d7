"""False alarms of the verdicts, on texts made by hand."""

import random

from bench import calibrate_verdicts as calibration

FRENCH = "maison neige porte lampe table homme femme enfant village route matin soir main voix pain chien"


def novel(seed: int, words: int = 900) -> str:
    """French words in no order: no two runs of four are alike, but by chance."""
    draw = random.Random(seed)
    return " ".join(draw.choice(FRENCH.split()) + ("." if i % 9 == 8 else "") for i in range(words))


def measured(novels: dict[str, str], **authors: str) -> dict:
    return calibration.measured(novels, authors, 10, seed=0)


def test_novels_that_repeat_nothing_raise_no_alarm() -> None:
    result = measured({"a": novel(1), "b": novel(2), "c": novel(3)}, a="X", b="X", c="Y")
    assert result["reports"] == 60 and not +result["alarms"]
    inside, outside = result["shared"].values()
    assert 0 < max(inside) < 12 and len(inside) == 26  # of 10 words, in three tenths of 900
    assert len(outside) == 2 * 89  # a against b, and b against a; c has no fellow


def test_each_alarm_is_counted() -> None:
    """A novel that says one thing for ever, but for its held-out tenth, and a page that stands twice."""
    quiet, middle, page = novel(4, 400), novel(5, 100), " ".join(novel(5, 100).split()[40:70])
    looping = f"{'dormir ' * 400}{middle} {'dormir ' * 400}"
    strange = " ".join(["xqzt wrfg", *(["bvnk tplm"] * 199)]) + f" {middle} " + "xqzt bvnk " * 200
    alarms = measured({"l": looping, "s": strange})["alarms"]
    assert alarms["looping"] == 40 and alarms["not_french"] == 20
    assert measured({"n": f"{quiet} {middle} " + "neige\n\n12\n\nporte " * 200})["alarms"]["artefacts"] > 0
    found = measured({"t": f"{quiet} {middle} {quiet} {page}"})
    assert max(found["shared"][calibration.INSIDE]) >= 10
    assert "| copies " in calibration.tables(found, 1, 10)
