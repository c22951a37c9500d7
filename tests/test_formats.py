"""Files as people have them: the book's words come out in order, and what is no book is named."""

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from reportlab.lib.pagesizes import A5
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from prep.castle import clean_book
from prep.common import BadInput
from prep.formats import BookText, read_book, read_bytes
from prep.page_layout import clean_pages
from prep.readers import read_books, source_paths
from prep.typography import to_convention

PROSE = [
    "CHAPITRE PREMIER",
    "Le passeur avait loué la chambre 15, au-dessus de l’écurie, et depuis le 3 juillet il n’en descendait plus.",
    "— Que faites-vous là ? dit-elle en entrant avec la lampe, qu’elle posa sur la table.",
    "— Oui.",
    "Personne au village n’avait vu le maire depuis la crue, et l’on disait même qu’il jouait très tard, où ça lui plaisait.",
    "— Oui.",
]
LONG = PROSE * 5


def packed(members: Mapping[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def xhtml(body: str) -> str:
    space = 'xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"'
    return f'<?xml version="1.0"?><!DOCTYPE html><html {space}><head><title/></head><body>{body}</body></html>'


def epub(chapters: dict[str, str], spine: list[str], **more: str | bytes) -> bytes:
    """An EPUB whose spine is in another order than its manifest."""
    kinds = {n: "image/png" if n == "image" else "application/xhtml+xml" for n in chapters}
    items = "".join(f'<item id="{n}" href="{n}%20x.xhtml" media-type="{kind}"/>' for n, kind in kinds.items())
    order = "".join(f'<itemref idref="{n}"/>' for n in spine)
    guide = "".join(f'<reference type="{n if n == "cover" else "text"}" href="./{n}%20x.xhtml"/>' for n in chapters)
    package = (
        f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{order}</spine>'
        f"<guide>{guide}</guide></package>"
    )
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/content.opf"/></rootfiles></container>'
    )
    return packed(
        {"mimetype": "application/epub+zip", "META-INF/container.xml": container, "OEBPS/content.opf": package}
        | {f"OEBPS/{name} x.xhtml": xhtml(body) for name, body in chapters.items()}
        | more
    )


def tagged(paragraphs: list[str]) -> str:
    return "\n".join(f"<p>{p}</p>" for p in paragraphs)


def with_site(article: str) -> str:
    """A page as a site serves it: menu, cookie banner, advertisement, footer."""
    menu = "".join(f"<li><a href='/{n}'>Rubrique {n}</a></li>" for n in range(5))
    banner = (
        "<div id='cookie-banner'>Nous utilisons des témoins.</div><p hidden>Caché</p><p style='display: none'>Caché</p>"
    )
    return f"<html><body><ul>{menu}</ul>{banner}{article}<div id='footer'>Contact</div></body></html>"


def docx(paragraphs: list[str]) -> bytes:
    runs = "".join(
        f"<w:p><w:pPr/><w:r><w:t>{p[:9]}</w:t></w:r>\n<w:ins><w:r><w:instrText>PAGE</w:instrText><w:t>{p[9:]}</w:t></w:r></w:ins></w:p>"
        for p in paragraphs
    )
    deleted = (
        "<w:p><w:del><w:r><w:delText>effacé</w:delText></w:r></w:del></w:p>"
        '<w:p><w:pPr><w:pStyle w:val="TOC1"/></w:pPr><w:r><w:t>I 3</w:t></w:r></w:p>'
        '<w:pStyle w:val="TOC1"/>'  # of no paragraph
    )
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    document = f"<w:document {space}><w:body>{runs}{deleted}</w:body></w:document>"
    return packed({"[Content_Types].xml": "<Types/>", "word/document.xml": document})


def odt(paragraphs: list[str]) -> bytes:
    text = "".join(f"<text:p>{p.replace(' ', '<text:s/>', 1)}</text:p>" for p in paragraphs)
    note = "<text:p><text:note><text:note-body><text:p>Une note.</text:p></text:note-body></text:note></text:p>"
    space = 'xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0" xmlns:o="o"'
    content = f"<o:document-content {space}><o:body><o:text>{text}{note}</o:text></o:body></o:document-content>"
    return packed({"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": content})


def rtf_in(codec: str, head: str, paragraphs: list[str]) -> bytes:
    text = "\\par ".join("".join(c if c < "\x80" else f"\\'{c.encode(codec).hex()}" for c in p) for p in paragraphs)
    return f"{{\\rtf1{head} {text}}}".encode()


def rtf(paragraphs: list[str]) -> bytes:
    text = "".join("".join(c if c < "\x80" else f"\\u{ord(c)}?" for c in p) + "\\par\n" for p in paragraphs)
    return f"{{\\rtf1\\ansi{{\\info{{\\title Le titre}}}}{{\\header En-tete\\par}}{text}}}".encode()


def tei(paragraphs: list[str]) -> str:
    noise = "<note>Une note</note><fw>Un titre</fw>"
    text = f"<head>{paragraphs[0]}</head>" + tagged([f'<pb n="3"/>{p}{noise}' for p in paragraphs[1:]])
    text = text.replace("crue", "<choice><orig>crüe</orig><reg>crue</reg></choice>")
    header = "<teiHeader><title>Un titre</title></teiHeader>"
    body = f"<text><front><p>Avis</p></front><body><div>{text}</div></body></text>"
    return f'<?xml version="1.0"?><TEI xmlns="http://www.tei-c.org/ns/1.0">{header}{body}</TEI>'


def fb2(paragraphs: list[str]) -> str:
    text = tagged([f'{p}<a l:href="#n1" type="note">[1]</a>' for p in paragraphs[1:]])
    start = (
        '<?xml version="1.0" encoding="windows-1252"?><FictionBook xmlns="http://www.gribuser.ru/xml/fictionbook/2.0"'
    )
    body = f"<body><section><title><p>{paragraphs[0]}</p></title>{text}</section></body>"
    notes = '<body name="notes"><section id="n1"><p>Une note</p></section></body><binary>abcd</binary>'
    about = "<description><book-title>Un titre</book-title></description>"
    return f'{start} xmlns:l="http://www.w3.org/1999/xlink">{about}{body}{notes}</FictionBook>'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("epub", epub({"b": tagged(LONG[10:]), "a": tagged(LONG[:10])}, ["a", "b"])),
        ("docx", docx(LONG)),
        ("odt", odt(LONG)),
        ("rtf", rtf(LONG)),
        ("rtf of a Mac", rtf_in("mac_roman", "\\mac\\ansicpg10000", LONG)),
        ("rtf of Windows", rtf_in("cp1252", "", LONG)),
        ("epub in cp1252", epub({"a": "<p>x</p>"}, ["a"], **{"OEBPS/a x.xhtml": xhtml(tagged(LONG)).encode("cp1252")})),
        ("epub with a class", epub({"a": f'<div class="index">{tagged(LONG)}</div>'}, ["a"])),
        ("epub with notes", epub({"a": f'{tagged(LONG)}<div class="footnotes">{tagged(PROSE * 2)}</div>'}, ["a"])),
        ("epub with an empty chapter", epub({"b": "", "a": tagged(LONG)}, ["b", "a"], **{"OEBPS/b x.xhtml": ""})),
        (
            "html of Word",
            f"<!DOCTYPE html><body>{tagged([f'<a name=x>{p}</a><o:p></o:p>' for p in LONG])}</body>".encode(),
        ),
        ("html with drawn initials", f"<html>{tagged(LONG).replace('<p>P', '<p><img src=p.png alt=P>')}".encode()),
        ("html of a site", with_site(tagged(LONG)).encode()),
        (
            "html of a site with an article",
            with_site(f"<p>Publicité</p><article>{tagged(LONG)}</article>Pied").encode(),
        ),
        ("html in latin-1", f"<meta charset='iso-8859-1'>{tagged(LONG)}".encode("cp1252")),
        ("html with line ends", ("<html><body>" + "<br><br>".join(LONG)).encode()),
        ("tei", tei(LONG).encode()),
        ("fb2", fb2(LONG).encode("cp1252")),
        ("zip of an epub", packed({"livre.epub": epub({"a": tagged(LONG)}, ["a"]), "couv.jpg": b"\xff\xd8\xff"})),
    ],
)
def test_paragraphs_that_a_format_knows_come_out_as_they_went_in(tmp_path, name, data):
    (tmp_path / "livre").write_bytes(data)  # no suffix: what it is is in its content
    book = read_book(tmp_path / "livre")
    assert book.paragraphs == LONG
    cleaned = [to_convention(p) for p in LONG]
    assert clean_book(book).paragraphs == clean_pages(book.whole()).paragraphs == cleaned
    assert clean_book(BookText("", cleaned, {}, [])).paragraphs == cleaned


def test_a_part_that_an_epub_has_lost_is_named():
    book = read_bytes(epub({"a": tagged(LONG)}, ["a", "b"]), "livre")
    assert book.paragraphs == LONG and book.warnings == ["livre: its part b is not in the file"]


def test_a_character_in_two_halves_is_one():
    """RTF writes what is beyond U+FFFF as a pair of surrogates; half of one cannot be written to a file."""
    book = read_bytes(rtf([*LONG, "@"]).replace(b"@", rb"\u-10179?\u-8704?"), "livre")
    assert book.paragraphs == [*LONG, "\U0001f600"]


def test_what_an_edition_adds_stays_out_and_what_only_looks_like_it_stays():
    chapter = (
        '<nav epub:type="toc"><a href="b%20x.xhtml">I</a></nav><p><a href="#k1">1</a> <a href="#k2">2</a></p>'
        '<h2><a href="#toc">I<br/>La maison</a></h2>'
        '<p>Il s&eacute;journa<a href="c%20x.xhtml#n1"><sup>1</sup></a> l&agrave;<a href="c%20x.xhtml#n2">2</a>, R&amp;D,'
        ' 3<sup>e</sup> étage<span class="pagenum">[12]</span>, le 4.<a epub:type="noteref" href="#x">*</a></p>'
        "<div>Un bloc <!-- rien --> nu.<br/>et<p>Un autre<a href='#lost'>[3]</a>.</p> Sa queue.</div>"
        '<p>Oui<a href="#">[4]</a>. Non<a href="#">[5]</a>. Si<a href="#">[6]</a>.</p>'
        '<div id="k1">1. Voir le <a href="#k2">2</a> et le <a href="#k1">1</a>.</div><p id="k2">Le second.</p>'
    )
    notes = (
        '<p id="n1">1. La note <a href="a.xhtml#r1">↩</a></p><ol><li id="n2">La deuxième.</li></ol>'
        '<aside epub:type="footnote" id="x">Une autre.</aside><p>2. Ce qui n’est pas une note.</p>'
    )
    parts = "".join(f'<p><a href="a%20x.xhtml#{n}">Partie {n}</a></p>' for n in "abc")
    chapters = {"a": chapter, "c": notes, "cover": "<p>Couverture</p>", "t": parts, "image": "<p>Image</p>"}
    book = read_bytes(epub(chapters, ["cover", "image", "t", "a", "c"]), "livre")
    assert book.paragraphs == [
        *("1 2", "I", "La maison", "Il séjourna là, R&D, 3e étage, le 4.", "Un bloc nu.", "et", "Un autre."),
        *("Sa queue.", "Oui. Non. Si.", "1. Voir le 2 et le 1.", "Le second.", "2. Ce qui n’est pas une note."),
    ]
    assert book.counts == {"note_calls": 7, "notes": 3, "edition_parts": 4}


def test_project_gutenbergs_header_and_licence_in_an_epub_stay_out():
    first = tagged(
        ["The Project Gutenberg EBook of Un conte", "*** START OF THE PROJECT GUTENBERG EBOOK ***", "Produced by X"]
    )
    last = tagged(["*** END OF THE PROJECT GUTENBERG EBOOK ***", "Section 1. General terms"])
    book = read_bytes(epub({"a": first, "b": tagged(LONG), "c": last}, ["a", "b", "c"]), "livre")
    assert book.paragraphs == LONG and book.counts == {"edition_notes": 5}


@pytest.mark.parametrize(("tag", "end"), [("p", "<br>"), ("pre", "\n")])
def test_html_of_wrapped_lines_is_left_to_the_page_rules(tag, end):
    lines = ["Le passeur avait loué la chambre", "quinze, au-dessus de la grande", "écurie, et n’en sortait plus."] * 8
    page = f"<html><body><{tag}>{end.join(lines)}</{tag}><p>Une\nfin.</p></body></html>"
    book = read_bytes(page.encode(), "livre")
    assert book.paragraphs is None and book.text.strip() == "\n".join([*lines, "", "Une fin."])


def test_a_zip_of_texts_is_one_book_in_natural_order():
    names = ["ch 10.txt", "z.txt", "ch 2.txt", "ch 1.txt"]
    texts = {name: f"Le texte du fichier {name} est ici." for name in names}
    book = read_bytes(packed({"0.pdf": "%PDF-1.4 cut"} | texts), "livre.zip")
    assert book.text.split("\n\n") == [f"Le texte du fichier {n}.txt est ici." for n in ("ch 1", "ch 2", "ch 10", "z")]
    assert "ch 1.txt, ch 2.txt, ch 10.txt, z.txt" in book.warnings[0] and "0.pdf cannot be read" in book.warnings[1]


METHOD = '<e><EncryptionMethod xmlns="http://www.w3.org/2001/04/xmlenc#" Algorithm="{}"/></e>'
DRM = {"META-INF/encryption.xml": METHOD.format("aes128-cbc")}
FONTS = {"META-INF/encryption.xml": METHOD.format("http://www.idpf.org/2008/embedding")}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 99, "old Word file"),
        (b"Roman".ljust(60, b"\0") + b"BOOKMOBI" + bytes(99), "a Kindle book"),
        (b"ID3\x03" + bytes(99), "sound or film"),
        (b"MZ\x90\0" + bytes(99), "a program"),
        (b"\x1f\x8b\x08\0" + bytes(99), "an archive"),
        (b'{"titre": "Roman", "pages": [1, 2]}', "JSON data"),
        (b'{"text": "a"}\n{"text": "b"}\n', "JSON data"),
        (b"titre;auteur;date\n" + b"Roman;Anonyme;1880\n" * 9, "a table"),
        (b'<?xml version="1.0"?><catalogue xmlns="x"><livre/></catalogue>', "XML data (<catalogue>)"),
        (packed({f"{n}.png": b"\x89PNG\r\n\x1a\n" for n in range(9)}), "a zip without a book (0.png is a picture"),
        (b"AT&TFORM" + bytes(99), "DjVu"),
        (b"From: x\nMIME-Version: 1.0\n\n<html>", "a saved web page"),
        (b"1\n00:00:01,000 --> 00:00:02,000\nBonjour\n", "subtitles"),
        (b"\\documentclass{book}\n", "a TeX source"),
        (packed({"mimetype": "application/vnd.oasis.opendocument.spreadsheet"}), "OpenDocument table"),
        (b"12 13 14 15\n16 17 18 20\n" * 20, "figures"),
        (b"[" * 9999, "figures"),
        (b"<!---->" * 99, "figures"),
        (f"<html><body>{tagged(['Connexion requise'])}</body></html>".encode(), "a web page"),
        ("<html>" + "".join(f"<p><a href='{n}'>{p}</a></p>" for n, p in enumerate(LONG)), "a web page"),
        (epub({"a": tagged(LONG)}, ["a"], **DRM), "copy protection"),
        (epub({"a": "<img src='1.jpg'/>"}, ["a"]), "no text"),
        (epub({"a": ""}, ["a"], **{"OEBPS/a x.xhtml": ""}), "no text"),
        (epub({"a": tagged(LONG)}, ["a"])[:-300], "damaged"),
        (rtf(LONG).replace(b"\\u", b"\\u9999", 1), "damaged: it is no whole RTF"),
        (b"{\\rtf1 " + b'{\\field{\\*\\fldinst{HYPERLINK "x"' * 99, "damaged: it is no whole RTF"),
        (rtf(LONG)[:-300], "damaged: it is no whole RTF"),  # cut off
        (odt(LONG)[:500] + odt(LONG)[600:], "damaged: mimetype cannot be read"),  # lost on the way
        (odt(LONG).replace(b"\x14\x03\x14\0", b"\x14\x03\xff\0"), "a damaged zip"),  # a version of the future
        (odt(LONG).replace(b"\x14\0\0\0\0\0", b"\x14\0\0\0\x09\0"), "or is packed as Python"),  # Deflate64
        (odt(LONG).replace(b"vnd.oasis", b"vnd.oasiS", 1), "mimetype cannot be read"),
        (epub({}, ["a"], **{"OEBPS/content.opf": ""}), "content.opf is damaged: it is no XML"),
        (epub({}, ["a"], **{"META-INF/container.xml": "<container/>"}), "container.xml names no package"),
        (packed({"a.txt": "Un roman.", "b.html": f"<html>{tagged(LONG)}</html>"}), "several books (a.txt, b.html)"),
        (packed({"[Content_Types].xml": "<T/>", "xl/workbook.xml": "<w/>"}), "an Excel workbook"),
    ],
)
def test_what_is_no_book_is_named(data, words):
    with pytest.raises(BadInput) as error:
        read_bytes(data if isinstance(data, bytes) else data.encode(), "fichier")
    message = str(error.value)
    assert message.startswith("fichier") and words in message and "\n" not in message


def test_texts_that_begin_like_something_else_are_books():
    assert read_bytes(epub({"a": tagged(LONG)}, ["a"], **FONTS), "livre").paragraphs == LONG
    for charset in ("undefined", "utf-16"):  # no codec, and not what the tag itself is in
        page = f"<html><head><meta charset={charset}></head><body>{tagged(LONG * 3)}</body></html>"
        assert read_bytes(page.encode(), "livre").paragraphs == LONG * 3
    for text in (
        *("[Illustration]\nLe bac.", "<< Oui >>, dit-il.", "<Prologue>\nLe bac.", "1914\nLe bac partit.", "MMe B..."),
        *("Il vint, vit, et partit.\n" * 9, "Oui;non;oui\n" * 3, "Oui;non;oui\nOui\n" * 9, "Oui;non\n" * 9),
    ):
        assert read_bytes(text.encode(), "livre") == BookText(text, None, {}, [])


def test_a_folder_of_books_in_any_format_is_a_corpus(tmp_path, capsys):
    (tmp_path / "ancien.txt").write_bytes("\n\n".join(LONG).encode("cp1252"))
    (tmp_path / "livre.epub").write_bytes(epub({"a": tagged(LONG)}, ["a"]))
    (tmp_path / "lot.zip").write_bytes(packed({"a.docx": docx(LONG), "b.jpg": b"\xff\xd8\xff"}))
    (tmp_path / "notes.doc").write_bytes(b"\xd0\xcf\x11\xe0")
    books = [book for path in source_paths(tmp_path) for book in read_books(path)]
    assert [book.id for book in books] == ["ancien", "livre", "a", "b"]
    assert {book.text for book in books[:3]} == {"\n\n".join(LONG)}
    assert "b.jpg is a picture" in books[3].metadata["not read"]
    assert "notes.doc" in capsys.readouterr().err


def test_castle_keeps_the_words_of_known_paragraphs():
    paragraphs = ["12", "CHAPITRE I", "« Oui. »", "Le com-", "Jamais !", "« Oui. »", "et il s'en alla", "13"] * 5
    assert clean_book(BookText("", paragraphs, {}, [])).paragraphs == paragraphs
    marked = ["_Le Temps_ parut[1].", "Il lut **Les Débats** (2).", "[1] Une note.", "(2) Une autre."]
    assert clean_book(BookText("", marked, {}, [])).paragraphs == ["Le Temps parut.", "Il lut Les Débats."]


# --- PDFs ------------------------------------------------------------------------------------------------------------


class Page:
    """Draws lines: `^1` is a raised figure."""

    def __init__(self, path: Path):
        self.path = path
        self.canvas = Canvas(str(path), pagesize=A5)

    def lines(self, x: float, y: float, texts: list[str], size: float = 11) -> None:
        for n, text in enumerate(texts):
            drawn = self.canvas.beginText(x, y - 14 * n)
            for part in re.split(r"(\^\d)", text):
                drawn.setFont("Times-Roman", 0.6 * size if part.startswith("^") else size)
                drawn.setRise(4 * part.startswith("^"))
                drawn.textOut(part.lstrip("^"))
            self.canvas.drawText(drawn)

    def line(self, x: float, y: float, text: str, size: float = 11) -> None:
        self.lines(x, y, [text], size)

    def read(self) -> BookText:
        self.canvas.save()
        return read_book(self.path)


@pytest.fixture
def pdf(tmp_path: Path) -> Page:
    return Page(tmp_path / "livre.pdf")


def test_footnotes_leave_with_their_calls_across_pages(pdf):
    texts = ["Le passeur avait loué la chambre 2, au-dessus^1 de l'écurie,", "et depuis le 3 juillet il y restait^2."]
    pdf.lines(40, 560, texts)
    pdf.lines(40, 80, ["1. Voir le plan de la maison, qui est perdu.", "2. Il faisait froid, et l'on voyait le"], 8)
    pdf.line(200, 40, "– 12 –", 9)
    pdf.canvas.showPage()
    after = ["Il y resta seul jusqu'au soir du 14 juillet, sans lumière.", "Il relut la lettre :"]
    quoted = "3. Venez, disait-elle, et n'en dites rien."  # nothing calls it
    pdf.lines(40, 560, after)
    pdf.line(60, 500, quoted, 8)
    pdf.line(40, 66, "fleuve geler en plein mois de juillet.", 8)
    pdf.line(200, 40, "– 13 –", 9)
    book = pdf.read()
    first, second = (page.split("\n") for page in book.text.split("\f"))
    assert first == [*(re.sub(r"\^\d", "", text) for text in texts), "– 12 –"]
    assert second == [*after, quoted, "– 13 –"]
    assert book.counts == {"footnotes": 2}


COLUMNS = [[f"{side} ligne {n}, la suite du récit" for n in range(12)] for side in ("gauche", "droite")]


@pytest.mark.parametrize("by_row", [True, False])
def test_two_columns_are_read_one_after_the_other(pdf, by_row):
    title = "LE TITRE DU CHAPITRE, QUI VA D'UN BORD À L'AUTRE"
    pdf.line(60, 570, title)
    cells = [(40 + 190 * c, 545 - 14 * n, text) for c, column in enumerate(COLUMNS) for n, text in enumerate(column)]
    for x, y, text in sorted(cells, key=lambda cell: (-cell[1], cell[0])) if by_row else cells:
        pdf.line(x, y, text)
    pdf.line(205, 40, "12")
    assert pdf.read().text.split("\n") == [title, *COLUMNS[0], *COLUMNS[1], "12"]


def test_the_last_page_of_a_book_in_two_columns_is_short(pdf):
    for height in (12, 12, 12, 3):
        for n in range(height):
            pdf.line(40, 545 - 14 * n, COLUMNS[0][n])
            pdf.line(230, 545 - 14 * n, COLUMNS[1][n])
        pdf.canvas.showPage()
    assert pdf.read().text.split("\f")[3].split("\n") == [*COLUMNS[0][:3], *COLUMNS[1][:3]]


def test_a_watermark_across_the_page_is_no_text(pdf):
    lines = [f"Le passeur vint avec la lampe {n} fois." for n in range(9)]
    pdf.lines(40, 560, lines)
    pdf.canvas.rotate(45)
    pdf.line(400, 100, "BIBLIOTHÈQUE", 40)
    assert pdf.read().text.split() == " ".join(lines).split()


def test_three_columns_are_said(pdf):
    for n in range(14):
        for c in range(3):
            pdf.line(30 + 130 * c, 545 - 14 * n, f"colonne {c} ligne {n}")
    assert "page 1 is set in three columns" in pdf.read().warnings[0]


def test_a_drop_capital_is_of_its_word_and_a_cut_word_keeps_its_line_end(pdf):
    for y, capital, rest in (
        (540, "L", "e passeur avait loué la chambre du com-"),
        (440, "A", "la fin de l'été il s'en fut au loin."),
    ):
        pdf.line(40, y, capital, 33)
        pdf.lines(62 if capital == "L" else 66, y + 14, [rest, "pagnon de son père, qui vint à la nuit."])
        pdf.lines(40, y - 14, ["Il y resta, et le compagnon aussi."] * 4)
    lines = pdf.read().text.split("\n")
    assert lines[:2] == ["Le passeur avait loué la chambre du com-", "pagnon de son père, qui vint à la nuit."]
    assert lines[6] == "A la fin de l'été il s'en fut au loin."


@pytest.mark.parametrize(("scans", "refused"), [(3, False), (20, True)])
def test_pages_without_text_are_counted_and_named(pdf, scans, refused):
    image = ImageReader(io.BytesIO(b"P5 1 1 255\n\x80"))
    for number in range(30):
        if 5 <= number < 5 + scans:
            pdf.canvas.drawImage(image, 0, 0, *A5)
        elif number != 2:  # that one is blank
            pdf.lines(40, 560, PROSE)
        pdf.canvas.showPage()
    words = f"{scans} of 30 pages have no text layer (page 6-{5 + scans})"
    if refused:
        with pytest.raises(BadInput, match=re.escape(words)):
            pdf.read()
    else:
        book = pdf.read()
        assert words in book.warnings[0] and book.counts["pages_without_text"] == scans


def pdf_with_glyphs(text: str, unnamed: str) -> bytes:
    """A PDF of one page whose font gives some letters names that say nothing."""
    codes = {letter: 1 + n for n, letter in enumerate(unnamed)}
    names = "".join(f" {code} /g{code}" for code in codes.values())
    string = "".join(f"{codes.get(c, ord(c)):02x}" for c in text)
    stream = f"BT /F 12 Tf 40 500 Td <{string}> Tj ET"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 900 600]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>",
        f"<</Length {len(stream)}>>\nstream\n{stream}\nendstream",
        f"<</Type/Font/Subtype/Type1/BaseFont/Times-Roman/Encoding<</Type/Encoding/Differences[{names}]>>>>",
    ]
    body = "".join(f"{n} 0 obj\n{thing}\nendobj\n" for n, thing in enumerate(objects, 1))
    return f"%PDF-1.4\n{body}trailer<</Root 1 0 R>>\n".encode("latin-1")


def test_a_pdf_that_does_not_say_its_letters_is_refused():
    text = "Nous croyons devoir prevenir le public que malgre le titre * "
    assert read_bytes(pdf_with_glyphs(text, ""), "livre").text.split() == text.split()
    assert read_bytes(pdf_with_glyphs(text, "*"), "livre").text.split() == text.split()[:-1]  # an ornament
    book = read_bytes(pdf_with_glyphs(f"{text}azur", "z"), "livre")
    assert book.warnings == ["livre: 1 letters without a Unicode value left out, on page 1"]
    with pytest.raises(BadInput, match=r"does not say what its letters are: 8 letters on 1 of 1 pages"):
        read_bytes(pdf_with_glyphs(text, "e"), "livre")


def test_a_pdf_of_blank_pages_is_refused(pdf):
    pdf.canvas.showPage()
    with pytest.raises(BadInput, match="has no text layer"):
        pdf.read()


def test_a_pdf_of_which_a_page_cannot_be_read_is_refused():
    with pytest.raises(BadInput, match=r"cannot be read as a PDF \(Failed to load page"):
        read_bytes(pdf_with_glyphs("Un roman", "").replace(b"3 0 obj", b"9 0 obj"), "livre")
