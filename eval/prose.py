"""What a sample looks like without knowing the model: does it repeat itself, copy, stop early, speak French?

Pure functions over texts; eval/README.md has the formulas, and what each does not see.
"""

import functools
import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from spellchecker import SpellChecker

WORD = re.compile(r"[^\W\d_]+")  # letters only: « l'eau » is two words, as in the lexicon
LOOP_REPEATS = 3  # a passage three times in a row
LOOP_WORDS = 8  # that fills eight words or more: « non, non, non » is speech, not a loop
LONGEST_LOOP = 60  # words of a passage that may repeat: two long sentences
ARTEFACT = re.compile(
    r"^[^\w\n]*\d{1,4}[^\w\n]*$"  # a page number alone on its line
    r"|^(?=(?:.*[A-ZÀ-Þ]){6})[A-ZÀ-Þ0-9 '’.,-]{6,60}$",  # a running header: a line of capitals, nothing cried out
    re.MULTILINE,
)
ELIDED = frozenset({"aujourd", "jusqu", "lorsqu", "presqu", "puisqu", "quelqu", "quoiqu"})  # what WORD cuts off


def words(text: str) -> list[str]:
    """The words of a text, in lower case, in order."""
    return WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every run of n tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repetition(text: str, n: int) -> float | None:
    """rep-n: the share of a text's n-grams that it has already used; None when it has none (Welleck et al. 2020)."""
    grams = ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else None


def distinct(texts: Sequence[str], n: int) -> float | None:
    """distinct-n: different n-grams over all n-grams of all texts together (Li et al. 2016)."""
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def loops(text: str) -> bool:
    """Whether some passage of 1 to LONGEST_LOOP words follows upon itself LOOP_REPEATS times, over LOOP_WORDS words."""
    tokens = words(text)
    for length in range(1, min(LONGEST_LOOP, len(tokens) // 2) + 1):
        needed = max(LOOP_REPEATS, -(-LOOP_WORDS // length)) * length - length  # words equal to those `length` before
        run = 0
        for i in range(length, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - length] else 0
            if run >= needed:
                return True
    return False


@functools.cache
def french() -> SpellChecker:
    """The French lexicon of pyspellchecker, 140,000 forms from film subtitles and dictionaries."""
    return SpellChecker(language="fr", distance=1)


def foreign(text: str) -> float | None:
    """Share of words of three letters or more that are not French words; None when there are none."""
    tokens = [word.replace("œ", "oe") for word in words(text) if len(word) > 2]
    return sum(word not in french() and word not in ELIDED for word in tokens) / len(tokens) if tokens else None


def artefacts(text: str) -> int:
    """Lines that look like a page number or a running header."""
    return len(ARTEFACT.findall(text))


def pieces(text: str, length: int) -> list[str]:
    """The text in pieces of `length` words, signs and all; a shorter rest is left out."""
    starts = [match.start() for match in WORD.finditer(text)][::length]
    return [text[start:end] for start, end in itertools.pairwise(starts)]


class Passages:
    """A text in which the longest passage shared with another is found, word by word, case and signs left aside."""

    SEED = 3  # words: the shortest passage looked for

    def __init__(self, texts: Sequence[str]):
        self.tokens: list[str] = []
        self.starts: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for text in texts:
            self.append(text)
            self.tokens.append("")  # no passage crosses from one text into the next

    def append(self, text: str) -> None:
        """More of the last text, or the first of it: a passage may run over the seam."""
        seam = max(0, len(self.tokens) - self.SEED + 1)
        self.tokens += words(text)
        for i, gram in enumerate(ngrams(self.tokens[seam:], self.SEED), seam):
            if "" not in gram:
                self.starts[gram].append(i)

    def longest(self, text: str) -> dict[str, int]:
        """The longest run of words of `text` that stands here too: {words, start, end}, the last two in characters.

        Runs shorter than SEED words count as none: {0, 0, 0}.
        """
        found = list(WORD.finditer(text))
        tokens = [match.group().lower() for match in found]
        best, where = 0, 0
        for i, gram in enumerate(ngrams(tokens, self.SEED)):
            for place in self.starts.get(gram, ()):
                length = self.SEED
                most = min(len(tokens) - i, len(self.tokens) - place)
                while length < most and self.tokens[place + length] == tokens[i + length]:
                    length += 1
                if length > best:
                    best, where = length, i
        if not best:
            return {"words": 0, "start": 0, "end": 0}
        return {"words": best, "start": found[where].start(), "end": found[where + best - 1].end()}


def degeneration(samples: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The figures over a stage's samples (each with `text` and `ended`); means are over samples that have the figure."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    texts = [sample["text"] for sample in samples]
    return {
        **{f"rep_{n}": mean([repetition(text, n) for text in texts]) for n in (2, 3, 4)},
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "looping": mean([loops(text) for text in texts]),
        "ended_early": mean([sample["ended"] for sample in samples]),
        "not_french": mean([foreign(text) for text in texts]),
        "artefacts": mean([artefacts(text) for text in texts]),
    }
