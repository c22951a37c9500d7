"""The text layer of a PDF, in reading order: pages separated by form feeds, for `prep.page_layout.clean_pages`.

pypdfium2 gives characters in the order the file draws them, each with its box. From the boxes come two columns, drop
capitals, and footnotes (small lines at the foot that begin with a number that the page above calls).
"""

import ctypes
import re
from collections import Counter
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from prep.common import BadInput


class PdfText(NamedTuple):
    text: str
    counts: dict[str, int]
    warnings: list[str]


class _Char(NamedTuple):
    text: str
    x0: float
    y0: float
    x1: float
    y1: float
    added: bool = False  # a space or a line end that pdfium concluded from places

    @property
    def height(self) -> float:
        return self.y1 - self.y0


_Line = list[_Char]
# "p. 12" and "12/240" as a page's first or last line: for page_layout they are the number alone.
_NUMBERED = re.compile(r"(?:\A|(?<=\n)(?=.*\Z))(?:p\. ?(\d{1,4})|(\d{1,4}) ?/ ?\d{1,4})(?= *(?:\n|\Z))")


def read_pdf(data: bytes, name: str) -> PdfText:
    """Raises BadInput for a PDF that is damaged, protected, mostly pictures, or without a map from glyphs to letters."""
    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        raise BadInput(f"{name} cannot be read as a PDF ({error}); fetch it again, without a password") from error
    with document:
        unmapped: Counter[int] = Counter()  # letters by page
        pages = [_lines(page, number, unmapped) for number, page in enumerate(document, 1)]
        letters = [sum(c.text.isalpha() for line in lines for c in line) for lines in pages]
        pictures = [n for n, page in enumerate(document, 1) if letters[n - 1] < 100 and _is_picture(page)]
    if unmapped.total() > max(2, sum(letters) / 20_000):
        raise BadInput(
            f"{name} does not say what its letters are: {unmapped.total():,} letters on {len(unmapped)} of "
            f"{len(pages)} pages have no Unicode value; give another edition, or run OCR on it"
        )
    if not pages or sum(letters) < 20 * len(pages):
        raise BadInput(f"{name} has no text layer (its {len(pages)} pages are pictures): run OCR on it, or give a text")
    warnings = []
    if unmapped:
        warnings.append(
            f"{name}: {unmapped.total()} letters without a Unicode value left out, on page {_listed(unmapped)}"
        )
    if pictures:
        missing = f"{len(pictures)} of {len(pages)} pages have no text layer (page {_listed(pictures)})"
        if 2 * len(pictures) > len(pages):
            raise BadInput(f"{name}: {missing}: run OCR on it, or give a text")
        warnings.append(f"{name}: {missing}; what they say is not in the book. Run OCR on it if they hold text")

    counts: Counter[str] = Counter(pages_without_text=len(pictures))
    heights = Counter(round(c.height, 1) for lines in pages for line in lines for c in line if c.text.isalpha())
    body = heights.most_common(1)[0][0]
    vocabulary = Counter(re.findall(r"[^\W\d_]+", "\n".join(_text(lines) for lines in pages).lower()))
    texts, open_note = [], False
    for lines in pages:
        columns = _two_columns(lines)
        counts["two_column_pages"] += columns is not None
        lines, open_note = _without_notes(columns or lines, body, open_note, counts)
        text = _text([_joined_capital(line, body, vocabulary, counts) for line in lines])
        texts.append(_NUMBERED.sub(lambda match: match[1] or match[2], text))
    return PdfText("\f".join(texts), {kind: n for kind, n in counts.items() if n}, warnings)


def _listed(pages: Iterator[int] | list[int] | Counter[int]) -> str:
    """`1-3, 7` of page numbers."""
    runs: list[list[int]] = []
    for n in sorted(pages):
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs)


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
        if 0xF721 <= code <= 0xF7FF:  # Adobe's codes for small capitals and old-style figures
            code -= 0xF700
        text = chr(code)
        added = not text.isprintable() or text == " "
        added = added and pdfium_c.FPDFText_IsGenerated(textpage, i) == 1
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
        before = lines[-1][-1].text if lines[-1] else " "
        private = 0xE000 <= code <= 0xF8FF or code == 0xFFFD
        if private or pdfium_c.FPDFText_HasUnicodeMapError(textpage, i) == 1:
            unmapped.update([number] if before.isalpha() else [])
            unknown = not before.isalpha()
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


def _two_columns(lines: list[_Line]) -> list[_Line] | None:
    """The lines of a page in two columns, the left one first; None for a page in one.

    A gutter is a place near the middle that hardly a line crosses, with lines side by side on most of its height. What
    crosses it (a title, a page number) divides the page into bands.
    """
    pieces = [piece for line in lines for piece in _split_at_gaps(line)]
    if len(pieces) < 12:
        return None
    first, last = min(p[0].x0 for p in pieces), max(p[-1].x1 for p in pieces)
    places = [first + (last - first) * k / 100 for k in range(35, 66)]
    gutter = min(places, key=lambda x: (sum(p[0].x0 < x < p[-1].x1 for p in pieces), abs(x - (first + last) / 2)))
    lefts = [p for p in pieces if p[-1].x1 <= gutter]
    rights = [p for p in pieces if p[0].x0 >= gutter]
    across = [p for p in pieces if p[0].x0 < gutter < p[-1].x1]
    wide = [sum(p[-1].x1 - p[0].x0 > 0.25 * (last - first) for p in side) for side in (lefts, rights)]
    paired = sum(any(min(p[0].y1, q[0].y1) - max(p[0].y0, q[0].y0) > 0.5 * p[0].height for q in rights) for p in lefts)
    if min(wide) < 5 or len(across) > 0.15 * len(pieces) or paired < 0.6 * min(len(lefts), len(rights)):
        return None

    def below(piece: _Line) -> float:
        return -piece[0].y1

    found: list[_Line] = []
    for limit in [*sorted(across, key=below), None]:
        for side in (lefts, rights):
            band = [p for p in side if (limit is None or p[0].y0 > limit[0].y0)]
            found += sorted(band, key=below)
            side[:] = [p for p in side if p not in band]
        found += [limit] if limit else []
    return found


def _split_at_gaps(line: _Line) -> list[_Line]:
    """The parts of a line that stand apart by more than a wide space."""
    parts: list[_Line] = [[]]
    for char in line:
        if char.text.isspace():
            parts[-1] += [char] if parts[-1] else []
            continue
        solid = next((c for c in reversed(parts[-1]) if not c.text.isspace()), None)
        if solid and char.x0 - solid.x1 > 0.9 * solid.height:
            parts.append([])
        parts[-1].append(char)
    return [part[: max(i for i, c in enumerate(part) if not c.text.isspace()) + 1] for part in parts if part]


# --- drop capitals ----------------------------------------------------------------------------------------------------


def _joined_capital(line: _Line, body: float, vocabulary: Counter[str], counts: Counter[str]) -> _Line:
    """A line whose first letter is twice as high as the rest, without a space after it; "À la" keeps its space."""
    solid = [i for i, c in enumerate(line) if not c.text.isspace()]
    at = next((i for i in solid if line[i].text.isalpha()), None)
    if at is None or line[at].height < 1.6 * body or len(solid) < 3 or at > 2:
        return line
    after = [i for i in solid if i > at]
    if not after or line[after[0]].height > 1.3 * body:
        return line
    if any(c.text.isspace() and not c.added for c in line[at + 1 : after[0]]):
        return line  # the space was set
    counts["drop_capitals"] += 1
    word = re.match(r"[^\W\d_]*", "".join(c.text for c in line[after[0] :]))
    rest = word[0] if word else ""
    name = rest[:1].isupper() and not rest.isupper()
    apart = vocabulary[rest.lower()] > vocabulary[(line[at].text + rest).lower()] or name
    space = [line[at]._replace(text=" ")] if rest and apart and line[at].text in "AÀOÔYÉ" else []
    return [*line[: at + 1], *space, *line[after[0] :]]


# --- footnotes --------------------------------------------------------------------------------------------------------

_RAISED = str.maketrans("¹²³⁰⁴⁵⁶⁷⁸⁹", "1230456789")
_LABEL = re.compile(r"\W{0,2}?[\[(]?(\d{1,3}|\*{1,4}|[†‡])[\])]?(?=\D)[.\s–—-]*\S")


def _without_notes(lines: list[_Line], body: float, open_note: bool, counts: Counter[str]) -> tuple[list[_Line], bool]:
    """The lines of a page without the footnotes that a call on it names, and without these calls.

    Also returns whether the last note breaks off, so that small lines at the next page's foot continue it.
    """
    heights = [median(c.height for c in line if not c.text.isspace()) for line in lines]
    order = sorted(range(len(lines)), key=lambda i: lines[i][0].y0)  # from the foot
    foot: list[int] = []
    for i in order:
        if foot and lines[i][0].y0 - lines[foot[-1]][0].y1 > 2 * body:
            break
        if heights[i] > 0.93 * body:
            if len(foot) or not re.fullmatch(r"\W*(p\. ?|page )?[\divxlc]{1,6}(\W+\d{1,4})?\W*", _text([lines[i]])):
                break
        elif any(c.text.isalpha() for c in lines[i]):
            foot.append(i)
    foot.reverse()
    above = [line for i, line in enumerate(lines) if i not in foot]
    dropped: set[int] = set()
    taken: set[tuple[int, int]] = set()
    inside, last = open_note, ""
    for i in foot:
        text = _text([lines[i]]).translate(_RAISED).strip()
        if label := _LABEL.match(text):
            call = _call(above, label[1], taken)
            if call:  # otherwise a line of a note, such as "3 juillet"
                inside = True
                taken |= call
                counts["footnotes"] += 1
        if inside:
            dropped.add(i)
            last = text
    kept = [[c for k, c in enumerate(line) if (n, k) not in taken] for n, line in enumerate(above)]
    if dropped:
        # In the file's order, with the small lines that are no notes where they were.
        whole = iter(kept)
        kept = [lines[i] if i in foot else next(whole) for i in range(len(lines)) if i not in dropped]
    return kept, bool(last) and last[-1] not in ".!?»)"


def _call(lines: list[_Line], label: str, taken: set[tuple[int, int]]) -> set[tuple[int, int]] | None:
    """Where the call of a note is: raised, in brackets, or glued to a word."""
    for n, line in enumerate(lines):
        text = "".join(c.text for c in line).translate(_RAISED)
        high = median(c.height for c in line if not c.text.isspace())
        for match in re.finditer(rf" ?[\[(]{re.escape(label)}[\])]|(?<![\d*]){re.escape(label)}(?![\d*])", text):
            where = {(n, k) for k in range(match.start(), match.end())}
            raised = line[match.end() - 1].height < 0.85 * high
            glued = match.start() > 0 and re.match(r"[^\W\d_]|[.,;:!?»…]", text[match.start() - 1])
            if not where & taken and (raised or match[0].strip()[0] in "[(" or glued):
                return where
    return None
