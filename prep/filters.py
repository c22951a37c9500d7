"""Selects French prose fiction that was read well: one class per rule, with its threshold, on a sample of the raw text.

    French(rejected)     a step of datatrove's pipeline; what it rejects is in <rejected>/not French/<task>.jsonl.gz

The rules run before the cleaning, which costs ten times more, on ten samples of 3,000 characters from all over the book.
Fiction is told from law, botany, memoirs, verse and drama by the rates of common words, a few figures, the layout of verse
and drama, and the words of the title: a multinomial logistic regression whose weights are in fiction.json
(bench/fit_fiction_filter.py fits and measures them).
"""

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import py3langid
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter

SHORTEST = 4_000  # characters; below, it is a leaflet or a failed scan
KNOWN = 0.75  # the smallest share of words in a French lexicon: novels have 0.90 to 0.95, a third of it misread 0.6
SAMPLES, SAMPLE = 10, 3_000  # characters
_WORD = re.compile(r"[^\W\d_]+")
_CUT = re.compile(r"[^\W\d_]*-\s*\n\s*[^\W\d_]*")
_PAST = re.compile(  # verbs in the tenses of a narrative, simple past and imperfect
    r"\b(?:\w{2,}(?:aient|èrent|irent|urent|inrent)|fut|eut|fit|vit|dit|prit|mit|vint|tint|put|sut|voulut|était|avait"
    r"|allait|faisait|disait|\w{3,}(?:issait|llait|ndait|rdait|ntait|rtait|gnait|sait))\b"
)
_SPEAKER = re.compile(r"\W{0,3}([A-ZÀ-Ý][A-ZÀ-Ý' -]{1,30})(?:[.,:]|$| [—–-])")
_TITLES = {
    "play": r"com[ée]die|trag[ée]die|\bdrame|vaudeville|op[ée]ra|proverbe|\bactes?\b|pastorale|farce",
    "verse": r"po[ée]s|po[eèë]me|chanson|\bvers\b|\bodes?\b|\bfables?|sonnet|saty?res?\b|[ée]l[ée]gies|hymnes",
    "treatise": r"trait[ée]|rapport|\bcours\b|manuel|\bessais?\b|discours|sermon|dictionnaire|catalogue|\bcode\b|\blois?\b"
    r"|notice|bulletin|annuaire|recherches|[ée]tudes?\b|recueil|th[èe]se|principes|[ée]l[ée]ments|description|r[ée]flexions"
    r"|critique|litt[ée]ra|philosoph|histoire (?:d[ue]s? |de la |de l'|de france)|voyages? (?:en|dans|au|aux|de|autour)\b",
    "memoirs": r"m[ée]moires|souvenirs|correspondance|journal|lettres (?:de|à|d')",
    "novel": r"\bromans?\b|nouvelles\b|\bcontes?\b|aventures|amours|r[ée]cits",
}
_YEAR = re.compile(r"(?<!\d)(1[4-9]\d\d|20\d\d)(?!\d)")


def samples(text: str) -> list[str]:
    """Ten samples, evenly from the inner nine tenths of a text; the whole of a short one."""
    if len(text) <= SAMPLES * SAMPLE:
        return [text]
    first, last = len(text) // 20, len(text) * 19 // 20 - SAMPLE
    return [text[at : at + SAMPLE] for at in (first + (last - first) * i // (SAMPLES - 1) for i in range(SAMPLES))]


@functools.cache
def lexicon() -> frozenset[str]:
    """140,000 French word forms in small letters (pyspellchecker's, from film subtitles)."""
    from spellchecker import SpellChecker

    return frozenset(SpellChecker(language="fr").word_frequency.words())


def known_share(text: str) -> float:
    """The share of a sample's words that are French; words cut at a line's end are left out."""
    words = _WORD.findall(_CUT.sub(" ", "\n".join(samples(text))).lower())
    return sum(word in lexicon() for word in words) / max(1, len(words))


def french_share(text: str) -> float:
    """The share of samples that py3langid takes for French."""
    found = [py3langid.classify(" ".join(sample[:1000].split()))[0] for sample in samples(text)[::2]]
    return found.count("fr") / len(found)


def not_french(text: str) -> bool:
    """Whether a text is certainly in another language: novels have 0.89 of their words in the lexicon, Spanish 0.4."""
    return len(text) > 500 and french_share(text) == 0 and known_share(text) < 0.6


def features(text: str, title: str, words: Sequence[str]) -> list[float]:
    """What the classifier weighs: the rates of `words`, figures of the sample, its layout, and kinds of book that the title names.

    Roots of rates, since a word's rate scatters with its size.
    """
    sample = "\n".join(samples(text))
    small = sample.lower()
    found = _WORD.findall(small)
    per_word = 1 / max(1, len(found))
    rates = Counter(found)
    lines = [line.strip() for line in sample.split("\n") if line.strip()] or ["."]
    per_line = 1 / len(lines)
    names = Counter(match[1] for match in map(_SPEAKER.match, lines) if match)
    speakers = [n for n in names.values() if n >= 3]
    # Verse begins with a capital after lines that end in mid-sentence.
    unfinished = sum(
        (a[-1].isalpha() or a[-1] in ",;") and b[0].isupper() and not b.isupper() for a, b in itertools.pairwise(lines)
    )
    layout = [
        len(_PAST.findall(small)) * per_word,
        (small.count("!") + small.count("?")) * per_word,
        sum(map(str.isdigit, "".join(line for line in lines if len(line) >= 40))) * per_word,  # not page numbers
        sum(line[0].isupper() and len(line) < 60 for line in lines) * per_line,
        sum(line[0] in "—–-«" for line in lines) * per_line,
        unfinished * per_line,
        sum(speakers) * per_line,
    ]
    named = [3.0 * bool(re.search(pattern, title, re.I)) for pattern in _TITLES.values()]
    return [
        *(math.sqrt(rates[word] * per_word) for word in words),
        *map(math.sqrt, layout),
        math.log1p(len(speakers)),
        *named,
    ]


@functools.cache
def classifier() -> tuple[list[str], np.ndarray, np.ndarray, float]:
    """Its words, weights [kinds, features] and biases [kinds], the first of fiction, and the smallest score of what is kept."""
    made = json.loads(Path(__file__).with_name("fiction.json").read_text(encoding="utf-8"))
    return made["words"], np.array(made["weights"]), np.array(made["bias"]), made["limit"]


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Of the first kind against all others together [...], from logits [..., kinds]."""
    return logits[..., 0] - np.logaddexp.reduce(logits[..., 1:], axis=-1)


def fiction_score(text: str, title: str = "") -> float:
    """Above 0 more likely prose fiction than not, where both are as frequent."""
    words, weights, bias, _ = classifier()
    return float(log_odds(weights @ features(text, title, words) + bias))


def year_of(date: str) -> int | None:
    """The first year in a catalogue's date, such as 1876 in `1876-????`."""
    return int(match[1]) if (match := _YEAR.search(date)) else None


# --- the rules as steps of the pipeline ------------------------------------------------------------------------------


def opening(writer: Any, document: Document) -> dict[str, Any]:
    """What is kept of a rejected book: its fields, the figure that decided, and the first 4,000 characters."""
    return {"id": document.id, **document.metadata, "characters": len(document.text), "text": document.text[:4000]}


class Rule(BaseFilter):
    """A filter whose name is its reason."""

    type = "RULE"

    def __init__(self, rejected: Path):
        super().__init__(JsonlWriter(str(rejected / str(self.name)), "${rank}.jsonl.gz", adapter=opening))


class Read(Rule):
    """Its encoding and format are known; `metadata["not read"]` says what is wrong."""

    name = "not read"

    def filter(self, doc: Document) -> bool:
        return "not read" not in doc.metadata


class WithIdentifier(Rule):
    name = "no identifier"

    def filter(self, doc: Document) -> bool:
        return bool(doc.id)


class WithText(Rule):
    name = "no text"

    def filter(self, doc: Document) -> bool:
        return bool(doc.text.strip())


class LongEnough(Rule):
    name = "too short"

    def filter(self, doc: Document) -> bool:
        return len(doc.text) >= SHORTEST


class LongEnoughWhenCleaned(LongEnough):
    name = "too short when cleaned"


class InPeriod(Rule):
    """Published from year `first` to year `last`; a book without a year is rejected."""

    name = "outside the period"

    def __init__(self, rejected: Path, first: int, last: int):
        super().__init__(rejected)
        self.first, self.last = first, last

    def filter(self, doc: Document) -> bool:
        year = year_of(doc.metadata["date"])
        return year is not None and self.first <= year <= self.last


class French(Rule):
    name = "not French"

    def filter(self, doc: Document) -> bool:
        doc.metadata["french"] = french_share(doc.text)
        return doc.metadata["french"] > 0.5


class Readable(Rule):
    name = "unreadable scan"

    def filter(self, doc: Document) -> bool:
        doc.metadata["known"] = round(known_share(doc.text), 3)
        return doc.metadata["known"] >= KNOWN


class Fiction(Rule):
    name = "not prose fiction"

    def filter(self, doc: Document) -> bool:
        doc.metadata["fiction"] = round(fiction_score(doc.text, doc.metadata["title"]), 2)
        return doc.metadata["fiction"] >= classifier()[3]
