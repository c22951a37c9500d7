"""The demo's own texts as the files that the real run reads: a parquet file of scanned pages, a PDF.

    python demo/corpus.py --out demo/run/sources

The tales of demo/corpus/contes become `gallica/gallica_mono_1.parquet` in the schema of PleIAs/French-PD-Books: pages of
lines that end in a space, words cut at line ends, running headers, page numbers, a library stamp, a lost line. The
novella of demo/corpus/novella.txt becomes `novella.pdf`, a page number at the foot of each page. The same texts give the same bytes.
"""

from prep.command import run

import argparse
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyphen
from reportlab.lib.pagesizes import A5
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import Paragraph, SimpleDocTemplate

from prep.common import atomic_write

CORPUS = Path(__file__).with_name("corpus")
LINE, PAGE = 58, 34  # characters a line and lines a page of an octavo volume
HYPHENS = pyphen.Pyphen(lang="fr_FR", left=3, right=3)


class Work(NamedTuple):
    """One text of the corpus: a header of three lines, a blank one, then a paragraph a block."""

    file_id: str
    title: str
    author: str
    date: str
    paragraphs: list[str]


def read_work(path: Path) -> Work:
    """Parse `Titre : ...`, `Auteur : ...`, `Date : ...`, blank line, paragraphs."""
    header, _, body = path.read_text(encoding="utf-8").partition("\n\n")
    fields = dict(line.split(" : ", 1) for line in header.splitlines() if " : " in line)
    paragraphs = [block.strip() for block in body.split("\n\n") if block.strip()]
    return Work(path.stem, fields["Titre"], fields["Auteur"], fields["Date"], paragraphs)


def set_lines(paragraph: str) -> list[str]:
    """Break a paragraph into lines of at most LINE characters, cutting words by French rules as a compositor would."""
    lines, line = [], ""
    for word in paragraph.split():
        joined = f"{line} {word}" if line else word
        if len(joined) <= LINE:
            line = joined
            continue
        cut = HYPHENS.wrap(word, LINE - len(line) - 1) if LINE - len(line) > 6 else None
        if cut:
            lines.append(f"{line} {cut[0]}")
            line = cut[1]
        else:
            lines.append(line)
            line = word
    return [*lines, line]


def as_scan(work: Work) -> str:
    """The work as recognised pages: `complete_text` of French-PD-Books."""
    lines = [line for paragraph in work.paragraphs for line in set_lines(paragraph)]
    pages = [lines[at : at + PAGE] for at in range(0, len(lines), PAGE)]
    front = [work.title.upper(), f"PAR {work.author.upper()}", "BIBLIOTHÈQUE NATIONALE"]
    out = ["\n".join(f"{line} " for line in front)]
    for number, page in enumerate(pages, start=5):
        if number == 5:
            header: list[str] = []
        elif number % 2:
            header = [f"{work.title.upper()}. {number}"]
        elif number % 4:
            header = [f"— {number} —"]
        else:
            header = [f"{number} {work.title.upper()}."]
        text = [*header, *page]
        if number == 5 + len(pages) // 2:
            text.append("[texte_manquant]")  # what a scan lost, and says so
        out.append("\n".join(f"{line} " for line in text))
    return " \n \n".join(out) + "\n"


def write_parquet(works: list[Work], path: Path) -> None:
    """One row a work, in the columns of PleIAs/French-PD-Books."""
    rows = []
    for work in works:
        text = as_scan(work)
        rows.append(
            {"file_id": f"conte{work.file_id[:2]}", "ocr": "99", "title": work.title, "date": work.date, "author": work.author,
             "page_count": text.count(" \n \n") + 1, "word_count": len(text.split()), "character_count": len(text),
             "complete_text": text}
        )  # fmt: skip
    with atomic_write(path, "wb") as handle:
        pq.write_table(pa.Table.from_pylist(rows), handle)


class PocketEdition(Canvas):
    """Puts `– 5 –` at the foot of each page, after its lines, where a book's text layer has it."""

    def showPage(self) -> None:
        self.setFont("Times-Roman", 9)
        self.drawCentredString(A5[0] / 2, 28, f"– {self.getPageNumber() + 4} –")
        super().showPage()


def write_pdf(work: Work, path: Path) -> None:
    """The work as a small book with a text layer. As in the books it stands for, an en dash opens a line of dialogue."""
    style = ParagraphStyle("novella", fontName="Times-Roman", fontSize=10.5, leading=13, firstLineIndent=14)
    with atomic_write(path, "wb") as handle:
        document = SimpleDocTemplate(
            handle, pagesize=A5, leftMargin=48, rightMargin=48, topMargin=48, bottomMargin=52, title=work.title,
            author=work.author, invariant=1,  # no date in the file: same text, same bytes
        )  # fmt: skip
        document.build(
            [Paragraph(text.replace("— ", "– "), style) for text in work.paragraphs], canvasmaker=PocketEdition
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args()
    tales = [read_work(path) for path in sorted((CORPUS / "contes").glob("*.txt"))]
    write_parquet(tales, args.out / "gallica" / "gallica_mono_1.parquet")
    write_pdf(read_work(CORPUS / "novella.txt"), args.out / "novella.pdf")
    print(f"{len(tales)} tales and the novella in {args.out}")


if __name__ == "__main__":
    run(main)
