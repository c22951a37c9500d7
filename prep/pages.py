"""From the lines of a printed book to its paragraphs.

A scan or a PDF gives lines, not paragraphs, and between them what belongs to the page and not to the work: page
numbers, running headers, marks of missing text, words cut at a line's end. `clean_pages` takes all that away. Nothing
here is a list of titles or of words: a book is its own evidence. Its page numbers are the numbers that grow by one a
page, its running headers the lines that come back at the edges of pages, its line width what the lines of its
sentences keep to, and its hyphens are judged by the words it uses elsewhere.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from rapidfuzz import fuzz

from prep.typography import clean_characters, to_convention


class Cleaned(NamedTuple):
    """The paragraphs of a book in the project's typographic convention, and what was taken away, by kind."""

    paragraphs: list[str]
    counts: dict[str, int]


def clean_pages(text: str) -> Cleaned:
    """Paragraphs of a paged text (a scan, a PDF's text layer or plain text with blank lines between paragraphs).

    Counts: `page_numbers`, `running_headers`, `missing_text` (lines taken away), `hyphens_joined`, `hyphens_kept`
    (words cut at a line's end), `page_breaks_joined` (paragraphs that ran across a page break).
    """
    counts: Counter[str] = Counter()
    lines = [line.strip() for line in clean_characters(text).replace("\f", "\n\n").split("\n")]
    lines, breaks = _drop_furniture(lines, counts)
    paragraphs = _paragraphs(lines, breaks, counts)
    return Cleaned(to_convention("\n".join(paragraphs)).split("\n") if paragraphs else [], dict(sorted(counts.items())))


# --- what belongs to the page ---------------------------------------------------------------------------------------

_MISSING = re.compile(r" ?\[texte[ _]manquant\] ?", re.I)
# A number alone in its line, with or without ornament; a number with a few words before or after it.
_NUMBER = re.compile(r"^[^\w\n]{0,4}(?:(\d{1,4})|([ivxlc]{1,7}|[IVXLC]{1,7}))[^\w\n]{0,4}$", re.M)
_HEADED = re.compile(r"^\W{0,3}(?:(\d{1,4})\b\W{1,4}(\D{3,60})|(\D{3,60}?)\W{1,4}\b(\d{1,4})\W{0,3})$", re.M)
_DASHED = re.compile(
    r"^[-–—_*•·.~ ]*[-–—][-–—_*•·.~ ]*[\dlIOoSB]{1,4}[-–—_*•·.~ ]*[-–—][-–—_*•·.~ ]*$|^[\[(] ?\d{1,4} ?[\])]$"
)
_ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}


class _Number(NamedTuple):
    line: int
    value: int
    words: str  # what stands beside the number in its line


def _roman(numeral: str) -> int:
    values = [_ROMAN[letter] for letter in numeral.lower()]
    return sum(-v if v < after else v for v, after in zip(values, [*values[1:], 0], strict=True))


def _numbers(lines: list[str], text: str) -> list[_Number]:
    """Lines that may hold a page number, in their order."""
    found = []
    starts: dict[int, int] = {}
    at = 0
    for index, line in enumerate(lines):
        starts[at] = index
        at += len(line) + 1
    for match in _NUMBER.finditer(text):
        found.append(_Number(starts[match.start()], int(match[1]) if match[1] else _roman(match[2]), ""))
    for match in _HEADED.finditer(text):
        found.append(_Number(starts[match.start()], int(match[1] or match[4]), (match[2] or match[3]).strip()))
    return sorted(found)


def _chain(numbers: list[_Number]) -> list[_Number]:
    """Those that grow as page numbers do: by one for about as many lines as the book has to a page."""
    paces = sorted(
        (b.line - a.line) / (b.value - a.value)
        for i, a in enumerate(numbers)
        for b in numbers[i + 1 : i + 4]
        if 0 < b.value - a.value <= 2 and b.line - a.line >= 4
    )
    if not paces:
        return []
    pace = paces[len(paces) // 2]
    best = [1.0] * len(numbers)  # the weight of the best chain that ends here
    link: list[int | None] = [None] * len(numbers)
    for j, b in enumerate(numbers):
        for i in range(j - 1, max(-1, j - 25), -1):
            a = numbers[i]
            pages = b.value - a.value
            if 0 < pages <= 12 and 0.25 * pace * pages < b.line - a.line < 1.8 * pace * pages and best[i] + 1 > best[j]:
                best[j], link[j] = best[i] + 1, i
    kept: list[_Number] = []
    taken = [False] * len(numbers)
    for end in sorted(range(len(numbers)), key=lambda j: -best[j]):
        path: list[int] = []
        step: int | None = end
        while step is not None and not taken[step]:
            path.append(step)
            step = link[step]
        if len(path) < 3:
            continue
        low, high = path[-1], path[0]
        if any(taken[low : high + 1]):
            continue  # another chain runs here already: these are numbers inside its pages
        taken[low : high + 1] = [True] * (high + 1 - low)
        kept += [numbers[j] for j in path]
    return sorted(kept)


def _key(line: str) -> str:
    """The letters of a line: what stays of a running header when its page number and its ornaments change."""
    return "".join(filter(str.isalpha, line)).upper()


def _drop_furniture(lines: list[str], counts: Counter[str]) -> tuple[list[str], list[bool]]:
    """The lines of the work, and for each whether a page or a block ended before it (blank line, furniture)."""
    text = "\n".join(lines)
    drop = [False] * len(lines)
    chained = _chain(_numbers(lines, text))
    for number in chained:
        drop[number.line] = True
    edges: list[int] = []  # first and last lines of pages
    for number in chained:
        edges += [number.line, *_neighbours(lines, number.line)]
    blank = [i for i, line in enumerate(lines) if not line]
    for i in blank:
        edges += _neighbours(lines, i)
    headers = _headers([lines[i] for i in sorted(set(edges))], lines)
    numbered = {number.line for number in chained}
    for i in set(edges):
        line = lines[i]
        if i in numbered:
            counts["page_numbers"] += 1
            if line in headers:
                counts["running_headers"] += 1
            elif _key(line) and not _NUMBER.match(line):
                drop[i] = False  # the number fits, the words beside it do not come back: a sentence
                counts["page_numbers"] -= 1
        elif line in headers:
            drop[i] = True
            counts["running_headers"] += 1
        elif len(line) <= 12 and _DASHED.match(line):
            drop[i] = True
            counts["page_numbers"] += 1
    kept: list[str] = []
    breaks: list[bool] = []
    pending = False
    for i, line in enumerate(lines):
        if not line or drop[i]:
            pending = True
        elif "[" in line and _MISSING.search(line):
            counts["missing_text"] += 1
            line = _MISSING.sub(" ", line).strip()
            if line:
                kept.append(line)
                breaks.append(pending)
                pending = False
        else:
            kept.append(line)
            breaks.append(pending)
            pending = False
    return kept, breaks


def _neighbours(lines: list[str], index: int) -> Iterable[int]:
    for step in (-1, 1):
        i = index + step
        while 0 <= i < len(lines) and not lines[i]:
            i += step
        if 0 <= i < len(lines):
            yield i


def _headers(edges: list[str], lines: list[str]) -> set[str]:
    """Lines at the edges of pages that come back there, and hardly anywhere else."""
    groups: dict[str, list[str]] = {}
    for line in edges:
        if len(line) <= 70 and (key := _key(line)) and len(key) >= 3:
            groups.setdefault(key, []).append(line)
    everywhere = Counter(lines)
    headers: set[str] = set()
    strong = [key for key, group in groups.items() if len(group) >= 3]
    for key in sorted(strong, key=lambda k: -len(groups[k])):
        members = groups[key]
        if sum(everywhere[line] for line in set(members)) <= 1.3 * len(members):
            headers.update(members)
    learned = {_key(line) for line in headers}
    for key, group in groups.items():
        if key not in learned and any(abs(len(key) - len(h)) <= 4 and fuzz.ratio(key, h) >= 80 for h in learned):
            headers.update(group)
    return headers


# --- paragraphs -----------------------------------------------------------------------------------------------------

_TERMINAL = '.!?»")]:'


def _paragraphs(lines: list[str], breaks: list[bool], counts: Counter[str]) -> list[str]:
    widths = sorted(map(len, lines))
    width = widths[int(len(widths) * 0.9)] if widths else 0
    vocabulary: Counter[str] = Counter()
    for line in lines:
        vocabulary.update(_WORD.findall(line.lower()))
    paragraphs: list[str] = []
    for i, line in enumerate(lines):
        previous = lines[i - 1] if i else ""
        if i and not _starts_paragraph(previous, line, breaks[i], width):
            counts["page_breaks_joined"] += breaks[i]
            paragraphs[-1] = _join(paragraphs[-1], line, vocabulary, counts)
        else:
            paragraphs.append(line)
    return paragraphs


def _starts_paragraph(previous: str, line: str, gap: bool, width: int) -> bool:
    end, start = previous[-1], line[0]
    if end == "-" and start.islower():
        return False
    if start in "—–" and end in _TERMINAL + ".":
        return True
    if start.islower():
        return False
    word = line.find(" ")
    fits = len(previous) + 1 + (word if word > 0 else len(line)) <= width * 0.85
    return fits


# --- hyphens --------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


def _join(head: str, tail: str, vocabulary: Counter[str], counts: Counter[str]) -> str:
    if head.endswith("-") and len(head) > 1 and head[-2].isalpha() and tail[0].isalpha():
        counts["hyphens_joined"] += 1
        return head[:-1] + tail
    return f"{head} {tail}"
