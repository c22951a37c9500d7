"""Drops what is no text in a scan: ornaments, stamps, pictures and margins that were read as letters.

    drop_debris(lines, gaps, words, counts)     ["# 4 >", "LL LR RETES <", "— Parbleu ! |"] -> ["— Parbleu !"]

A line is judged by its words: those of the book itself and of a French lexicon count for it, other letters, figures and signs
against it. Headings, replies and lines of verse are words, so they stay.
"""

import re
from collections import Counter
from collections.abc import Callable

from prep.filters import lexicon
from prep.paragraphs import DASHES, breaks_off, count_words, full_width

_WORD = re.compile(r"[^\W\d_]+")
SCAN = 0.003  # of the lines, at least, are letters that make no word: below, no scanner's letters were read here
_SENTENCE = re.compile(r"[a-zà-ÿœ]{4,}.*?[a-zà-ÿœ]{4,}.*?[a-zà-ÿœ]{4,}")  # three words in small letters: no debris
_SIGNS = re.compile(r"[^\w\s.,;:!?…'’\"«»“”—–()-]|_")  # those that no sentence has
_BLOTS = re.compile(  # beside words; a lone figure after a sentence is a blot or calls a note
    r"(?:\s[|_~^<>=+#\\{}°•]+|(?<=[.!?…»])\s++\W{0,3}\d{1,2}\W{0,2})+$|^(?:[|_~^<>=+#\\{}°]+\s)+"
)
_BLOT, _DIGIT = frozenset("|_~^<>=+#\\{}°•"), re.compile(r"\d")
_HEAD, _TAIL = re.compile(r"(?<![^\W\d_])[^\W\d_]{2,}$"), re.compile(r"[a-zà-ÿœ]{2,}")
_NUMERAL = re.compile(r"\W*(?=[IVXLC])(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})\W*")
# "— ?...", and between sections
_MARKS = re.compile(r"[—–-]?[ .?!…]*(?:[.?!…]{2}|(?<=[—–-] )[?!])[ .?!…]*|(?:\* ?){3}")
_YEAR = re.compile(r"\W{0,2}1[5-9]\d\d\W{0,2}")
# May be a word of no lexicon: a name, dialect.
_LIKELY = re.compile(r"(?=.*[aeiouyà-ÿœ])(?!.*[b-df-hj-np-tv-xz]{4})[A-ZÀ-Ý]?[a-zà-ÿœ]{3,}")
# Words of one or two letters; a lexicon has most pairs of letters.
SHORT_WORDS = frozenset(
    re.findall(
        r"\S+",
        "a à y ô ah ai an as au bu ça ce çà da de dû du eh en es et eu fi fû ha hé ho if il je la là le lu ma me mû ne né ni nu"
        " oh on or os ou où pu qu sa se si su ta te tu un us va vu m mm mr l d j c n s t",
    )
)


def drop_debris(
    lines: list[str], gaps: list[int], words: Counter[str], counts: Counter[str]
) -> tuple[list[str], list[int]]:
    """The lines that are text, without blots beside them, and what stood before each; `lines` has no blank ones.

    `words`: how often each word is in the lines; those of dropped lines are taken off.
    A word that was cut at a line's end gets its hyphen back where the scan has lost it: "providen", "tielle".
    """
    width = full_width(lines)
    doubtful = {i for i, line in enumerate(lines) if not _SENTENCE.search(line)}
    short = _simple(count_words(lines[i] for i in doubtful))
    own = {w for w, n in _simple(words).items() if n - short[w] >= 2}
    own |= {w for w, n in short.items() if n >= 3 and len(w) >= 5}
    french = lexicon()

    def known(word: str) -> bool:
        return word in french or word in own

    found = {i for i in doubtful if _is_debris(lines[i], lines[i - 1] if i else "", width, known)}
    if sum(bool(_WORD.search(lines[i])) for i in found) < SCAN * len(lines):
        return lines, gaps  # a PDF's or a typist's text, whose lone figures are chapters
    counts["debris"] = len(found)
    words.subtract(count_words(lines[i] for i in found))
    kept: list[str] = []
    for i, line in enumerate(lines):
        if i in found:
            continue
        if line[-1] in _BLOT or line[0] in _BLOT or _DIGIT.search(line[-4:]):  # else there is none
            line = _BLOTS.sub("", line)
        tail = _TAIL.match(line)
        head = _HEAD.search(kept[-1], max(0, len(kept[-1]) - 40)) if tail and kept else None
        if tail and head and known((head[0] + tail[0]).lower()) and not (known(head[0].lower()) and known(tail[0])):
            kept[-1] += "-"
        kept.append(line)
    return kept, [gap for i, gap in enumerate(gaps) if i not in found]


def _simple(words: Counter[str]) -> Counter[str]:
    """Words joined by hyphens as so many words."""
    simple = words.copy()
    for word in words:
        if "-" in word:
            times = simple.pop(word)
            for part in word.split("-"):
                simple[part] += times
    return simple


def _is_debris(line: str, before: str, width: int, known: Callable[[str], bool]) -> bool:
    if _NUMERAL.fullmatch(line) or _MARKS.fullmatch(line):
        return False
    words = _WORD.findall(line)
    if not words:
        # A figure that is neither a year nor the end of the sentence of the line before.
        ends = line[-1] in ".;!?" and line[0].isdigit() and len(before) > 0.8 * width and breaks_off(before)
        return not (ends or _YEAR.fullmatch(line))
    head = _WORD.findall(before[-20:]) if words[0].islower() else []
    if head and (before[-1] == "-" or known((head[-1] + words[0]).lower())):  # the rest of a cut word
        return False
    marked = line[0] in DASHES + "«" or line[-1] in ".!?…,;:»"  # the line of a sentence
    long = [word for word in words if len(word) >= 3]
    good = sum(len(w) for w in long if known(w.lower()) or (marked and _LIKELY.fullmatch(w)))
    if good or (marked and all(w.lower() in SHORT_WORDS for w in words)):
        good += sum(len(w) for w in words if len(w) <= 2 and w.lower() in SHORT_WORDS)
    figures = sum(map(str.isdigit, line)) if not marked else 0
    return sum(map(len, words)) - good + figures + 2 * len(_SIGNS.findall(line)) > good
