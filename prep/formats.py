"""What a file is, judged by its content, and the text of the book in it.

    read_book(Path("roman.epub")).paragraphs

PDF (`prep/pdf.py`) and plain text give lines, with a form feed between a PDF's pages: `clean_pages` makes paragraphs of them.
EPUB, DOCX, ODT, HTML, RTF, TEI and FB2 give their own paragraphs, without notes, their calls, page numbers and tables of contents. A zip
gives the book in it, or its texts by name. Anything else raises BadInput, which says what it is and what to do.
"""

import contextlib
import csv
import html
import io
import json
import lzma
import posixpath
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote

import lxml.html
from lxml import etree
from striprtf.striprtf import rtf_to_text

from prep.common import BadInput
from prep.encodings import decode, repaired
from prep.front_matter import drop_edition
from prep.pdf import read_pdf

BOOK_SUFFIXES = (".pdf", ".epub", ".docx", ".odt", ".html", ".htm", ".xhtml", ".rtf", ".fb2", ".xml", ".txt")
# What zipfile raises of a damaged archive; NotImplementedError is of a version or a method of packing.
DAMAGED = (zipfile.BadZipFile, NotImplementedError, zlib.error, lzma.LZMAError, EOFError, OSError)


class BookText(NamedTuple):
    """The text of a book: `paragraphs` where its format says what they are, otherwise `text` in lines."""

    text: str
    paragraphs: list[str] | None
    counts: dict[str, int]  # what was left out, by kind
    warnings: list[str]  # one line each, for the user

    def whole(self) -> str:
        """The text, or the paragraphs with blank lines between them, so that no page rule applies."""
        return self.text if self.paragraphs is None else "\n\n".join(self.paragraphs)


def read_book(path: Path) -> BookText:
    """The text of the book in a file. Raises BadInput where there is none, naming what the file is."""
    if not path.is_file():
        raise BadInput(f"no such book: {path}")
    return read_bytes(path.read_bytes(), str(path))


def read_bytes(data: bytes, name: str) -> BookText:
    """As `read_book`, of a file's bytes; `name` is for messages."""
    kind = kind_of(data, name)
    if kind == "zip":
        return _one_book(read_members(data, name), name)
    readers: dict[str, Callable[[bytes, str], BookText]] = {
        "txt": lambda data, name: BookText(decode(data, name), None, {}, []),
        "pdf": lambda data, name: BookText(*read_pdf(data, name)),
        "rtf": _read_rtf,
        "xml": _read_xml,
        "html": _read_html,
        "epub": _read_epub,
        "docx": _read_office,
        "odt": _read_office,
    }
    book = readers[kind](data, name)
    if book.paragraphs is None:
        book = book._replace(text=repaired(book.text, name))
    else:
        counts = Counter(book.counts)
        lines = repaired("\n\n".join(book.paragraphs), name).split("\n")
        book = book._replace(paragraphs=list(filter(None, drop_edition(lines, counts))), counts=dict(+counts))
    if kind != "txt" and len(book.whole().split()) < 10:
        raise BadInput(f"{name} holds no text (pictures of pages?): run OCR on it, or give a text")
    return book


def read_members(data: bytes, name: str) -> Iterator[tuple[str, BookText | BadInput]]:
    """The files in a zip, by name in natural order, each with its text or the reason why it is no book."""
    with _opened(data, name) as archive:
        members = [m.filename for m in archive.infolist() if not m.is_dir() and m.file_size]
        for member in sorted(members, key=lambda m: [p.zfill(9 * p.isdigit()) for p in re.split(r"(\d+)", m)]):
            if not member.startswith("__MACOSX/") and not posixpath.basename(member).startswith("."):
                yield member, attempt(lambda m=member: read_bytes(_member(archive, m, name), f"{name}: {m}"))  # type: ignore[misc]


def attempt(read: Callable[[], BookText]) -> BookText | BadInput:
    """A book, or the reason why it cannot be read."""
    try:
        return read()
    except BadInput as error:
        return error


def _one_book(members: Iterator[tuple[str, BookText | BadInput]], name: str) -> BookText:
    found = dict(members)
    books = {member: book for member, book in found.items() if isinstance(book, BookText)}
    others = [str(error).removeprefix(f"{name}: ") for error in found.values() if isinstance(error, BadInput)]
    if not books:
        raise BadInput(f"{name} is a zip without a book" + (f" ({'; '.join(others[:3])})" if others else ""))
    if len({posixpath.splitext(member)[1].lower() for member in books}) > 1:
        raise BadInput(f"{name} is a zip of several books ({', '.join(books)}): unpack it and give one of them")
    counts: Counter[str] = sum((Counter(book.counts) for book in books.values()), Counter())
    warnings = [line for book in books.values() for line in book.warnings]
    if len(books) > 1:
        warnings.append(f"{name}: {len(books)} texts read as one book, in this order: {', '.join(books)}")
    if others:
        warnings.append(f"{name}: left out: {'; '.join(others)}")
    if all(book.paragraphs is not None for book in books.values()):
        return BookText("", [p for book in books.values() for p in book.paragraphs or []], counts, warnings)
    return BookText("\n\n".join(book.whole() for book in books.values()), None, counts, warnings)


# --- what a file is ---------------------------------------------------------------------------------------------------

_OCR = "give its text, or run OCR on it"
_NO_BOOK = [  # how a file begins, what it is, what to do
    (rb"\xd0\xcf\x11\xe0", "an old Word file (.doc) or a protected one", "save it as .docx, without a password"),
    (rb".{60}(BOOKMOBI|TEXtREAd)|\xeaDRMION|CONT\x02|TPZ", "a Kindle book (MOBI, AZW)", "convert it to EPUB"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0\0\0\0|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}ftyp(avif|hei|mif)", "a picture", _OCR),
    (rb"AT&TFORM", "a DjVu scan", "convert it to a PDF with a text layer, or give its text"),
    (rb"ID3|OggS|fLaC|\xff[\xfb\xf3\xf2]|RIFF|.{4}ftyp|\x1aE\xdf\xa3|MThd", "sound or film", "give the book's text"),
    (rb"\x7fELF|MZ.{0,60}\0|[\xcf\xce]\xfa\xed\xfe|\xca\xfe\xba\xbe|#!", "a program", "give the book's text"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar", "an archive", "unpack it first"),
    (rb"PAR1|SQLite format 3|GGUF|\x89HDF", "a data file", "give the book's text"),
    (rb"ITSF|ITOLITLS", "a Microsoft help file or reader book", "convert it to EPUB"),
    (
        rb"(MIME-Version|Content-Type|Return-Path|Received|From): ",
        "a mail or a saved web page (MHT)",
        "give the book's text",
    ),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript", "convert it to PDF"),
    (rb"\xffWPC", "a WordPerfect file", "save it as .docx"),
]
_OFFICE = {"xl/": "an Excel workbook", "ppt/": "a PowerPoint file", "Index/": "an Apple iWork file"}
_HTML = re.compile(r"\s*(<\?xml[^>]*>\s*)?(?><!--.*?-->\s*)*<(!doctype html|html|head|body)\b", re.I | re.S)
_XML = re.compile(r"\s*(?:<[?!][^>]*>\s*)*<([\w:.-]+)[\s>/]")


def kind_of(data: bytes, name: str) -> str:
    """`pdf`, `epub`, `docx`, `odt`, `html`, `rtf`, `xml` (TEI, FB2), `zip` or `txt`, by content. Raises BadInput for what is no book."""
    if not data.strip():
        raise BadInput(f"{name} is empty")
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_kind(data, name)
    if b"%PDF-" in data[:1024]:  # the specification allows that much before it
        return "pdf"
    if data.lstrip().startswith(b"{\\rtf"):
        return "rtf"
    for start, what, advice in _NO_BOOK:
        if re.match(start, data[:300], re.S):
            raise BadInput(f"{name} is {what}, not a book: {advice}")
    text = decode(data, name)
    if (root := _XML.match(text[:5000])) and root[1] in ("TEI", "TEI.2", "FictionBook", "office:document"):
        return "xml"
    if _HTML.match(text[:5000]) or len(re.findall(r"</?(?:p|div|br|h[1-6])\b[^>]{0,200}>", text, re.I)) > 5:
        return "html"
    if found := _no_prose(text):
        raise BadInput(f"{name} is {found}, not a book: give the book's text, or an EPUB")
    return "txt"


def _zip_kind(data: bytes, name: str) -> str:
    with _opened(data, name) as archive:
        names = archive.namelist()
        mimetype = _member(archive, "mimetype", name) if "mimetype" in names else b""
    if "META-INF/container.xml" in names:
        return "epub"
    if "word/document.xml" in names:
        return "docx"
    if mimetype.startswith(b"application/vnd.oasis.opendocument"):
        if b"text" not in mimetype:
            raise BadInput(f"{name} is an OpenDocument table or drawing, not a book: give the book's text")
        return "odt"
    for folder, what in _OFFICE.items():
        if any(n.startswith(folder) for n in names):
            raise BadInput(f"{name} is {what}, not a book: save its text as .docx or .txt")
    return "zip"


def _no_prose(text: str) -> str | None:
    """What a text is instead of a book, if it is."""
    start = text.lstrip("\ufeff \t\r\n")
    root = _XML.match(start[:5000])
    if root and f"</{root[1]}>" in text[-1000:]:
        return f"XML data (<{root[1]}>)"
    if start.startswith(("\\documentclass", "\\input")):
        return "a TeX source"
    if re.match(r"WEBVTT|\d+\r?\n\d\d:\d\d:\d\d[,.]\d{3} -->", start):
        return "subtitles"
    for whole in (text, start.split("\n", 1)[0]) if start[:1] in ("{", "[") else ():
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(whole)
            return "JSON data"
    lines = [line for line in text[:20_000].splitlines()[:50] if line.strip()][:-1]
    for delimiter in "\t;,|":
        rows = list(csv.reader(lines, delimiter=delimiter))
        in_prose = all(cell[:1] == " " for row in rows for cell in row[1:])  # a comma and a space
        if len(lines) >= 4 and len({*map(len, rows)}) == 1 and len(rows[0]) >= 3 and not in_prose:
            return "a table (CSV)"
    if sum(map(str.isalpha, text)) < 0.5 * sum(not c.isspace() for c in text):
        return "mostly figures and signs"
    return None


# --- formats that know their paragraphs -------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BLOCKS = _words(
    "address article aside blockquote body caption center dd div dl dt fieldset figcaption figure footer h h1 h2 h3 h4 h5"
    " h6 header hr li main ol p pre section table tr ul"
)
_SIGNS = dict.fromkeys(("br", "cr", "line-break"), "\v") | dict.fromkeys(("td", "th", "tab", "img"), " ")
_SIGNS["noBreakHyphen"] = "-"
_SPACES = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}s"
_UNSEEN = _words(
    "head title script style nav button select noscript template svg figcaption rt rp del moveFrom Fallback"  # HTML, DOCX
    " note annotation tracked-changes table-of-content forms sequence-decls page-number"  # ODT
    " fw ref rdg figDesc"  # TEI
)
_NOTE_BLOCKS = {"p", "li", "dd", "div", "aside", "tr"}
_KINDS = {  # what an edition marks by epub:type, role or class; the first that fits counts
    "note_calls": {"noteref", "fnanchor", "footnote-ref"},
    "notes": {"footnote", "footnotes", "endnote", "endnotes", "rearnote", "rearnotes", "references"},
    "edition_parts": _words(
        "pagebreak pagenum pageno page-number toc landmarks page-list cover titlepage halftitlepage copyright-page"
        " imprint colophon index caption ws-noexport ws-pagenum mw-editsection"
    ),
}
_SITE = _words("mw-navigation siteSub printfooter catlinks footer sidebar comments cookie-banner")  # ids of web sites
_LARGEST_PART = 0.2  # of the book: what a class such as "cover" or "index" marks beyond that is its text
_EPUB_TYPE = "{http://www.idpf.org/2007/ops}type"


def _name(element: Any) -> str:
    return re.sub(r"{.*}|.*:", "", element.tag) if isinstance(element.tag, str) else ""  # also Word's <o:p>


def _size(element: Any) -> int:
    return sum(map(len, element.itertext()))


def _left_out(roots: list[Any]) -> dict[Any, str]:
    """Elements that are of the edition, not of the work, and the count each goes into."""
    marked: list[tuple[Any, str, str]] = []
    sizes: Counter[str] = Counter()
    targets = {n: e for root in roots for e in root.iter("*") for n in (e.get("id"), e.get("name")) if n}
    for root in roots:
        for element in root.iter("*"):
            get = element.get
            kinds = f"{get('role') or ''} {get(_EPUB_TYPE) or get('epub:type') or ''}".split()
            marks = {kind.removeprefix("doc-") for kind in kinds} | {*(get("class") or "").split()}
            if get("hidden") is not None or get("id") in _SITE or re.search(r"display: *none", get("style") or ""):
                marked.append((element, "edition_parts", "hidden"))
            elif kind := next((kind for kind, names in _KINDS.items() if marks & names), None):
                mark = min(marks & _KINDS[kind])
                sizes[mark] += _size(element) if kind == "edition_parts" else 0
                marked.append((element, kind, mark))
            elif _name(element) in _BLOCKS and _is_contents(element):
                marked.append((element, "edition_parts", "links"))
            elif _name(element) in ("docPartGallery", "pStyle") and re.match(
                "Table of C|(TOC|TM)\\d", "".join(element.attrib.values())
            ):
                part = next(element.iterancestors("{*}sdt", "{*}p"), element)
                marked.append((part, "edition_parts", "contents"))
    limit = _LARGEST_PART * sum(map(_size, roots))
    found = {element: kind for element, kind, mark in marked if sizes[mark] <= limit}
    for root in roots:
        for link in root.iter("{*}a"):
            text = "".join(link.itertext()).strip()
            label = re.fullmatch(r"[\[(]?(\d{1,3}|\*{1,3}|[a-z])[\])]?", text)
            if not label or "#" not in (link.get("href") or ""):
                continue
            outer = link.getparent() if _name(link.getparent()) == "sup" else link
            note = _note(targets.get(link.get("href").rpartition("#")[2]), link, label[1])
            if note is not None:
                found[note] = "notes"
            if note is not None or outer is not link or link.find(".//{*}sup") is not None or text[0] in "[(":
                found[outer] = "note_calls"
    return found


def _note(target: Any, link: Any, label: str) -> Any:
    """The paragraph that a call links to, if it begins with the call's figure or is numbered as an item of a list."""
    while target is not None and _name(target) not in _NOTE_BLOCKS:
        target = target.getparent()
    if target is None or any(ancestor is target for ancestor in link.iterancestors()) or not _text_before(link):
        return None
    begins = "".join(target.itertext()).lstrip(" [(\n\t").startswith(label)
    return target if begins or _name(target) == "li" else None


def _text_before(link: Any) -> bool:
    """Whether a link follows a word, as a call does and an entry of a table of contents does not."""
    while link is not None and _name(link) not in _BLOCKS:
        before = link.getprevious()
        text = (link.getparent().text if before is None else before.tail or "".join(before.itertext())) or ""
        if text.strip():
            return True
        link = link.getparent() if before is None else before
    return False


def _pieces(root: Any, counts: Counter[str], left_out: dict[Any, str], only: str) -> Iterator[str]:
    r"""The text in its order: `\n` at the edges of blocks, `\v` for a line end inside one."""
    preformatted = 0

    def spaced(text: str | None) -> str:
        return (text or "").replace("\n", "\v") if preformatted else re.sub(r"[ \t\r\n\f\v]+", " ", text or "")

    walker = etree.iterwalk(root, events=("start", "end", "comment", "pi"))
    for event, element in walker:
        name = _name(element)
        if name in _BLOCKS:
            yield "\n"
        if event != "start":
            preformatted -= event == "end" and name == "pre" and preformatted > 0
            if not only and element is not root:
                yield spaced(element.tail)
        elif element in left_out or name in _UNSEEN:
            counts.update([left_out[element]] if element in left_out else [])
            walker.skip_subtree()
        else:
            initial = element.get("alt", "") if name == "img" else ""  # a drawn initial: the first letter of a word
            yield initial if len(initial) == 1 else " " if element.tag == _SPACES else _SIGNS.get(name, "")
            preformatted += name == "pre"
            if only in ("", name):
                yield spaced(element.text)


def _is_contents(element: Any) -> bool:
    """Whether most of a text is links, as in a table of contents or a site's navigation; calls of notes are none."""
    texts = ["".join(link.itertext()) for link in element.iter("{*}a") if link.get("href")]
    links = [text.split() for text in texts if re.search(r"[^\W_]{3}|[IVXLC]", text)]
    return len(links) >= 3 and 2 * sum(map(len, links)) > len("".join(element.itertext()).split())


def _book_of(roots: list[Any], only: str = "") -> BookText:
    """The paragraphs of parsed documents; lines, where `<br>` or `<pre>` holds wrapped lines."""
    counts: Counter[str] = Counter()
    left_out = _left_out(roots)
    kept = [[*_pieces(root, counts, left_out, only), "\n"] for root in roots]
    text = "".join(piece for pieces in kept for piece in pieces)
    lines = re.findall(r"\v\s*(\w)", text)
    if len(lines) > 5 and sum(map(str.islower, lines)) > 0.3 * len(lines):
        return BookText(re.sub(r"\n\s*", "\n\n", text).replace("\v", "\n"), None, dict(counts), [])
    paragraphs = [re.sub("  +", " ", p.strip()) for p in re.split(r"[\n\v]", text)]
    return BookText("", [p for p in paragraphs if p], dict(counts), [])


def _read_rtf(data: bytes, name: str) -> BookText:
    source = data.decode("cp1252", "replace")
    mac = source.startswith("{\\rtf1\\mac")
    source = source.replace("\\ansicpg10000", "")  # a code page that Python has as mac_roman
    try:
        if not source.rstrip("\0\x1a \t\r\n").endswith("}"):  # cut off; with many open groups striprtf takes minutes
            raise ValueError
        text = rtf_to_text(source, "mac_roman" if mac else "cp1252", errors="replace")
    except (ValueError, TypeError, OverflowError) as error:
        raise BadInput(f"{name} is damaged: it is no whole RTF; fetch it again") from error
    return BookText("", [p for line in text.split("\n") if (p := line.strip())], {}, [])


def _read_html(data: bytes, name: str) -> BookText:
    text = re.sub(r"^\s*<\?xml[^>]*>", "", decode(data, name)) + "<p></p>"  # never empty
    root = lxml.html.document_fromstring(text, parser=lxml.html.HTMLParser(huge_tree=True))
    book = _book_of([root])
    sites = root.xpath("//main | //article | //*[@role='main'] | //*[contains(@class, 'mw-parser-output')]")
    for part in map(_book_of, ([element] for element in sorted(sites, key=_size, reverse=True))):
        if len(part.whole()) > 0.7 * len(book.whole()):
            book = part  # without what the site has around it
    if (words := len(book.whole().split())) < 100:
        raise BadInput(f"{name} is a web page, not a book ({words} words beside links): give the book's own address")
    return book


_LINES = _words("head title subtitle l v speaker ab text-author stage signed dateline")


def _read_xml(data: bytes, name: str) -> BookText:
    """TEI and FictionBook."""
    root = _parsed(data, name)
    bodies = [body for body in root.iter("{*}body") if body.get("name") not in ("notes", "comments")]
    for body in bodies:
        for choice in body.iter("{*}choice"):  # else both spellings
            etree.strip_elements(choice, "{*}orig", "{*}sic", "{*}abbr", with_tail=False)
        for element in body.iter("{*}*"):
            name = _name(element)
            if name in _LINES:
                element.tag = "p"
            elif name == "a" and element.get("type") == "note":
                element.set("class", "noteref")
    return _book_of(bodies)


def _read_office(data: bytes, name: str) -> BookText:
    """DOCX and ODT: python-docx is not used, since its paragraphs leave out what is in insertions and text boxes."""
    with _opened(data, name) as archive:
        docx = "word/document.xml" in archive.namelist()
        return _book_of([_xml(archive, "word/document.xml" if docx else "content.xml", name)], "t" if docx else "")


_FONTS = {"http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC"}
_ASIDE = ("toc", "cover", "title-page", "copyright-page", "colophon", "index", "notes")


def _read_epub(data: bytes, name: str) -> BookText:
    """The documents of the spine, in its order."""
    with _opened(data, name) as archive:
        if "META-INF/encryption.xml" in archive.namelist():
            methods = _xml(archive, "META-INF/encryption.xml", name).iter("{*}EncryptionMethod")
            if {method.get("Algorithm") for method in methods} - _FONTS:
                raise BadInput(f"{name} is an EPUB with copy protection (DRM): give an edition without it")
        container = _xml(archive, "META-INF/container.xml", name)
        path = next((e.get("full-path") for e in container.iter("{*}rootfile")), None)
        if not path:
            raise BadInput(f"{name} is damaged: META-INF/container.xml names no package; fetch it again")
        package, folder = _xml(archive, path, name), posixpath.dirname(path)
        items = {item.get("id"): item for item in package.iter("{*}item")}
        aside = {
            posixpath.normpath(unquote(reference.get("href", "").split("#")[0]))
            for reference in package.iter("{*}reference")
            if reference.get("type") in _ASIDE
        }
        roots, left_out, warnings = [], 0, []
        for entry in package.iter("{*}itemref"):
            item = items.get(entry.get("idref"))
            if item is None:
                warnings.append(f"{name}: its part {entry.get('idref')} is not in the file")
                continue
            if not re.search("xml|html", item.get("media-type", "")):
                continue
            href = posixpath.normpath(unquote(item.get("href", "")))
            part = posixpath.normpath(posixpath.join(folder, href))
            if href in aside or "nav" in item.get("properties", "").split() or entry.get("linear") == "no":
                left_out += 1
            elif (content := _member(archive, part, name)).strip():  # otherwise an empty chapter
                roots.append(_markup(content, f"{name}: {part}"))
    book = _book_of(roots)
    return book._replace(counts=dict(Counter(edition_parts=left_out) + Counter(book.counts)), warnings=warnings)


# --- zips and XML -----------------------------------------------------------------------------------------------------


def _opened(data: bytes, name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except (*DAMAGED, ValueError) as error:
        raise BadInput(f"{name} is a damaged zip, EPUB or DOCX ({error}): fetch it again") from error


def open_member(archive: zipfile.ZipFile, member: str, name: str) -> IO[bytes]:
    """A file in a zip, to read. Raises BadInput where it has a password."""
    try:
        return archive.open(member)
    except RuntimeError as error:  # a password; NotImplementedError, which is one: a method of packing
        raise BadInput(f"{name} has a password, or is packed as Python cannot unpack it: unpack it first") from error


def _member(archive: zipfile.ZipFile, member: str, name: str) -> bytes:
    try:
        with open_member(archive, member, name) as file:
            return file.read()
    except (*DAMAGED, KeyError, ValueError) as error:
        raise BadInput(f"{name} is damaged: {member} cannot be read from it; fetch it again") from error


def _xml(archive: zipfile.ZipFile, member: str, name: str) -> Any:
    return _markup(_member(archive, member, name), f"{name}: {member}")


def _markup(data: bytes, name: str) -> Any:
    """A parsed member. XHTML's named letters (`&eacute;`) are resolved first, since no DTD is loaded."""
    if not data.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, which lxml knows
        if not re.search(rb"encoding *= *.(?!utf-8)", data[:200], re.I):
            data = decode(data, name).encode()
        data = re.sub(
            rb"&(?!(?:amp|lt|gt|quot|apos);)[a-zA-Z]\w*;",
            lambda m: "".join(f"&#{ord(c)};" for c in html.unescape(m[0].decode())).encode(),
            data,
        )
    return _parsed(data, name)


def _parsed(data: bytes, name: str) -> Any:
    parser = etree.XMLParser(recover=True, resolve_entities=False, no_network=True, huge_tree=True)
    if (root := etree.fromstring(data or b" ", parser)) is None:  # of no bytes at all lxml raises its own
        raise BadInput(f"{name} is damaged: it is no XML; fetch it again")
    return root
