"""From the lines of a printed book to its paragraphs.

A scan or a PDF gives lines, not paragraphs, and between them what belongs to the page and not to the work: page
numbers, running headers, marks of missing text, words cut at a line's end. `clean_pages` takes all that away. Nothing
here is a list of titles or of words: a book is its own evidence. Its page numbers are the numbers that grow by one a
page, its running headers the lines that come back at the edges of pages, its line width what the lines of its
sentences keep to, and its hyphens are judged by the words it uses elsewhere.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from rapidfuzz import fuzz

from prep.front_matter import PAGE_END, drop_matter
from prep.typography import clean_characters, to_convention


class Cleaned(NamedTuple):
    """The paragraphs of a book in the project's typographic convention, and what was taken away, by kind."""

    paragraphs: list[str]
    counts: dict[str, int]


def clean_pages(text: str) -> Cleaned:
    """Paragraphs of a paged text (a scan, a PDF's text layer or plain text with blank lines between paragraphs).

    Counts: `page_numbers`, `running_headers`, `page_marks` (sheet numbers, blots), `title_page`, `missing_text`,
    `legal_notice`, `library_stamps`, `catalogue`, `table_of_contents` (lines or marks taken away; a header with a
    number is both page number and header), `hyphens_joined`, `hyphens_kept` (words cut at a line's end), `page_breaks_joined` (places where a
    paragraph ran across a page break).
    """
    counts: Counter[str] = Counter()
    text = clean_characters(text).replace("\f", f"\n{PAGE_END}\n")
    lines = [line.strip() for line in text.split("\n")]
    lines, gaps = _drop_furniture(drop_matter(lines, counts), counts)
    paragraphs = _paragraphs(lines, gaps, counts)
    return Cleaned(to_convention("\n".join(paragraphs)).split("\n") if paragraphs else [], dict(sorted(counts.items())))


# --- what belongs to the page ---------------------------------------------------------------------------------------

_MISSING = re.compile(r" ?\[texte[ _]manquant\] ?", re.I)
# A number alone in its line, with or without ornament; a number with a few words before or after it.
_NUMBER = re.compile(r"[^\w\n]{0,4}(?:(\d{1,4})|([ivxlc]{1,7}|[IVXLC]{1,7}))[^\w\n]{0,4}")
_HEADED = re.compile(r"\W{0,3}(?:(\d{1,4})\b\W{1,4}(.{3,60})|(.{3,60}?)\W{1,4}\b(\d{1,4})\W{0,3})")
_DASHED = re.compile(
    r"^[-–—_*•·.~ ]*[-–—][-–—_*•·.~ ]*[\dlIOoSB]{1,4}[-–—_*•·.~ ]*[-–—][-–—_*•·.~ ]*$|^[\[(] ?\d{1,4} ?[\])]$"
)
_ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}


class _Number(NamedTuple):
    line: int
    value: int


def _roman(numeral: str) -> int:
    values = [_ROMAN[letter] for letter in numeral.lower()]
    return sum(-v if v < after else v for v, after in zip(values, [*values[1:], 0], strict=True))


def _numbers(lines: list[str]) -> list[_Number]:
    """Lines that may hold a page number, in their order: alone, or beside words that come back with other numbers."""
    found = []
    headed: dict[str, list[_Number]] = {}
    for index, line in enumerate(lines):
        if len(line) <= 15 and (match := _NUMBER.fullmatch(line)):
            found.append(_Number(index, int(match[1]) if match[1] else _roman(match[2])))
        elif (
            0 < len(line) <= 70
            and (not line[0].isalpha() or line[-2:].strip(".—–-]) ").isdigit())
            and (match := _HEADED.fullmatch(line))
        ):
            headed.setdefault(_key(line), []).append(_Number(index, int(match[1] or match[4])))
    for key in _recurring({key: len(numbers) for key, numbers in headed.items()}):
        found += headed[key]
    return sorted(found)


def _recurring(times: dict[str, int]) -> set[str]:
    """Of the keys of lines and how often each stands there: those that come back, and those misread from them."""
    often = {key for key, n in times.items() if n >= 3 and len(key) >= 3}
    return often | {
        key
        for key in times.keys() - often
        if any(abs(len(key) - len(other)) <= 4 and fuzz.ratio(key, other) >= 80 for other in often)
    }


def _chain(numbers: list[_Number], lines: list[str]) -> list[_Number]:
    """Those that grow as page numbers do: by one for about as many lines as the book has to a page.

    The numbers of chapters grow steadily too, but never stand in the middle of a sentence.
    """
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
        inside = sum(_inside_sentence(lines, numbers[j].line) for j in path)
        if inside < max(2, 0.15 * len(path)):
            continue
        low, high = path[-1], path[0]
        if any(taken[low : high + 1]):
            continue  # another chain runs here already: these are numbers inside its pages
        taken[low : high + 1] = [True] * (high + 1 - low)
        kept += [numbers[j] for j in path]
    return sorted(kept)


def _inside_sentence(lines: list[str], index: int) -> bool:
    """Whether a line stands where no paragraph can end, or at a page's edge."""
    before = index - 1
    while before >= 0 and not lines[before]:
        before -= 1
    after = index + 1
    while after < len(lines) and not lines[after]:
        after += 1
    if before < 0 or after == len(lines):
        return False
    return PAGE_END in (lines[before], lines[after]) or _breaks_off(lines[before]) or lines[after][0].islower()


def _key(line: str) -> str:
    """The letters of a line: what stays of a running header when its page number and its ornaments change."""
    return "".join(filter(str.isalpha, line)).upper()


_PAGE, _BLANK = 1, 2  # what stood between a line and the one before it; 0: nothing


def _drop_furniture(lines: list[str], counts: Counter[str]) -> tuple[list[str], list[int]]:
    """The lines of the work, and for each what stood before it: a page's end, a blank line, or nothing."""
    drop = [line == PAGE_END for line in lines]
    chained = _chain(_numbers(lines), lines)
    for number in chained:
        drop[number.line] = True
    for i in (own := _own_numbers(lines, chained)):
        drop[i] = True
        counts["page_numbers"] += 1
    marks = _page_marks(lines, chained) - own
    if marks:
        counts["page_marks"] = len(marks)
    for i in marks:
        drop[i] = True
    edges = [i for i in (0, len(lines) - 1) if lines[i]]  # first and last lines of pages
    for number in chained:
        edges += [number.line, *_neighbours(lines, number.line)]
    blank = [i for i, line in enumerate(lines) if not line or line == PAGE_END]
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
            elif _key(line) and not _NUMBER.fullmatch(line):
                drop[i] = False  # the number fits, the words beside it do not come back: a sentence
                counts["page_numbers"] -= 1
        elif line in headers:
            drop[i] = True
            counts["running_headers"] += 1
            counts["page_numbers"] += line[0].isdigit() or line[-1].isdigit()
        elif len(line) <= 12 and _DASHED.match(line):
            drop[i] = True
            counts["page_numbers"] += 1
    first = chained[0].line if chained else 0
    title = [i for i in range(first) if lines[i] and not drop[i]]
    if len(title) <= 12 and any(lines[i] in headers for i in range(first)) and all(lines[i].isupper() for i in title):
        # Before the first numbered page stand the book's title, which it repeats on its pages, and a few capitals.
        counts["title_page"] += len(title)
        for i in title:
            drop[i] = True
    kept: list[str] = []
    gaps: list[int] = []
    gap = 0
    for i, line in enumerate(lines):
        if drop[i]:
            gap = _PAGE
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
            gap = gap or _BLANK
    return kept, gaps


_FIGURE = re.compile(r"(?<!\w)\d{1,4}(?!\w)")


def _own_numbers(lines: list[str], chained: list[_Number]) -> set[int]:
    """Short lines at the edges of pages that form feeds divide, with the very number that the pages around say it has.

    They are running headers too badly read to come back, and numbers with blots, which no chain has. Of a figure that
    is alone in its line, and above 99, one digit may be misread.
    """
    at = {number.line: number.value for number in chained}
    if PAGE_END not in lines or len(at) < 5:
        return set()
    width = sorted(len(line) for line in lines if line and line != PAGE_END)
    short = 0.6 * width[len(width) * 9 // 10]
    pages: list[list[int]] = [[]]
    for i, line in enumerate(lines):
        if line == PAGE_END:
            pages += [[]] if pages[-1] else []
        elif line:
            pages[-1].append(i)
    known = [next((at[i] for i in page if i in at), None) for page in pages]
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
    """Whether a line is a figure of three digits or more, all but one of them those of `value`."""
    match = _NUMBER.fullmatch(line)
    digits, wanted = (match and match[1]) or "", str(value)
    return len(digits) == len(wanted) >= 3 and sum(a != b for a, b in zip(digits, wanted, strict=True)) <= 1


_MARK = re.compile(
    r"(?=.{1,12}$)(?!.*\w\d{2}|.*[^\W\d_]{3})(?:(?:[ITL][.,]? )?[\W\d_]*\d[\W\d_]*|.*[|_*+=<>#\\^{}©®§~].*)"
)


def _page_marks(lines: list[str], chained: list[_Number]) -> set[int]:
    """Lines at the foot of pages that number the sheets they were printed on, and blots that a scan took for letters.

    A foot is what stands before a form feed, or before a page number: none but such marks stand there as a figure
    alone. What is longer than two digits, or holds a word of three letters, stays.
    """
    numbered = {number.line for number in chained}
    found = set()
    for i in [*numbered, *(i for i, line in enumerate(lines) if line == PAGE_END)]:
        above = i - 1
        while above >= 0 and above not in numbered and (not lines[above] or _MARK.fullmatch(lines[above])):
            if lines[above]:
                found.add(above)
            above -= 1
    return found


def _neighbours(lines: list[str], index: int) -> Iterable[int]:
    for step in (-1, 1):
        i = index + step
        while 0 <= i < len(lines) and (not lines[i] or lines[i] == PAGE_END):
            i += step
        if 0 <= i < len(lines):
            yield i


def _headers(edges: list[str], lines: list[str]) -> set[str]:
    """Lines at the edges of pages that come back there, and hardly anywhere else."""
    groups: dict[str, list[str]] = {}
    for line in edges:
        reply = line[:1] in _DASHES and line[-1] not in _DASHES and not (line.isupper() and _FIGURE.search(line))
        if len(line) <= 70 and not reply and (key := _key(line)) and len(key) >= 3:
            groups.setdefault(key, []).append(line)
    everywhere = Counter(lines)
    known = {
        key: len(group)
        for key, group in groups.items()
        if len(group) < 3 or sum(everywhere[line] for line in set(group)) <= 1.3 * len(group)
    }
    return {line for key in _recurring(known) for line in groups[key]}


# --- paragraphs -----------------------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """Lines that surely belong to one paragraph, and what they say of the width their paragraph was set in."""

    first: int
    last: int
    longest: int  # the width is at least this: the longest line
    refused: int  # and less than this: the shortest line together with the word that no longer went into it


_UNKNOWN = 10_000  # no line was refused a word yet


def _paragraphs(lines: list[str], gaps: list[int], counts: Counter[str]) -> list[str]:
    """Join lines to paragraphs.

    A line is followed by one of the same paragraph if it is full, that is if the next line's first word would not
    have gone into it. How wide a full line is differs between books and, in some, between paragraphs, so the width is
    taken from the sure cases around it: a line that ends in mid-word, or before a small letter. What width leaves
    open is decided by how often lines that end and begin like these two ended a paragraph where width was clear.
    """
    if not lines:
        return []
    words = [line.find(" ") if " " in line else len(line) for line in lines]
    refused = [len(a) + 1 + w - 2 * (a[-1] == "-") for a, w in zip(lines, words[1:], strict=False)]
    for i, line in enumerate(lines[1:]):
        if line[0] in _DASHES and _breaks_off(lines[i]):
            # A dash in mid-sentence keeps to its word, so it was refused together with it.
            refused[i] += max(0, line.find(" ", 2) - 1)
    for i, gap in enumerate(gaps):
        if gap and i and lines[i - 1][-1] == "-" and i < len(refused):
            # The rest of a word cut by the page's end may be there only since then: its line was set for the whole.
            refused[i] += len(lines[i - 1]) - lines[i - 1].rfind(" ") - 2
    divided = [False] * len(lines)
    if gaps.count(_BLANK) * 20 > len(lines):  # blank lines stand between paragraphs, not between pages
        divided = [gap == _BLANK for gap in gaps]
    strict = _units(lines, refused, divided, _UNKNOWN)
    if len(strict) > 0.95 * len(lines) and max(map(len, lines)) > 120:
        # Hardly a line is continued, and they are longer than a page is wide: every line is a paragraph.
        return _join([lines[u.first : u.last + 1] for u in strict], counts)
    wider, tolerance = _widths(strict, max(map(len, lines)))
    units = _units(lines, refused, divided, wider[0] - tolerance)

    def ends(u: _Unit, v: _Unit) -> bool:
        """Whether a blank line or width alone shows that `u` ends a paragraph."""
        least = max(u.longest, v.longest) - tolerance
        most = min(u.refused, v.refused, refused[u.last]) - 1
        return divided[v.first] or wider[max(0, least)] > most

    clear: Counter[tuple[str, str]] = Counter()
    unclear: Counter[tuple[str, str]] = Counter()
    pairs = [(_ending(lines[u.last]), _opening(lines[v.first])) for u, v in itertools.pairwise(units)]
    for u, v, pair in zip(units, units[1:], pairs, strict=False):
        (clear if ends(u, v) else unclear)[pair] += 1
    paragraphs = [[lines[i] for i in range(units[0].first, units[0].last + 1)]]
    current = units[0]
    for v, pair in zip(units[1:], pairs, strict=True):
        seen = clear[pair] + (_REPLIES if pair[1] == "—A" and pair[0] not in "a," else 0)
        expected = _FULL * seen
        if ends(current, v) or expected > 0.5 * unclear[pair]:
            paragraphs.append([])
            current = v
        else:
            shortest = min(current.refused, v.refused, refused[current.last])
            current = _Unit(current.first, v.last, max(current.longest, v.longest), shortest)
        paragraphs[-1] += lines[v.first : v.last + 1]
    firsts = itertools.accumulate((len(paragraph) for paragraph in paragraphs[:-1]), initial=0)
    counts["page_breaks_joined"] = sum(map(bool, gaps)) - sum(bool(gaps[i]) for i in firsts)
    return _join(paragraphs, counts)


_FULL = 0.06  # paragraphs whose last line happens to look full, for each where it does not: measured on forty novels
_REPLIES = 30  # replies (a dash and a capital) taken as seen after short lines even where a book has none
_DASHES = "—–-"
_BREAKING = ",—–"
_CONTINUING = ";:!?,.)"  # no paragraph begins with these; a wrap before them is a scan's or a careless printer's


def _units(lines: list[str], refused: list[int], divided: list[bool], narrowest: int) -> list[_Unit]:
    """Join what surely belongs together: what stands before a small letter, or breaks off in a line of full width.

    A line that ends in mid-word is not measured, since some printers let it hang over.
    """
    units = []
    # A line of verse or a hole in the scan may be shorter by far than its page is wide: it says nothing of the width.
    floor = 0.7 * sorted(map(len, lines))[len(lines) * 9 // 10]
    first, longest, shortest = 0, 0, _UNKNOWN
    cut = False
    for i, line in enumerate(lines):
        if i and not (
            (cut and line[0].isalpha())
            or (divided[i] and line[0].islower() and _breaks_off(lines[i - 1]))
            or (not divided[i] and (line[0].islower() or line[0] in _CONTINUING))
            or (refused[i - 1] > narrowest and not divided[i] and line[0] not in _DASHES and _breaks_off(lines[i - 1]))
        ):
            units.append(_Unit(first, i - 1, longest, shortest))
            first, longest, shortest = i, 0, _UNKNOWN
        elif i and floor < refused[i - 1] < shortest:
            shortest = refused[i - 1]
        cut = line[-1] == "-" and line[-2:-1].isalpha()
        if not cut and len(line) > longest:
            longest = len(line)
    units.append(_Unit(first, len(lines) - 1, longest, shortest))
    return units


def _widths(units: list[_Unit], longest: int) -> tuple[list[int], int]:
    """The widths that paragraphs of this book are set in, and by how much its lines miss their width.

    The widths come as a table: at `n` stands the narrowest of them that is at least `n`. A scan has nearly as many as
    there are lines, a text wrapped by a program a few, and then little else fits.
    """
    long = [unit for unit in units if unit.last - unit.first >= 3]
    misses = sorted(max(0, unit.longest - unit.refused + 1) for unit in long)
    exact = Counter(unit.longest for unit in long if unit.longest >= unit.refused - 1)  # no other width is possible
    if exact.total() < 10:
        return list(range(longest + 2)), 0
    widths = {width for width, times in exact.items() if times >= 0.02 * exact.total()}
    table = [_UNKNOWN] * (longest + 2)
    for n in range(longest, -1, -1):
        table[n] = n if n in widths else table[n + 1]
    return table, misses[len(misses) * 3 // 4]


def _breaks_off(line: str) -> bool:
    """Whether a line ends without any mark that ends a sentence: in a word, a comma, a dash, an initial ("M.")."""
    last = line[-1]
    return last.isalnum() or last in _BREAKING or (last == "." and line[-2:-1].isupper() and not line[-3:-2].isalnum())


def _ending(line: str) -> str:
    """How a line ends, as far as that tells whether a paragraph may end there."""
    mark = line[-1]
    if mark in '»")]' and len(line) > 1:
        mark = line[:-1].rstrip()[-1:] or mark
        return f"{mark if mark in '.!?' else 'a'}»"
    return "," if mark in ",;" else "a" if mark.isalnum() else mark


def _opening(line: str) -> str:
    """How a line begins."""
    mark = line[0]
    if mark in _DASHES:
        return "—a" if line[1:].lstrip()[:1].islower() else "—A"
    return "A" if mark.isupper() else "1" if mark.isdigit() else mark


# --- hyphens --------------------------------------------------------------------------------------------------------

_LETTERS = r"[^\W\d_]+(?:-[^\W\d_]+)*"
_WORD = re.compile(_LETTERS)
_CUT = re.compile(rf"-\n(?<=[^\W\d_]-\n)({_LETTERS})")
_HEAD = re.compile(rf"{_LETTERS}$")
# What French joins by a hyphen, for words the book has not elsewhere.
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


def hyphen_stays(head: str, tail: str, vocabulary: Counter[str]) -> bool:
    """Whether the hyphen between `head` (ends a line) and `tail` (begins the next) belongs to the word.

    `vocabulary` counts the words of the book in small letters, compounds whole. What the book itself writes elsewhere
    decides; where it says nothing, the places where French has a hyphen do, and else the word was only cut.
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


def _join(paragraphs: list[list[str]], counts: Counter[str]) -> list[str]:
    """Each paragraph's lines as one text; words cut at a line's end made whole."""
    text = "\n\n".join("\n".join(paragraph) for paragraph in paragraphs)
    cuts = [(match, _HEAD.search(text, max(0, match.start() - 40), match.start())) for match in _CUT.finditer(text)]
    if cuts:
        vocabulary = Counter(_WORD.findall(text.lower()))
        for match, head in cuts:
            vocabulary[match[1].lower()] -= 1
            vocabulary[head[0].lower() if head else ""] -= 1
        pieces, at = [], 0
        for match, head in cuts:
            elided = text[match.end() : match.end() + 1] == "'" and len(match[1]) <= 2  # hors-d'œuvre
            stays = elided or (head is not None and hyphen_stays(head[0], match[1], vocabulary))
            counts["hyphens_kept" if stays else "hyphens_joined"] += 1
            pieces += [text[at : match.start()], "-" * stays]
            at = match.end() - len(match[1])
        text = "".join([*pieces, text[at:]])
        text = re.sub(r"-\n(?<=[\w']-\n)(?=\w)", "-", text)  # grand'-mère, a figure
    return [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]
