"""Selects French prose fiction that was read well: one class per rule, with its threshold, on a sample of the raw text.

    French(rejected)     a step of datatrove's pipeline; what it rejects is in <rejected>/not French/<task>.jsonl.gz

The rules run before the cleaning, which costs ten times more, on ten samples of 3,000 characters from all over the book.
Fiction is told from law, botany, history, verse and drama by eight figures that a person could count, weighted by a
logistic regression on 263 labelled texts (bench/fit_fiction_filter.py fits and measures them).
"""

import functools
import re
from pathlib import Path
from typing import Any

import py3langid
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter

SHORTEST = 4_000  # characters; below, it is a leaflet or a failed scan
KNOWN = 0.75  # the smallest share of words in a French lexicon: novels have 0.90 to 0.95, a third of it misread 0.6
SAMPLES, SAMPLE = 10, 3_000  # characters
FICTION = -1.0  # the smallest score
SHORT_FICTION = -4.0  # the same for a text below SAMPLES * SAMPLE characters, whose figures scatter
WEIGHTS = {  # times the figure per 1,000 words; verse and talk: per 100 lines
    "past": 0.09,  # a verb in the tenses of a narrative, simple past and imperfect
    "first": 0.02,  # I, you, and what is theirs
    "marks": 0.19,  # ! and ?
    "digits": -0.06,
    "verse": -0.03,  # short lines with a capital
    "talk": 0.33,  # lines that a dash or quotation mark opens
    "present": -0.2,  # is, are, can, must: the tense of a treatise
    "nominal": -0.03,  # of, the, by: its syntax
}
BIAS = 1.8

_WORD = re.compile(r"[^\W\d_]+")
_CUT = re.compile(r"[^\W\d_]*-\s*\n\s*[^\W\d_]*")
_RATES = {
    "past": re.compile(
        r"\b(?:\w{2,}(?:aient|èrent|irent|urent|inrent)|fut|eut|fit|vit|dit|prit|mit|vint|tint|put|sut|voulut|était|avait"
        r"|allait|faisait|disait|\w{3,}(?:issait|llait|ndait|rdait|ntait|rtait|gnait|sait))\b"
    ),
    "first": re.compile(r"\b(?:je|j|me|m|moi|tu|te|t|toi|mon|ma|mes|ton|ta|tes|vous|votre|vos)\b"),
    "marks": re.compile("[!?]"),
    "present": re.compile(r"\b(?:est|sont|peut|doit|être|faut|ont)\b"),
    "nominal": re.compile(r"\b(?:de|des|du|la|les|par)\b"),
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


def figures(text: str) -> dict[str, float]:
    """The figures that `WEIGHTS` weighs, in its order, of a sample of a raw text in lines."""
    sample = "\n".join(samples(text))
    small = sample.lower()
    words = max(1, len(_WORD.findall(small)))
    lines = [line.strip() for line in sample.split("\n") if line.strip()] or [""]
    found = {name: 1000 * len(pattern.findall(small)) / words for name, pattern in _RATES.items()} | {
        # Not in short lines: they hold page numbers, headers and the dates of letters.
        "digits": 1000 * sum(sum(map(str.isdigit, line)) for line in lines if len(line) >= 40) / words,
        "verse": 100 * sum(line[:1].isupper() and len(line) < 60 for line in lines) / len(lines),
        "talk": 100 * sum(line[:1] in ("—", "–", "-", "«") for line in lines) / len(lines),
    }
    return {name: found[name] for name in WEIGHTS}


def fiction_score(text: str) -> float:
    """Above 0 more likely prose fiction than not."""
    return BIAS + sum(WEIGHTS[name] * value for name, value in figures(text).items())


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
        doc.metadata["fiction"] = round(fiction_score(doc.text), 2)
        return doc.metadata["fiction"] >= (FICTION if len(doc.text) > SAMPLES * SAMPLE else SHORT_FICTION)
