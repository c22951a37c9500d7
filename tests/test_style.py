"""Style, on texts whose figures are counted by hand."""

import math

import pytest

from eval import metrics, tables


def test_delta_by_hand():
    """Two words, two known texts: frequencies of « le » 0.75 and 0.25, z-scores +-1/sqrt 2, those of « un » the reverse."""
    reference = {"a": "le le le un", "b": "un un un le"}
    found = metrics.delta({"a": "Le le le, un.", "middle": "un le", "far": "le le"}, reference)
    assert found["a"] == pytest.approx({"a": 0, "b": math.sqrt(2)})
    assert found["middle"] == pytest.approx({"a": math.sqrt(0.5), "b": math.sqrt(0.5)})
    # « le » 1.00 is 0.5 / sqrt 0.125 = sqrt 2 deviations above the mean; a is half that
    assert found["far"] == pytest.approx({"a": math.sqrt(0.5), "b": 3 * math.sqrt(0.5)})
    # Words equally frequent in all are left out.
    reference = {"a": "le le le un et et", "b": "un un un le et et"}
    assert metrics.delta({"x": "le le le un et et"}, reference)["x"] == pytest.approx({"a": 0, "b": math.sqrt(2)})


def test_the_hundred_most_frequent_words_count():
    """Ninety-nine words as frequent in both books, and one that tells them apart: seen only if all hundred are."""
    common = " ".join(chr(97 + i // 26) + chr(97 + i % 26) for i in range(99))
    reference = {"a": f"{common} {common} zz", "b": f"{common} {common} zy"}
    assert metrics.delta({"x": reference["a"]}, reference)["x"]["b"] > 0


def test_a_text_is_nearest_to_its_own_kind():
    old, new = "il vint et il dit que le soir tombait. " * 150, "tu sais, moi je crois qu'on part ! " * 150
    samples, others = {"base": [old], "2a": [new]}, {"tale": old, "too short": "Un mot."}
    result = metrics.style(samples, f"{new}\n\n{new}", new, others, "base")
    assert result["2a"]["delta"]["novel"] < 0.2 < result["2a"]["delta"]["gallica"]
    assert result["base"]["delta"]["gallica"] < 0.2 < result["base"]["delta"]["novel"]
    assert result["base"]["delta"]["base"] == pytest.approx(0)
    assert result["the novel, held out"]["delta"]["novel"] < 0.2
    assert result["the novel, held out"]["words"] <= max(result["2a"]["words"], result["base"]["words"])
    longer = metrics.style(samples, f"{new}\n\n{new}", new * 3, {"tale": old, "second": new}, "base")
    assert longer["the novel, held out"]["words"] == longer["base"]["words"]  # cut to the size of the largest samples
    table = tables.style({"style": result})
    assert [row[0] for row in table[1]][:2] == ["base", "2a"] and not tables.style({})[1]


def test_too_few_words_have_no_delta():
    result = metrics.style({"base": ["Un mot."], "2a": []}, "le " * 900, None, {"tale": "un " * 900}, "base")
    assert result["base"]["delta"] is None and result["2a"]["delta"] is None and result["2a"]["names"] is None
    assert result["the novel"]["delta"] == {"novel": 0, "gallica": pytest.approx(math.sqrt(2)), "base": None}


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Il vint et dit\n\n— Oui non oui\n\n« Non »", 7 / 11),
        ("Il vint.\n\n  — Oui.", 2 / 4),  # the dash is a word of its own here
        ("Il dit — oui — et vint.", 0),
        ("", 0),
    ],
)
def test_dialogue_is_a_share_of_words(text, share):
    assert metrics.dialogue(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        # « Puis rien » ends with its paragraph, « Et puis il » nowhere; an initial ends no sentence.
        ("K. vit M. Klamm. Il dit : « Venez ! » Puis rien\n\n— Oui. Non... Et puis il", [4, 3, 2, 1, 1]),
        ("Il dit : « Non. » MM. Durand et Klamm vinrent… Oui. Et", [3, 5, 1]),
        ("Il vint.\n\n...\n\nNon. Et", [2, 1]),  # dots alone are no sentence
        ("Vint-il 3.14 fois ? Et", [3]),
    ],
)
def test_sentences_are_whole(text, lengths):
    assert metrics.sentence_lengths(text) == lengths


def test_sentence_lengths_are_quantiles():
    text = "Un. Un deux. Un deux trois. Un deux trois quatre. Un deux trois quatre cinq. "
    result = metrics.style({"base": [text]}, "Un mot.", None, {}, "base")
    assert result["base"]["sentence_words"] == pytest.approx([1.4, 3, 4.6])


def test_names_are_what_is_capitalised_inside_sentences():
    book = (
        "Alors Barnabé vint. " * 3 + "Puis Olga rit. " * 2 + "Il vit Monsieur, vit Madame. " * 4
        + "Un Monsieur dit à M. Klamm, K. et Klamm, que Klamm dort. " * 2
        + "Il vint, Hans aussi. " * 3 + "Il dit l'Auberge. " * 3 + "Dans Le Monde. " * 3 + "le monde " * 9
    )  # fmt: skip
    assert metrics.names(book) == {"Barnabé", "Klamm", "Hans", "Auberge"}
    assert metrics.name_frequency("Klamm dit oui à Barnabé.", frozenset({"Klamm", "Barnabé"})) == pytest.approx(400)
    assert metrics.name_frequency("", frozenset()) is None
