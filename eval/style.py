"""Whose manner is it? Samples beside the novel, beside Gallica's held-out books and beside the base model's samples.

Pure functions over texts in the convention of the prepared ones; eval/README.md has the formulas and the pitfalls.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import pairwise_distances

from eval import prose

FREQUENT = 100  # words that Delta looks at: the most frequent ones carry manner, the others subject
# Of a text, for a Delta. In pieces of 900 words the demo's held-out pages are nearer to their novel (1.1 to 1.2) than to
# other authors (1.3 to 1.4); in pieces of 200 they are not (2.3 to 2.5, and 1.8 to 2.4): so few words are noise.
LEAST_WORDS = 900
NAME_TIMES = 3  # a name stands in the book so often
# A sentence's end; the full stop of an initial (K.) or of M. and MM. is none.
END = re.compile(r"(?:[!?…]|(?<!\b[A-ZÀ-Þ])(?<!\bMM)\.)(?: ?»)?(?=\s|$)")
INSIDE = re.compile(
    r"(?<=[^\W\d_][ '])[A-ZÀ-Þ][^\W\d_]*|(?<=, )[A-ZÀ-Þ][^\W\d_]*"
)  # a capital where no sentence begins
TITLES = frozenset({"M", "MM", "Mme", "Mmes", "Mlle", "Dr", "Monsieur", "Madame", "Mademoiselle"})


def delta(texts: Mapping[str, str], reference: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Burrows's Delta from each text to each text of the reference: {text: {reference: Delta}} (Burrows 2002).

    The mean absolute difference of z-scores of the FREQUENT most frequent words of the reference; means and standard
    deviations (n - 1) are over the texts of the reference, at least two. Words equally frequent in all of those are left out.
    """
    counter = CountVectorizer(analyzer=prose.words, max_features=FREQUENT)
    known = counter.fit_transform(reference.values()).toarray()
    sizes = [len(prose.words(text)) for text in reference.values()]
    frequencies = known / np.array(sizes)[:, None]
    mean, deviation = frequencies.mean(axis=0), frequencies.std(axis=0, ddof=1)
    told = deviation > 0
    found = counter.transform(texts.values()).toarray() / np.array(
        [[len(prose.words(text))] for text in texts.values()]
    )
    sides = [((part - mean) / np.where(told, deviation, 1))[:, told] for part in (found, frequencies)]
    distances = pairwise_distances(*sides, metric="manhattan") / told.sum()
    return {
        name: dict(zip(reference, map(float, row), strict=True)) for name, row in zip(texts, distances, strict=True)
    }


def dialogue(text: str) -> float:
    """Share of words in paragraphs that begin with a dash or a guillemet."""
    parts = [(len(part.split()), part.lstrip().startswith(("—", "«"))) for part in text.split("\n\n")]
    return sum(size for size, spoken in parts if spoken) / max(1, sum(size for size, _ in parts))


def sentence_lengths(text: str) -> list[int]:
    """Words of each whole sentence; a paragraph's end ends one too, the text's end does not."""
    lengths = []
    paragraphs = text.split("\n\n")
    for number, paragraph in enumerate(paragraphs):
        start = 0
        for match in END.finditer(paragraph):
            lengths.append(len(prose.words(paragraph[start : match.end()])))
            start = match.end()
        if number < len(paragraphs) - 1:
            lengths.append(len(prose.words(paragraph[start:])))
    return [length for length in lengths if length]


def names(book: str) -> frozenset[str]:
    """The book's names: capitalised inside sentences NAME_TIMES or more, and ten times as often as in small letters."""
    capital = Counter(INSIDE.findall(book))
    small = Counter(word for word in prose.WORD.findall(book) if word[0].islower())
    return frozenset(
        name
        for name, count in capital.items()
        if count >= NAME_TIMES and count > 10 * small[name.lower()] and name not in TITLES
    )


def name_frequency(text: str, known: frozenset[str]) -> float | None:
    """How many words in a thousand are names of the book; None when there are no words."""
    found = prose.WORD.findall(text)
    return 1000 * sum(word in known for word in found) / len(found) if found else None


def first_words(text: str, count: int) -> str:
    """The text up to its word number `count`."""
    ends = [match.end() for match in prose.WORD.finditer(text)]
    return text[: ends[count - 1]] if 0 < count <= len(ends) else text


def style(
    samples: Mapping[str, Sequence[str]], novel: str, heldout: str | None, gallica: Mapping[str, str], base: str
) -> dict[str, dict[str, Any]]:
    """The figures of each stage's samples, of the novel, of its held-out pages cut to the samples' size, and of Gallica.

    `delta` is to the novel, to Gallica (the mean over its works) and to the samples of `base`; None where a text or what it
    is compared with has less than LEAST_WORDS words.
    """
    known = names(novel)
    sides = {name: "\n\n".join(texts) for name, texts in samples.items()}
    size = max((len(prose.words(text)) for text in sides.values()), default=0)
    if heldout:
        sides["the novel, held out"] = first_words(heldout, size)
    sides["the novel"] = novel
    if gallica:
        sides["Gallica, held out"] = "\n\n".join(gallica.values())
    long = {name: text for name, text in sides.items() if len(prose.words(text)) >= LEAST_WORDS}

    # One key a text, whatever works are called: no title can be "novel" or "base".
    reference = {f"gallica {title}": text for title, text in gallica.items() if len(prose.words(text)) >= LEAST_WORDS}
    works = list(reference)
    reference |= {"novel": novel} if "the novel" in long else {}
    reference |= {"base": sides[base]} if base in long else {}
    measured = delta(long, reference) if len(reference) > 1 else {}

    result = {}
    for name, text in sides.items():
        lengths = sentence_lengths(text)
        found = measured.get(name)
        result[name] = {
            "words": len(prose.words(text)),
            "dialogue": dialogue(text),
            "sentence_words": [float(value) for value in np.quantile(lengths, [0.1, 0.5, 0.9])] if lengths else None,
            "names": name_frequency(text, known),
            "delta": {
                "novel": found.get("novel"),
                "gallica": float(np.mean([found[work] for work in works])) if works else None,
                "base": found.get("base"),
            }
            if found
            else None,
        }
    return result
