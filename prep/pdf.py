"""The text layer of a PDF, in reading order: pages separated by form feeds, for `prep.page_layout.clean_pages`.

pypdfium2 gives characters in the order the file draws them, each with its box. From the boxes come two columns, drop
capitals, and footnotes (small lines at the foot that begin with a number that the page above calls).
"""

import ctypes
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from prep.common import BadInput


class _Char(NamedTuple):
    text: str
    x0: float
    y0: float
    x1: float
    y1: float
    added: bool  # a space that pdfium concluded from places

    @property
    def height(self) -> float:
        return self.y1 - self.y0


_Line = list[_Char]


def read_pdf(data: bytes, name: str) -> tuple[str, None, dict[str, int], list[str]]:
    """What `BookText` holds: text, no paragraphs, counts of what was left out, warnings for the user.

    Raises BadInput for a PDF that is damaged, protected, mostly pictures, or without a map from glyphs to letters.
    """
    unmapped: Counter[int] = Counter()  # letters by page
    try:
        with pdfium.PdfDocument(data) as document:
            pages = [_lines(page, number, unmapped) for number, page in enumerate(document, 1)]
            letters = [sum(c.text.isalpha() for line in lines for c in line) for lines in pages]
            pictures = [n for n, page in enumerate(document, 1) if letters[n - 1] < 100 and _is_picture(page)]
    except pdfium.PdfiumError as error:
        raise BadInput(f"{name} cannot be read as a PDF ({error}); fetch it again, without a password") from error
    if unmapped.total() > max(2, sum(letters) / 20_000):
        raise BadInput(
            f"{name} does not say what its letters are: {unmapped.total():,} letters on {len(unmapped)} of "
            f"{len(pages)} pages have no Unicode value; give another edition, or run OCR on it"
        )
    if not pages or sum(letters) < 20 * len(pages):
        raise BadInput(f"{name} has no text layer (its {len(pages)} pages are pictures): run OCR on it, or give a text")
    warnings = []
    if unmapped:
        where = f"left out, on page {_listed(unmapped)}"
        warnings.append(f"{name}: {unmapped.total()} letters without a Unicode value {where}")
    if pictures:
        missing = f"{len(pictures)} of {len(pages)} pages have no text layer (page {_listed(pictures)})"
        if 2 * len(pictures) > len(pages):
            raise BadInput(f"{name}: {missing}: run OCR on it, or give a text")
        warnings.append(f"{name}: {missing}; what they say is not in the book. Run OCR on it if they hold text")

    counts: Counter[str] = Counter(pages_without_text=len(pictures))
    heights = Counter(round(c.height, 1) for lines in pages for line in lines for c in line if c.text.isalpha())
    body = heights.most_common(1)[0][0]
    vocabulary = Counter(re.findall(r"[^\W\d_]+", "\n".join(map(_text, pages)).lower()))
    texts, open_note, tables = [], False, []
    for number, lines in enumerate(pages, 1):
        columns = _two_columns(lines, 5 if counts["two_column_pages"] < 3 else 1)
        if not columns and len(lines) >= 12 and sum(len(_split_at_gaps(line)) > 2 for line in lines) > len(lines) / 2:
            tables.append(number)
        counts["two_column_pages"] += columns is not None
        lines, open_note = _without_notes(columns or lines, body, open_note, counts)
        texts.append(_text([_joined_capital(line, body, vocabulary, counts) for line in lines]))
    if tables:
        warnings.append(
            f"{name}: page {_listed(tables)} is set in three columns or more, read line by line: look at the text"
        )
    return "\f".join(texts), None, dict(+counts), warnings


def _listed(pages: Iterable[int]) -> str:
    """`1-3, 7` of page numbers."""
    groups = itertools.groupby(enumerate(sorted(pages)), key=lambda pair: pair[1] - pair[0])
    runs = [[n for _, n in group] for _, group in groups]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _text(lines: list[_Line]) -> str:
    return "\n".join("".join(c.text for c in line) for line in lines)


def _is_picture(page: pdfium.PdfPage) -> bool:
    """Whether images or drawn outlines take up most of a page."""
    width, height = page.get_size()
    outlines = 0
    for thing in page.get_objects(max_depth=3):
        if thing.type == pdfium_c.FPDF_PAGEOBJ_IMAGE:
            left, bottom, right, top = thing.get_bounds()
            if (right - left) * (top - bottom) > 0.4 * width * height:
                return True
        outlines += thing.type == pdfium_c.FPDF_PAGEOBJ_PATH
    return outlines > 200


def _lines(page: pdfium.PdfPage, number: int, unmapped: Counter[int]) -> list[_Line]:
    """The characters of a page in lines, in the file's order; counts letters without a Unicode value."""
    textpage = page.get_textpage()
    left, bottom, right, top = page.get_bbox()
    box = pdfium_c.FS_RECTF()
    lines: list[_Line] = [[]]
    unknown = False  # the character before has no value
    for i in range(textpage.count_chars()):
        code = pdfium_c.FPDFText_GetUnicode(textpage, i)
        text = chr(code - 0xF700 if 0xF721 <= code <= 0xF7FF else code)  # Adobe's small capitals, old-style figures
        added = (not text.isprintable() or text == " ") and pdfium_c.FPDFText_IsGenerated(textpage, i) == 1
        if added and text in "\r\n":
            if text == "\n" and lines[-1]:
                lines.append([])
            continue
        pdfium_c.FPDFText_GetLooseCharBox(textpage, i, ctypes.byref(box))
        char = _Char(text, box.left, box.bottom, box.right, box.top, added)
        if text in "\x02\ufffe" and pdfium_c.FPDFText_IsHyphen(textpage, i) == 1:  # at a line's end
            lines[-1].append(char._replace(text="-"))
            lines.append([])
            continue
        if not (left <= (char.x0 + char.x1) / 2 <= right and bottom <= (char.y0 + char.y1) / 2 <= top):
            continue  # a printer's marks outside the page
        if 0.1 < pdfium_c.FPDFText_GetCharAngle(textpage, i) % (math.pi / 2) < math.pi / 2 - 0.1:
            continue  # a watermark or stamp
        private = 0xE000 <= ord(text) <= 0xF8FF or text == "\ufffd"
        if private or pdfium_c.FPDFText_HasUnicodeMapError(textpage, i) == 1:
            in_word = bool(lines[-1]) and lines[-1][-1].text.isalpha()
            unmapped.update([number] if in_word else [])
            unknown = not in_word
            continue
        unmapped.update([number] if unknown and text.isalpha() else [])
        unknown = False
        if not lines[-1] and len(lines) > 1 and _side_by_side(lines[-2][-1], char):
            lines.pop()  # pdfium ends a line after a raised figure and a drop capital
        lines[-1].append(char)
    return [line for line in lines if any(not c.text.isspace() for c in line)]


def _side_by_side(a: _Char, b: _Char) -> bool:
    shared = min(a.y1, b.y1) - max(a.y0, b.y0)
    low, high = sorted((a.height, b.height))
    return low < 0.8 * high and shared > 0.6 * low and -0.3 * low < b.x0 - a.x1 < 0.8 * low and a.text != "-"


# --- columns ----------------------------------------------------------------------------------------------------------


def _two_columns(lines: list[_Line], least: int) -> list[_Line] | None:
    """The lines of a page in two columns of `least` lines or more, the left one first; None for a page in one.

    A gutter is a place near the middle that hardly a line crosses, with lines side by side on most of its height. What
    crosses it (a title, a page number) divides the page into bands.
    """
    pieces = [piece for line in lines for piece in _split_at_gaps(line)]
    if len(pieces) < 2 * least + 2:
        return None
    first, last = min(p[0].x0 for p in pieces), max(p[-1].x1 for p in pieces)
    places = [first + (last - first) * k / 100 for k in range(35, 66)]
    gutter = min(places, key=lambda x: (sum(p[0].x0 < x < p[-1].x1 for p in pieces), abs(x - (first + last) / 2)))
    lefts = [p for p in pieces if p[-1].x1 <= gutter]
    rights = [p for p in pieces if p[0].x0 >= gutter]
    across = [p for p in pieces if p[0].x0 < gutter < p[-1].x1]
    wide = [sum(p[-1].x1 - p[0].x0 > 0.25 * (last - first) for p in side) for side in (lefts, rights)]
    paired = sum(any(min(p[0].y1, q[0].y1) - max(p[0].y0, q[0].y0) > 0.5 * p[0].height for q in rights) for p in lefts)
    if min(wide) < least or len(across) > 0.15 * len(pieces) or paired < 0.6 * min(len(lefts), len(rights)):
        return None
    across.sort(key=lambda p: -p[0].y1)

    def place(piece: _Line) -> tuple[int, int, float]:
        """The band, the column in it (across: behind both), the depth."""
        band = next((k for k, limit in enumerate(across) if piece is limit or piece[0].y0 > limit[0].y0), len(across))
        return band, 0 if piece[-1].x1 <= gutter else 1 if piece[0].x0 >= gutter else 2, -piece[0].y1

    return sorted([*lefts, *rights, *across], key=place)


def _split_at_gaps(line: _Line) -> list[_Line]:
    """The parts of a line that stand apart by more than a wide space."""
    solid = [i for i, c in enumerate(line) if not c.text.isspace()]
    gaps = [(i, j) for i, j in itertools.pairwise(solid) if line[j].x0 - line[i].x1 > 0.9 * line[i].height]
    starts, ends = [solid[0], *(j for _, j in gaps)], [*(i for i, _ in gaps), solid[-1]]
    return [line[start : end + 1] for start, end in zip(starts, ends, strict=True)]


# --- drop capitals ----------------------------------------------------------------------------------------------------


def _joined_capital(line: _Line, body: float, vocabulary: Counter[str], counts: Counter[str]) -> _Line:
    """A line whose first letter is twice as high as the rest, without a space after it; "À la" keeps its space."""
    solid = [i for i, c in enumerate(line) if not c.text.isspace()]
    at = next((i for i in solid[:-1] if line[i].text.isalpha()), None)
    if at is None or line[at].height < 1.6 * body or len(solid) < 3 or at > 2:
        return line
    after = next(i for i in solid if i > at)
    if line[after].height > 1.3 * body or any(not c.added for c in line[at + 1 : after]):
        return line  # a line of large letters, or the space was set
    counts["drop_capitals"] += 1
    rest = re.match(r"[^\W\d_]*", "".join(c.text for c in line[after:]))[0]  # type: ignore[index]
    name = rest[:1].isupper() and not rest.isupper()
    apart = name or vocabulary[rest.lower()] > vocabulary[(line[at].text + rest).lower()]
    space = [line[at]._replace(text=" ")] if rest and apart and line[at].text in "AÀOÔYÉ" else []
    return [*line[: at + 1], *space, *line[after:]]


# --- footnotes --------------------------------------------------------------------------------------------------------

_RAISED = str.maketrans("¹²³⁰⁴⁵⁶⁷⁸⁹", "1230456789")
_LABEL = re.compile(r"\W{0,2}?[\[(]?(\d{1,3}|\*{1,4}|[†‡])[\])]?(?=\D)[.\s–—-]*\S")
_FOOT = re.compile(r"\W*(p\. ?|page )?[\divxlc]{1,6}(\W+\d{1,4})?\W*")


def _without_notes(lines: list[_Line], body: float, open_note: bool, counts: Counter[str]) -> tuple[list[_Line], bool]:
    """The lines of a page without the footnotes that a call on it names, and without these calls.

    Also returns whether the last note breaks off, so that small lines at the next page's foot continue it.
    """
    heights = [median(c.height for c in line if not c.text.isspace()) for line in lines]
    foot: list[int] = []
    for i in sorted(range(len(lines)), key=lambda i: lines[i][0].y0):  # from the foot
        if foot and lines[i][0].y0 - lines[foot[-1]][0].y1 > 2 * body:
            break
        if heights[i] > 0.93 * body:
            if foot or not _FOOT.fullmatch(_text([lines[i]])):
                break
        elif any(c.text.isalpha() for c in lines[i]):
            foot.append(i)
    above = [i for i in range(len(lines)) if i not in foot]
    dropped: set[int] = set()
    taken: set[tuple[int, int]] = set()
    inside, last = open_note, ""
    for i in reversed(foot):
        text = _text([lines[i]]).translate(_RAISED).strip()
        label = _LABEL.match(text)
        call = _call(lines, above, label[1], taken) if label else None
        if call:  # otherwise a line of a note, such as "3 juillet"
            inside = True
            taken |= call
            counts["footnotes"] += 1
        if inside:
            dropped.add(i)
            last = text
    kept = [[c for k, c in enumerate(lines[i]) if (i, k) not in taken] for i in range(len(lines)) if i not in dropped]
    return kept, bool(last) and last[-1] not in ".!?»)"


def _call(lines: list[_Line], above: list[int], label: str, taken: set[tuple[int, int]]) -> set[tuple[int, int]] | None:
    """Where the call of a note is: raised, in brackets, or glued to a word."""
    sign = re.escape(label)
    for i in above:
        text = "".join(c.text for c in lines[i]).translate(_RAISED)
        high = median(c.height for c in lines[i] if not c.text.isspace())
        for match in re.finditer(rf" ?[\[(]{sign}[\])]|(?<![\d*]){sign}(?![\d*])", text):
            where = {(i, k) for k in range(match.start(), match.end())}
            raised = lines[i][match.end() - 1].height < 0.85 * high
            glued = match.start() > 0 and re.match(r"[^\W\d_]|[.,;:!?»…]", text[match.start() - 1])
            if not where & taken and (raised or match[0].strip()[0] in "[(" or glued):
                return where
    return None
