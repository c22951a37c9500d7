"""Which books of a library are French prose fiction that was read well: rules that judge a sample of the raw text.

They stand before the cleaning, which takes ten times longer, and look at ten stretches of 3,000 characters from all over
a book, where neither legal pages nor tables of contents stand. Each rule is one reason, under whose name the books that
it rejects lie in a folder of their own.

How fiction is told from law, botany, history, verse and drama: by eight figures that a person could count, each with a
weight (`WEIGHTS`) fitted by logistic regression to 263 labelled texts. `bench/fit_fiction_filter.py` fits and measures them.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter

SHORTEST = 4_000  # characters; below, it is a leaflet or a failed scan
KNOWN = 0.75  # the least share of words in a French lexicon: novels have 0.90 to 0.95, a third of it misread 0.6
STRETCHES, STRETCH = 10, 3_000  # characters
FICTION, SHORT_FICTION = (
    -1.0,
    -4.0,
)  # the least score; of a text below STRETCHES * STRETCH characters, whose figures scatter
WEIGHTS = {  # times the figure for 1,000 words; verse and talk: for 100 lines
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
_PAST = re.compile(
    r"\b(?:\w{2,}(?:aient|èrent|irent|urent|inrent)|fut|eut|fit|vit|dit|prit|mit|vint|tint|put|sut|voulut|était|avait"
    r"|allait|faisait|disait|\w{3,}(?:issait|llait|ndait|rdait|ntait|rtait|gnait|sait))\b"
)
_FIRST = re.compile(r"\b(?:je|j|me|m|moi|tu|te|t|toi|mon|ma|mes|ton|ta|tes|vous|votre|vos)\b")
_MARKS = re.compile("[!?]")
_PRESENT = re.compile(r"\b(?:est|sont|peut|doit|être|faut|ont)\b")
_NOMINAL = re.compile(r"\b(?:de|des|du|la|les|par)\b")
_YEAR = re.compile(r"(?<!\d)(1[4-9]\d\d|20\d\d)(?!\d)")


def stretches(text: str) -> list[str]:
    """Ten stretches, evenly from the inner nine tenths of a text; all of a short one."""
    if len(text) <= STRETCHES * STRETCH:
        return [text]
    first, last = len(text) // 20, len(text) * 19 // 20 - STRETCH
    return [text[at : at + STRETCH] for at in (first + (last - first) * i // (STRETCHES - 1) for i in range(STRETCHES))]


@functools.cache
def lexicon() -> frozenset[str]:
    """140,000 French word forms (pyspellchecker's, from film subtitles), in small letters."""
    from spellchecker import SpellChecker

    return frozenset(SpellChecker(language="fr").word_frequency.words())


def known_share(text: str) -> float:
    """The share of a sample's words that are French; words cut at a line's end are left out."""
    words = _WORD.findall(_CUT.sub(" ", "\n".join(stretches(text))).lower())
    known = lexicon()
    return sum(word in known for word in words) / max(1, len(words))


@functools.cache
def _identifier() -> Callable[[str], tuple[str, float]]:
    import py3langid

    return py3langid.classify


def french_share(text: str) -> float:
    """The share of stretches that the language identifier (py3langid, its model in its wheel) takes for French."""
    found = [_identifier()(" ".join(piece[:1000].split()))[0] for piece in stretches(text)[::2]]
    return found.count("fr") / len(found)


def figures(text: str) -> dict[str, float]:
    """What `WEIGHTS` weighs, of a sample of a raw text in lines."""
    sample = "\n".join(stretches(text))
    small = sample.lower()
    words = max(1, len(_WORD.findall(small)))
    lines = [line.strip() for line in sample.split("\n") if line.strip()] or [""]

    def rate(pattern: re.Pattern[str]) -> float:
        return 1000 * len(pattern.findall(small)) / words

    return {
        "past": rate(_PAST),
        "first": rate(_FIRST),
        "marks": rate(_MARKS),
        # Page numbers, headers and the dates of letters stand in short lines.
        "digits": 1000 * sum(sum(map(str.isdigit, line)) for line in lines if len(line) >= 40) / words,
        "verse": 100 * sum(line[:1].isupper() and len(line) < 60 for line in lines) / len(lines),
        "talk": 100 * sum(line[:1] in ("—", "–", "-", "«") for line in lines) / len(lines),
        "present": rate(_PRESENT),
        "nominal": rate(_NOMINAL),
    }


def fiction_score(text: str) -> float:
    """Above 0 rather prose fiction, below 0 rather not."""
    return BIAS + sum(WEIGHTS[name] * value for name, value in figures(text).items())


def year_of(date: str) -> int | None:
    """The first year in a catalogue's date, such as 1876 in `1876-????`."""
    match = _YEAR.search(date)
    return int(match[1]) if match else None


# --- the rules as steps of the pipeline ------------------------------------------------------------------------------


def opening(writer: Any, document: Document) -> dict[str, Any]:
    """What a rejected book's folder keeps: the fields, the figure that decided, and the first 4,000 characters."""
    return {"id": document.id, **document.metadata, "characters": len(document.text), "text": document.text[:4000]}


class Rule(BaseFilter):
    """A filter whose name is its reason: what it rejects lies in `<rejected>/<name>/<task>.jsonl.gz`."""

    type = "RULE"

    def __init__(self, rejected: Path):
        super().__init__(
            JsonlWriter(str(rejected / str(self.name)), "${rank}.jsonl.gz", compression="infer", adapter=opening)
        )


class WithIdentifier(Rule):
    """A book that nothing names can be neither cited nor told from another."""

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
    """The same after the cleaning: a book of tables and blots."""

    name = "too short when cleaned"


class InPeriod(Rule):
    """Published from year `first` to year `last`; without a year it is not known to be."""

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
        return doc.metadata["fiction"] >= (FICTION if len(doc.text) > STRETCHES * STRETCH else SHORT_FICTION)
