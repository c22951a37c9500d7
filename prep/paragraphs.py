"""Joins the lines of a printed book into paragraphs, and the words cut at line ends.

    join_lines(lines, gaps, words, counts)     ["Il s'assit et lui dit qu'il viendrait lui-", "même."] -> one paragraph

A line is followed by another of its paragraph if it is full: the next line's first word would not have fitted into it.
Line widths and hyphens are judged by the book's own lines and words.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

PAGE_END = "\x00"  # a form feed between lines; typography.clean_characters leaves no such character
# What was between a line and the one before it (0: nothing): the end of a page; a blank line, which may be a page's end
# too; a blank line in a text without pages, which always ends a paragraph.
PAGE, BLANK, BREAK = 1, 2, 3
DASHES = "—–-"

_FULL = 0.06  # paragraphs whose last line happens to look full, for each whose does not: measured on forty novels
_REPLIES = 30  # replies (a dash and a capital) assumed after short lines, even where a book has none
_BREAKING = ",—–"
_CONTINUING = ";:!?,.)"  # no paragraph begins with these
_UNKNOWN = 10_000  # no line was refused a word yet


class _Unit(NamedTuple):
    """Lines that certainly belong to one paragraph, and the limits that they set to its width."""

    first: int
    last: int
    longest: int  # the width is at least this: the longest line
    refused: int  # and less than this: the shortest line plus the word that did not fit into it


def full_width(lines: list[str]) -> int:
    """The length of a full line: nine in ten are no longer."""
    lengths = sorted(map(len, lines))[lines.count("") + lines.count(PAGE_END) :]
    return lengths[len(lengths) * 9 // 10] if lengths else 0


def breaks_off(line: str) -> bool:
    """Whether a line ends without any mark that ends a sentence: in a word, a comma, a dash, an initial ("M.")."""
    last = line[-1]
    return last.isalnum() or last in _BREAKING or (last == "." and line[-2:-1].isupper() and not line[-3:-2].isalnum())


def join_lines(lines: list[str], gaps: list[int], words: Counter[str], counts: Counter[str]) -> list[str]:
    """Paragraphs of lines; `gaps` says what was before each, `words` is `count_words` of them.

    Counts `page_breaks_joined` and hyphens.

    Widths differ between books and sometimes between paragraphs, so they are measured where the paragraph is certain:
    at a line that ends within a word or before a small letter. What the width leaves open is decided by how often lines
    with this ending and this beginning divide paragraphs where the width is clear.
    """
    if not lines:
        return []
    refused = _refused(lines, gaps)
    between = gaps.count(BLANK) * 20 > len(lines)  # blank lines are between paragraphs, not only between pages
    divided = [gap if gap == BREAK or (gap == BLANK and between) else 0 for gap in gaps]
    joints, widths, bounds = _joints(lines, refused, divided), *_measures(lines, refused)
    units = _units(joints, widths, bounds, _UNKNOWN)
    longest = max(map(len, lines))
    if len(units) > 0.95 * len(lines) and longest > 120:  # wider than a page: every line is a paragraph
        return _join_words([lines[u.first : u.last + 1] for u in units], words, counts)
    wider, tolerance = _widths(units, longest)
    units = _units(joints, widths, bounds, wider[0] - tolerance)

    def ends(u: _Unit, v: _Unit) -> bool:
        """Whether a blank line or the width alone shows that `u` ends a paragraph."""
        least = max(u.longest, v.longest) - tolerance
        most = min(u.refused, v.refused, refused[u.last]) - 1
        return divided[v.first] > 0 or wider[max(0, least)] > most

    clear: Counter[tuple[str, str]] = Counter()
    unclear: Counter[tuple[str, str]] = Counter()
    pairs = [(_ending(lines[u.last]), _beginning(lines[v.first])) for u, v in itertools.pairwise(units)]
    for u, v, pair in zip(units, units[1:], pairs, strict=False):
        (clear if ends(u, v) else unclear)[pair] += 1
    current = units[0]
    firsts = [0]
    for v, pair in zip(units[1:], pairs, strict=True):
        seen = clear[pair] + (_REPLIES if pair[1] == "—A" and pair[0] not in "a," else 0)
        if ends(current, v) or _FULL * seen > 0.5 * unclear[pair]:
            firsts.append(v.first)
            current = v
        else:
            shortest = min(current.refused, v.refused, refused[current.last])
            current = _Unit(current.first, v.last, max(current.longest, v.longest), shortest)
    counts["page_breaks_joined"] = sum(map(bool, gaps)) - sum(bool(gaps[i]) for i in firsts)
    return _join_words([lines[a:b] for a, b in itertools.pairwise([*firsts, len(lines)])], words, counts)


def _refused(lines: list[str], gaps: list[int]) -> list[int]:
    """For each line but the last, its length together with the next line's first word."""
    words = [line.find(" ") if " " in line else len(line) for line in lines]
    refused = [len(a) + 1 + w - 2 * (a[-1] == "-") for a, w in zip(lines, words[1:], strict=False)]
    for i, line in enumerate(lines[1:]):
        if line[0] in DASHES and breaks_off(lines[i]):  # a dash within a sentence stays with its word
            refused[i] += max(0, line.find(" ", 2) - 1)
        if i and gaps[i] and lines[i - 1][-1] == "-":
            # The rest of a word cut at the page's end: the line was set for the whole word.
            refused[i] += len(lines[i - 1]) - lines[i - 1].rfind(" ") - 2
    return refused


def _ends_in_word(line: str) -> bool:
    return line[-1] == "-" and line[-2:-1].isalpha()


def _joints(lines: list[str], refused: list[int], divided: list[int]) -> list[float]:
    """For each line, a number that the book's narrowest width must not reach for the line to join the one before it.

    Infinite before a small letter: it certainly joins. Minus infinite where it cannot.
    """
    joints = [-math.inf]
    for (before, line), gap, width in zip(itertools.pairwise(lines), divided[1:], refused, strict=True):
        first = line[0]
        cut = _ends_in_word(before) and first.isalpha()
        if gap != BREAK and (
            cut or (first.islower() and (not gap or breaks_off(before))) or (not gap and first in _CONTINUING)
        ):
            joints.append(math.inf)
        else:
            joints.append(-math.inf if gap or first in DASHES or not breaks_off(before) else width)
    return joints


def _measures(lines: list[str], refused: list[int]) -> tuple[list[int], list[int]]:
    """What each line says of its paragraph's width: it is as wide at least, and narrower than that."""
    floor = 0.7 * full_width(lines)  # verse and holes in the scan say nothing about the width
    # A line that ends within a word is not measured, since some printers let it hang over.
    widths = [0 if _ends_in_word(line) else len(line) for line in lines]
    return widths, [width if floor < width < _UNKNOWN else _UNKNOWN for width in refused]


def _units(joints: list[float], widths: list[int], bounds: list[int], narrowest: int) -> list[_Unit]:
    """Join what certainly belongs together: before a small letter, or after a full line that breaks off."""
    firsts = [i for i, joint in enumerate(joints) if joint <= narrowest]
    return [
        _Unit(a, b - 1, max(widths[a:b]), min(bounds[a : b - 1], default=_UNKNOWN))
        for a, b in itertools.pairwise([*firsts, len(joints)])
    ]


def _widths(units: list[_Unit], longest: int) -> tuple[list[int], int]:
    """A table whose entry `n` is the book's narrowest paragraph width of at least `n`, and how far lines miss it.

    A scan has nearly as many widths as lines; a text wrapped by a program has a few, and then little else fits.
    """
    long = [unit for unit in units if unit.last - unit.first >= 3]
    exact = Counter(unit.longest for unit in long if unit.longest >= unit.refused - 1)  # no other width is possible
    if exact.total() < 10:
        return list(range(longest + 2)), 0
    table = [_UNKNOWN] * (longest + 2)
    for n in range(longest, -1, -1):
        table[n] = n if n in exact and exact[n] >= 0.02 * exact.total() else table[n + 1]
    misses = sorted(max(0, unit.longest - unit.refused + 1) for unit in long)
    return table, misses[len(misses) * 3 // 4]


def _ending(line: str) -> str:
    """How a line ends, as far as that tells whether a paragraph may end there."""
    mark = line[-1]
    if mark in '»")]' and len(line) > 1:
        mark = line[:-1].rstrip()[-1:] or mark
        return f"{mark if mark in '.!?' else 'a'}»"
    return "," if mark in ",;" else "a" if mark.isalnum() else mark


def _beginning(line: str) -> str:
    mark = line[0]
    if mark in DASHES:
        return "—a" if line[1:].lstrip()[:1].islower() else "—A"
    return "A" if mark.isupper() else "1" if mark.isdigit() else mark


# --- words cut at line ends -----------------------------------------------------------------------------------------

_LETTERS = r"[^\W\d_]+(?:-[^\W\d_]+)*"
_WORD = re.compile(_LETTERS)
_CUT = re.compile(rf"-\n(?<=[^\W\d_]-\n)({_LETTERS})")
_HEAD = re.compile(rf"{_LETTERS}$")
# What French joins by a hyphen, for words that the book does not have elsewhere.
_PRONOUNS = re.compile(r"je|tu|il|elle|on|[nv]ous|ils|elles|ce|moi|toi|lui|leur|l[ea]s?|y|en|là|ci|mêmes?")
_INVERTED = re.compile(  # verb-pronoun by their endings; tried on "avait il"
    r"\w+(?:[td] (?:il|elle|on)|nt (?:ils|elles)|(?:ai|ais|is|us|é) je|[sx] tu|ons (?:nous|l[ea]s?|lui|en|y)"
    r"|[ea]z (?:vous|nous|moi|l[ea]s?|lui|leur|en|y))"
)
_FIRST = re.compile(
    r"mi|ex|vice|très|peut|avant|arrière|après|là|ci|deux|trois|quatre|cinq|six|sept|huit|neuf|dix|vingt|trente"
    r"|quarante|cinquante|soixante|cent"
)
_PLACED = re.compile(
    r"(?:au|par|là|ci|en) (?:dess(?:us|ous)|dedans|dehors|delà|devant|derrière|haut|bas)"
    r"|(?:celui|celles?|ceux) (?:ci|là)|(?:moi|toi|soi|lui|elles?|[nv]ous|eux) mêmes?|demi .*"
)
_INNER = re.compile(r"à|de|en|sur|sous|et|la|le|les|aux?|du|des|bien")


def count_words(lines: Iterable[str]) -> Counter[str]:
    """How often each word is in lines, in small letters, with its inner hyphens. Faster than one `findall`."""
    text = "\n".join(lines).lower()
    for mark in ".,;:!?'()«»\"—":  # nearly all that stands beside words
        text = text.replace(mark, " ")
    found: Counter[str] = Counter()
    for token, times in Counter(text.split()).items():
        for word in [token] if token.isalpha() else _WORD.findall(token):
            found[word] += times
    return found


def hyphen_stays(head: str, tail: str, vocabulary: Counter[str]) -> bool:
    """Whether the hyphen between `head` (at a line's end) and `tail` (the next line's beginning) belongs to the word.

    `vocabulary` counts the book's words in small letters. It decides; where it has neither form, the places where
    French writes a hyphen do, and otherwise the word was only cut.
    """
    compound, solid = vocabulary[f"{head}-{tail}".lower()], vocabulary[f"{head}{tail}".lower()]
    if compound != solid:
        return compound > solid
    if tail[0].isupper():
        return not head.isupper()  # Saint-Firmin, but CHA-PITRE
    *before, last = head.lower().split("-")
    first, *after = tail.lower().split("-")
    if last == "t" or (first == "t" and after):  # va-t-il
        return True
    if (before and _INNER.fullmatch(last)) or (after and _INNER.fullmatch(first)):  # rez-de-chaussée, arc-en-ciel
        return True
    pair = f"{last} {first}"
    if _PLACED.fullmatch(pair) or (not after and _INVERTED.fullmatch(pair)):  # au-dessus, dit-il
        return True
    known = vocabulary[last] > 0 and vocabulary[first] > 0
    return known and bool(_PRONOUNS.fullmatch(first) or _FIRST.fullmatch(last))  # moi-même, peut-être, vingt-deux


def _join_words(paragraphs: list[list[str]], vocabulary: Counter[str], counts: Counter[str]) -> list[str]:
    """Each paragraph's lines as one line, cut words whole again. Counts `hyphens_joined`, `hyphens_kept`."""
    text = "\n\n".join("\n".join(paragraph) for paragraph in paragraphs)
    cuts = [(match, _HEAD.search(text, max(0, match.start() - 40), match.start())) for match in _CUT.finditer(text)]
    if cuts:
        for match, head in cuts:  # the halves are no words of the book
            vocabulary[match[1].lower()] -= 1
            vocabulary[head[0].lower() if head else ""] -= 1
        words = [(head[0] if head else "", match[1]) for match, head in cuts]
        forms = [(vocabulary[f"{a}-{b}".lower()], vocabulary[f"{a}{b}".lower()]) for a, b in words]
        compounds = sum(compound > solid for compound, solid in forms)
        uncut = compounds >= 5 and sum(solid > compound for compound, solid in forms) <= 0.1 * compounds
        parts, at = [], 0
        for match, head in cuts:
            elided = text[match.end() : match.end() + 1] == "'" and len(match[1]) <= 2  # hors-d'œuvre
            # Of a text that was wrapped at hyphens only, every hyphen stays: "garde-champêtre".
            stays = uncut or elided or (head is not None and hyphen_stays(head[0], match[1], vocabulary))
            counts["hyphens_kept" if stays else "hyphens_joined"] += 1
            parts += [text[at : match.start()], "-" * stays]
            at = match.end() - len(match[1])
        text = "".join([*parts, text[at:]])
        text = re.sub(r"-\n(?<=[\w']-\n)(?=\w)", "-", text)  # grand'-mère, a figure
    return [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]
