"""Drops page numbers, running headers, sheet numbers and blots: what belongs to the pages of a book, not to its text.

    clean_pages(text)     the paragraphs of a scan, a PDF's text layer or a plain text

Page numbers are numbers that grow by one per page, running headers are lines that recur at page edges. Without form feeds or
such numbers nothing shows that a text has pages: then no line of it is dropped.
"""

import itertools
import re
from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rapidfuzz import fuzz

from prep.debris import drop_debris
from prep.front_matter import drop_edition, drop_front_matter, drop_notice, letters_of
from prep.paragraphs import BLANK, BREAK, DASHES, PAGE, PAGE_END, breaks_off, count_words, full_width, join_lines
from prep.typography import clean_characters, to_convention

# What editions leave in plain text: "[Illustration: le bac]", "le bac[12]", "_Le Temps_", "**Le Temps**".
_ILLUSTRATION = re.compile(
    r"\[(?:Illustration\b|(?:Image|Gravure|Vignette) ?:)(?:[^\[\]\f]|\[[^\[\]\f]*\]){0,600}\]", re.I
)
_NOTE = re.compile(r"\[(?:(?:Foot)?note \w{1,3}|\d{1,3}) ?:(?!\d)(?:[^\[\]\f]|\[[^\[\]\f]*\]){0,3000}\]", re.I)
_TAG = re.compile(r"</?(?:i|b|u|em|strong|small|sup|span|center)>", re.I)
_BRACKETED = re.compile(r"\[(?<=[^\n]\[)\^?(\d{1,3})\](?!\w)")
_PAGE_IN_TEXT = re.compile(r"\[(?:Pg|Page|p\.) ?\d{1,4}\]|\{\d{1,4}\}")
_LABEL = r"[(\[]\^?(\d{1,3}|\*{1,3}|[a-z])[)\]]:?"
_LISTED = re.compile(r": [(\[][1a][)\]] ")  # what follows in this paragraph is a list, not calls
_CALL = re.compile(rf"(?:(?<=[\w.,;!?»*=\"']) ?|(?<=:)){_LABEL}(?!\w)")  # after ": " a list begins
_LABELLED = re.compile(rf"{_LABEL} ?\S")
_ITALICS = re.compile(r"_(?<!\w_)(?=[^\s_])([^_\n]{1,300}?)(?<=\S)_(?![\w_])")
_OPEN_ITALICS = re.compile(r"^_(?=[^\W_])|(?<=[^\W_])_$|(?<=[.,;:!?»])_$", re.M)  # of several paragraphs
_EMPHASIS = re.compile(r"(?<![\w*=])(\*{1,3}|=)(?=[\w«\"'—])([^*=\n]{1,300}?)(?<=[\w.,;:!?»\"'])\1(?![\w*=])")
_UNPAIRED = re.compile(r"(?<![\w*=])[*=]+(?=\w)")


class Cleaned(NamedTuple):
    """A book's paragraphs in the project's typographic convention, and the lines dropped, by kind."""

    paragraphs: list[str]
    counts: dict[str, int]


def clean_pages(text: str, keep_debris: bool = False) -> Cleaned:
    """The paragraphs of a book's text, whose pages end in form feeds if it has any.

    A header with a number counts as `page_numbers` and as `running_headers`; `missing_text`, `hyphens_joined`,
    `hyphens_kept` and `page_breaks_joined` are places, the other counts are lines.
    """
    counts: Counter[str] = Counter()
    text, counts["illustrations"] = _ILLUSTRATION.subn("", _TAG.sub("", clean_characters(text)))
    text, counts["notes"] = _NOTE.subn("", text)
    text = text.replace("\f", f"\n{PAGE_END}\n")
    lines = [line.strip() for line in text.split("\n")]
    lines = drop_notice(drop_edition(lines, counts), counts)
    paged = Counter(counts)
    text_lines = drop_front_matter(lines, paged)
    has_pages = bool(chain := _chain(text_lines)) or PAGE_END in lines
    if has_pages:
        counts = paged
        lines, gaps = _drop_footnotes(*drop_headers_and_footers(text_lines, chain, counts), counts)
    else:
        lines, gaps = _nonblank(lines, set(), counts)
        gaps = _certain(lines, gaps)
    words = count_words(lines)
    if has_pages and not keep_debris:
        lines, gaps = drop_debris(lines, gaps, words, counts)
    return clean_paragraphs(join_lines(lines, gaps, words, counts), counts, gaps)


def clean_paragraphs(paragraphs: list[str], counts: Counter[str], gaps: Sequence[int] = (BREAK,)) -> Cleaned:
    """Paragraphs in the convention, without notes, their calls and the signs that editions leave in them."""
    if BREAK in gaps:  # else a note may have been joined to what follows it
        paragraphs = _without_notes(paragraphs, counts)
    text = without_marks("\n".join(paragraphs), counts)
    if PAGE not in gaps:  # in a scan such signs are blots
        text = _OPEN_ITALICS.sub("", text)
        plain, pairs = _EMPHASIS.subn(r"\2", text)
        if pairs > len(_UNPAIRED.findall(plain)):
            text, counts["emphasis"] = plain, pairs
        text = re.sub(r"^(?:#{1,6}|>) +(?=\S)", "", text, flags=re.M)  # Markdown's headings and quotations
    text = to_convention(text)
    return Cleaned([line for line in text.split("\n") if line], dict(sorted((+counts).items())))


def without_marks(text: str, counts: Counter[str]) -> str:
    """Without the calls of notes and the signs for italics that editions leave in plain text."""
    text, counts["bracketed_calls"] = _BRACKETED.subn("", text)
    text, counts["page_numbers_in_text"] = _PAGE_IN_TEXT.subn("", text)
    text, counts["italics"] = _ITALICS.subn(r"\1", text)
    return text


def _without_notes(paragraphs: list[str], counts: Counter[str]) -> list[str]:
    """Without the notes that a call such as "mot[12]" or "mot (1)" names, these calls, and the heading of notes at the end.

    A lone (1) far from its call may be the number of a letter or a chapter, so it stays.
    """
    calls: dict[str, list[int]] = {}  # label -> the paragraphs that have it
    kept: list[str] = []
    for labelled, group in itertools.groupby(paragraphs, key=lambda paragraph: bool(_label(paragraph))):
        block = list(group)
        called = [label for paragraph in block if labelled and calls.get(label := _label(paragraph))]
        near = len(called) > 1 or (called and (block[0][0] == "[" or calls[called[0]][-1] >= len(kept) - 2))
        for paragraph in block:
            if near and calls.get(label := _label(paragraph)):
                at = calls[label].pop()
                kept[at] = _without_call(kept[at], label)
            elif not re.match(r"↑ ?\S", paragraph):  # Wikisource's notes
                for label in _CALL.findall(paragraph) if not _LISTED.search(paragraph) else ():
                    calls.setdefault(label, []).append(len(kept))
                kept.append(paragraph)
    counts["notes"] += len(paragraphs) - len(kept)
    if counts["notes"]:
        kept = without_notes_heading(kept)
    return kept


def without_notes_heading(paragraphs: list[str]) -> list[str]:
    """Paragraphs of which the notes at the end have been taken, without the heading of these."""
    return paragraphs[:-1] if paragraphs and paragraphs[-1].strip(" .:").lower() in ("note", "notes") else paragraphs


def _label(line: str) -> str:
    """Of a line that begins as a note does, "(1) Voir ..."; otherwise empty."""
    return match[1] if (match := _LABELLED.match(line)) else ""


def _without_call(text: str, label: str) -> str:
    """Without the first call of this label, also at a line's beginning."""
    return re.sub(rf" ?[(\[]{re.escape(label)}[)\]](?!\w)", "", text, count=1).strip()


def _drop_footnotes(lines: list[str], gaps: list[int], counts: Counter[str]) -> tuple[list[str], list[int]]:
    """Without notes at a page's foot such as "(1) Voir ...", of which the page has the call "mot (1)", and without the call."""
    kept = list(lines)
    starts = [i for i, gap in enumerate(gaps) if gap == PAGE or not i]
    for start, end in pairwise([*starts, len(lines)]):
        calls: dict[str, int] = {}  # label -> its line
        for i in (i for i in range(start, end) if "(" in lines[i] or "[" in lines[i]):
            label = _label(lines[i])
            if label and label in calls:
                at = calls.pop(label)
                kept[at] = _without_call(kept[at], label)
                counts["notes"] += 1
                kept[i:end] = [""] * (end - i)
            elif kept[i]:
                calls.update(dict.fromkeys([*_CALL.findall(lines[i]), label], i))
    return [line for line in kept if line], [gap for line, gap in zip(kept, gaps, strict=True) if line]


# --- page numbers ---------------------------------------------------------------------------------------------------

# A number alone in its line, with or without ornament; a number with a few words before or after it.
_NUMBER = re.compile(
    r"[^\w\n]{0,4}(?:[Pp](?:age|ag?|g)?[.:]? ?)?(?:(\d{1,4})|([ivxlc]{1,7}|[IVXLC]{1,7}))(?: ?(?:/|sur|de|of) ?\d{1,4})?[^\w\n]{0,4}"
)
_HEADED = re.compile(r"\W{0,3}(?:(\d{1,4})\b\W{1,4}(.{3,60})|(.{3,60}?)\W{1,4}\b(\d{1,4})\W{0,3})")
# What `_HEADED` has at an end of the line, found faster.
_FIRST_FIGURE, _LAST_FIGURE = re.compile(r"\W{0,3}\d"), re.compile(r"\d\W{0,3}$")
_DASHED = re.compile(
    r"^[-–—_*•·.~ ]*[-–—][-–—_*•·.~ ]*[\dlIOoSB]{1,4}[-–—_*•·.~ ]*[-–—][-–—_*•·.~ ]*$"
    r"|^[\[(] ?\d{1,4} ?[\])]$|^p\. ?\d{1,4}$"
)
_FIGURE = re.compile(r"(?<!\w)\d{1,4}(?!\w)")
_ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}
PAGE_SIZE = (200, 12_000)  # characters
FAR_APART = 12  # pages between lines that recur as the heading of several parts, "Chapitre premier", not as a header


class _Number(NamedTuple):
    line: int
    value: int


def _roman(numeral: str) -> int:
    values = [_ROMAN[letter] for letter in numeral.lower()]
    return sum(-v if v < after else v for v, after in zip(values, [*values[1:], 0], strict=True))


def _numbers(lines: list[str]) -> list[_Number]:
    """Lines that may hold a page number: alone, or beside words that recur with other numbers."""
    found = []
    headed: dict[str, list[_Number]] = {}
    for index, line in enumerate(lines):
        if len(line) <= 20 and (match := _NUMBER.fullmatch(line)):
            found.append(_Number(index, int(match[1]) if match[1] else _roman(match[2])))
        elif (
            0 < len(line) <= 70
            and (
                line[-2:].strip(".—–-]) ").isdigit()
                if line[0].isalpha()
                else _FIRST_FIGURE.match(line) or _LAST_FIGURE.search(line[-4:])
            )
            and (match := _HEADED.fullmatch(line))
        ):
            headed.setdefault(letters_of(line), []).append(_Number(index, int(match[1] or match[4])))
    for key in _recurring({key: len(numbers) for key, numbers in headed.items()}):
        found += headed[key]
    return sorted(found)


def _recurring(times: dict[str, int]) -> set[str]:
    """The keys that occur three times or more, and those misread from them."""
    often = {key for key, n in times.items() if n >= 3 and len(key) >= 3}
    return often | {
        key
        for key in times.keys() - often
        if any(abs(len(key) - len(other)) <= 4 and fuzz.ratio(key, other) >= 80 for other in often)
    }


def _chain(lines: list[str]) -> dict[int, int]:
    """Page numbers by line: numbers that grow by one for about as many lines as the book has to a page.

    The numbers of chapters, letters and stanzas grow too, but hardly ever within a sentence, or by a page's length.
    """
    numbers = _numbers(lines)
    paces = sorted(
        (b.line - a.line) / (b.value - a.value)
        for i, a in enumerate(numbers)
        for b in numbers[i + 1 : i + 4]
        if 0 < b.value - a.value <= 2 and b.line - a.line >= 4
    )
    if not paces:
        return {}
    pace = paces[len(paces) // 2]
    places = list(itertools.accumulate(map(len, lines)))
    full = 0.6 * full_width(lines)
    best = [1] * len(numbers)  # the length of the longest chain that ends here
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
        inside = sum(_within_sentence(lines, numbers[j].line, full) for j in path)
        first, last = numbers[path[-1]], numbers[path[0]]
        page = (places[last.line] - places[first.line]) / (last.value - first.value)
        between = slice(path[-1], path[0] + 1)
        # Not inside the pages of another chain, either.
        if inside >= max(2, 0.15 * len(path)) and PAGE_SIZE[0] <= page <= PAGE_SIZE[1] and not any(taken[between]):
            taken[between] = [True] * len(taken[between])
            kept += [numbers[j] for j in path]
    return dict(sorted(kept))


def _next(lines: list[str], index: int, step: int) -> int | None:
    """The nearest line in direction `step` that is not blank."""
    return next((i for i in range(index + step, len(lines) if step > 0 else -1, step) if lines[i]), None)


def _within_sentence(lines: list[str], index: int, full: float) -> bool:
    """Whether a sentence continues across this line (the line before, of `full` width, breaks off), or a page ends at it."""
    before, after = _next(lines, index, -1), _next(lines, index, 1)
    if before is None or after is None:
        return False
    continued = breaks_off(lines[before]) and len(lines[before]) >= full
    return PAGE_END in (lines[before], lines[after]) or continued or lines[after][0].islower()


def _expected_numbers(lines: list[str], chain: dict[int, int]) -> set[int]:
    """Short lines at page edges that have the number which the pages around them give to their page.

    Only where form feeds divide the pages. They are headers too badly read to recur, and numbers with blots.
    """
    if len(chain) < 5:
        return set()
    short = 0.6 * full_width(lines)
    by_page = itertools.groupby(range(len(lines)), key=lambda i: lines[i] == PAGE_END)
    pages = [page for ended, group in by_page if not ended and (page := [i for i in group if lines[i]])]
    known = [next((chain[i] for i in page if i in chain), None) for page in pages]
    expected: list[set[int]] = [set() for _ in pages]
    for step in (1, -1):  # from the page before that has a number, from the page after
        value = None
        for n in range(len(pages))[::step]:
            value = known[n] or (value and value + step)
            if value:
                expected[n].add(value)
    return {
        i
        for page, values, value in zip(pages, expected, known, strict=True)
        if value is None
        for i in {*page[:2], *page[-2:]}
        if len(lines[i]) < short
        and (values & {*map(int, _FIGURE.findall(lines[i]))} or any(_misread(lines[i], value) for value in values))
    }


def _misread(line: str, value: int) -> bool:
    """Whether a line is `value` in small roman numerals, or a number of three digits or more with one digit wrong at most."""
    match = _NUMBER.fullmatch(line)
    if match and match[2]:
        return line.islower() and _roman(match[2]) == value
    digits, wanted = (match and match[1]) or "", str(value)
    return len(digits) == len(wanted) >= 3 and sum(a != b for a, b in zip(digits, wanted, strict=True)) <= 1


# --- headers and footers --------------------------------------------------------------------------------------------

_PROSE = re.compile(r"[a-zà-ÿœ]{4}.*?[^a-zà-ÿœ][a-zà-ÿœ]{4}")
_MISSING = re.compile(r" ?\[texte[ _]manquant\] ?", re.I)
_MARK = re.compile(  # no more than two digits, no word of three letters
    r"(?=.{1,12}$)(?!.*\w\d{2}|.*[^\W\d_]{3})(?:(?:[ITL][.,]? )?[\W\d_]*\d[\W\d_]*|.*[|_*+=<>#\\^{}©®§~].*)"
)


def drop_headers_and_footers(
    lines: list[str], chain: dict[int, int], counts: Counter[str]
) -> tuple[list[str], list[int]]:
    """The nonblank lines of the text without page numbers (`chain`), and what stood before each: PAGE, BLANK or 0."""
    expected = _expected_numbers(lines, chain)
    ends = [*chain, *(i for i, line in enumerate(lines) if line == PAGE_END)]
    marks = _page_marks(lines, chain, ends) - expected
    drop = {*ends, *expected, *marks}
    counts.update(page_numbers=len(expected), page_marks=len(marks))
    edges = {i for i in (0, len(lines) - 1) if lines[i]} | chain.keys()
    text = [i for i, line in enumerate(lines) if line and line != PAGE_END]

    def beside(i: int) -> list[int]:
        """The lines of text before and after this one."""
        before, after = bisect_left(text, i), bisect(text, i)
        return [*text[max(0, before - 1) : before], *text[after : after + 1]]

    edges.update(j for i in {*ends, *expected} for j in beside(i))
    certain = Counter(letters_of(lines[i]) for i in edges)
    blank = [i for i, line in enumerate(lines) if not line]  # a page may end here, or a paragraph
    edges.update(j for i in blank for j in beside(i))
    pages = [i for i in ends if lines[i] == PAGE_END] or sorted(chain)
    headers = _headers(sorted(edges), lines, certain, pages)
    for i in edges:
        line = lines[i]
        if i in chain:
            if line in headers:
                counts["running_headers"] += 1
            elif letters_of(line) and not _NUMBER.fullmatch(line):
                drop.remove(i)  # the number fits, but the words beside it do not recur: a sentence
                continue
            counts["page_numbers"] += 1
        elif line in headers:
            drop.add(i)
            counts["running_headers"] += 1
            counts["page_numbers"] += line[0].isdigit() or line[-1].isdigit()
        elif len(line) <= 12 and _DASHED.match(line):
            drop.add(i)
            counts["page_numbers"] += 1
    below = _below_blots(lines, {*ends}, headers) - drop
    drop |= below
    counts["running_headers"] += len(below)
    first = min(chain, default=0)
    title = [i for i in range(first) if lines[i] and i not in drop]
    if len(title) <= 12 and any(lines[i] in headers for i in range(first)) and all(lines[i].isupper() for i in title):
        # Before the first numbered page: the title that recurs as a header, and a few lines in capitals.
        counts["title_page"] += len(title)
        drop.update(title)
    return _nonblank(lines, drop, counts)


def _below_blots(lines: list[str], ends: set[int], headers: set[str]) -> set[int]:
    """Headers in capitals that blots surround or part from the top of their page, after the first that has none."""
    first = next((i for i, line in enumerate(lines) if line in headers), len(lines))
    keys = {key for line in headers if line.isupper() and len(key := letters_of(line)) >= 6}
    found = set()
    for end in ends:
        for i in range(max(end, first) + 1, min(end + 20, len(lines))):
            if _PROSE.search(lines[i]) or i in ends:
                break
            capitals = "".join(filter(str.isupper, lines[i])).lower()
            if any(key in capitals and len(letters_of(lines[i])) <= len(key) + 8 for key in keys):
                below = _next(lines, i, 1)
                if below is None or not lines[below].isupper():  # else a volume's title
                    found.add(i)
                break
    return found


def _nonblank(lines: list[str], drop: set[int], counts: Counter[str]) -> tuple[list[str], list[int]]:
    """The lines that are neither blank nor in `drop`, without marks of missing text, and what was before each."""
    kept: list[str] = []
    gaps: list[int] = []
    gap = 0
    for i, line in enumerate(lines):
        if i in drop:
            gap = PAGE
            continue
        if "[" in line and _MISSING.search(line):
            counts["missing_text"] += 1
            if not (line := _MISSING.sub(" ", line).strip()):
                continue
        if line:
            kept.append(line)
            gaps.append(gap)
            gap = 0
        else:
            gap = gap or BLANK
    return kept, gaps


def _certain(lines: list[str], gaps: list[int]) -> list[int]:
    """Blank lines as breaks between paragraphs, unless they are between the lines of sentences too."""
    blank = [i for i, gap in enumerate(gaps) if gap == BLANK and i]
    within = sum(breaks_off(lines[i - 1]) and lines[i][0].islower() for i in blank)
    return gaps if within > 0.1 * len(blank) else [BREAK if gap == BLANK else gap for gap in gaps]


def _page_marks(lines: list[str], chain: dict[int, int], ends: list[int]) -> set[int]:
    """Sheet numbers and blots at the foot of pages: before a form feed or a page number."""
    found = set()
    for i in ends:
        above = i - 1
        while above >= 0 and above not in chain and (not lines[above] or _MARK.fullmatch(lines[above])):
            found.add(above)
            above -= 1
    return {i for i in found if lines[i]}


def _headers(edges: list[int], lines: list[str], certain: Counter[str], pages: list[int]) -> set[str]:
    """Lines that recur at page edges and hardly anywhere else.

    `edges` may be blank lines between paragraphs; `certain` counts the letters of lines at edges that are no others. Blots
    above a header hide the edge: lines in capitals, once a page on a tenth of the `pages` (where each ends), are one too.
    """
    groups: dict[str, list[int]] = {}
    for i in edges:
        line = lines[i]
        reply = line[:1] in DASHES and line[-1] not in DASHES and not (line.isupper() and _FIGURE.search(line))
        if len(line) <= 70 and not reply and len(key := letters_of(line)) >= 3:
            groups.setdefault(key, []).append(i)
    everywhere, ends = Counter(lines), [0, *pages, len(lines)]
    known: dict[str, int] = {}
    for key, group in groups.items():
        n, on = len(group), [bisect(pages, i) for i in group]
        figures = [int(match[0]) if (match := _FIGURE.search(lines[i])) else 0 for i in group]
        # In the lower half of pages it is a sheet's mark, not a heading.
        foot = sum(2 * i > ends[page] + ends[page + 1] for i, page in zip(group, on, strict=True)) >= 0.5 * n
        far_apart = n > 1 and not foot and min(after - before for before, after in pairwise(on)) > FAR_APART
        once = len({*on}) >= 0.9 * n
        title = once and sum(lines[i].isupper() for i in group) >= 0.6 * n
        numbered = sum(map(bool, figures)) >= 0.5 * n
        if n < 3:
            known[key] = n
        elif (_counts(figures, on) and not foot) or sum(
            everywhere[line] for line in {lines[i] for i in group}
        ) > 1.3 * n:
            continue
        elif not far_apart and (
            certain[key] >= max(3, 0.5 * n)
            or (numbered and title and certain[key] >= max(2, 0.4 * n))
            or (numbered and foot and once)
            or (title and n >= max(5, 0.1 * len(pages)))
        ):
            known[key] = n
        elif title or far_apart:
            known[key] = 2  # it may be misread from another, but does not prove itself
    return {lines[i] for key in _recurring(known) for i in groups[key]}


def _counts(figures: list[int], on: list[int]) -> bool:
    """Whether lines are numbered one by one over three pages or more each: chapters or letters."""
    steps = [(b - a, there - here) for (a, here), (b, there) in pairwise(zip(figures, on, strict=True)) if a and b]
    return sum(by == 1 and pages > 2 for by, pages in steps) > 0.5 * len(steps)
