"""Reads books from a folder of parquet, page tables, JSONL or single books in any format of prep/formats.py.

    for document in read_books(Path("data/raw/gallica/gallica_mono_1.parquet")): ...

| file | a book is | fields |
|---|---|---|
| `*.parquet` | a row | the columns of PleIAs/French-PD-Books: `file_id`, `complete_text`; `title`, `author`, `date` where there are any |
| `*.tsv`, alone, in `.gz`, or any number in a `.zip` or `.tar[.gz]` | pages in a row whose `main_id` is the same but for its end, `_p12` | biglam/gallica_literary_fictions: `main_id`, `titre`, `nom_auteur`, `prenom_auteur`, `date`, `page`, `texte` (`_p_` begins a paragraph, lines are joined by spaces) |
| `*.jsonl`, `*.jsonl.gz` | a line | `id` (or `file_id`), `text` (or `complete_text`), `title`, `author`, `date` |
| `*.txt`, `.epub`, `.docx`, `.odt`, `.html`, `.rtf`, `.fb2`, `.xml` (TEI), `.pdf` | the file, or each in a `.zip` without tables | its name is identifier and title |

datatrove's own readers skip damaged lines, rows without text and what follows a bad byte, and hold up to 1,000 books at once.
These hold a few books, raise BadInput for a damaged table (half a corpus would be a wrong one), leave an odd field empty, and
say of a book that cannot be read why.
"""

import csv
import gzip
import io
import itertools
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from prep.common import BadInput, collected, reason
from prep.encodings import repaired
from prep.formats import BOOK_SUFFIXES, DAMAGED, BookText, attempt, open_member, read_book, read_members

FICTION_REPO, LIBRARY_REPO = "biglam/gallica_literary_fictions", "PleIAs/French-PD-Books"
# Of prose fiction in a file of the second: 2,000 books, 6.7 % of them by the library's shelfmark, 63,000 words, 1.8 tokens each.
LIBRARY_TOKENS = 15e6
BOOKS_A_BATCH = 8  # read at once; a book has up to 13 M characters
SUFFIXES = (".parquet", ".tsv", ".tsv.gz", ".zip", ".tar", ".tar.gz", ".tgz", ".jsonl", ".jsonl.gz", *BOOK_SUFFIXES)
_DAMAGED = (pa.ArrowException, tarfile.TarError, *DAMAGED)


def is_source(name: str) -> bool:
    """Is a file of this name one of books?"""
    return name.lower().endswith(SUFFIXES)


def source_paths(folder: Path) -> list[Path]:
    """The files of books in a folder, by name, also those that were dropped from it (gallica.py --drop-sources).

    Raises BadInput where there is none, or one that is no source.
    """
    there = {path.name for path in folder.glob("*") if path.is_file()}
    files = [folder / name for name in sorted(there | collected(folder)["files"].keys()) if is_source(name)]
    if not files:
        raise BadInput(f"no file of books in {folder} ({' '.join(SUFFIXES)}): python prep/collect.py gallica gets some")
    for path in files:
        if path.suffix.lower() == ".parquet" and path.name in there:
            check_columns(path)
    others = [n for n in sorted(there) if not is_source(n) and n[0] != "." and n != "source.json"]
    if others:
        print(f"{folder}: not read, since they are not books: {', '.join(others)}", file=sys.stderr)
    return files


def read_books(path: Path) -> Iterator[Document]:
    """Every book of a file, in order; `metadata` has title, author and date. Raises BadInput where the file is damaged."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _from_parquet(path)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _from_jsonl(path)
        elif name.endswith(BOOK_SUFFIXES) or (name.endswith(".zip") and not _has_tables(path)):
            yield from _from_formats(path)
        else:
            for table in _page_tables(path):
                yield from _from_pages(table, path.name)
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not in UTF-8 ({reason(error)}): convert it to UTF-8") from error


class Books(PipelineStep):
    """The head of the pipeline: each task reads one file of the source, and adds what users should know to `messages`."""

    name = "books"
    type = "READER"

    def __init__(self, files: list[Path], counter: Path, messages: Path):
        super().__init__()
        self.files, self.counter, self.messages = [path.resolve() for path in files], counter, messages

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with open(self.counter, "ab", buffering=0) as counter, open(self.messages, "ab", buffering=0) as messages:
            for document in read_books(self.files[rank]):
                for message in document.metadata.pop("warnings", []):
                    messages.write(f"{message}\n".encode())
                if "not read" in document.metadata:
                    messages.write(f"not read: {document.metadata['not read']}\n".encode())
                self.stat_update("total", "forwarded")
                self.update_doc_stats(document)
                for kind, count in document.metadata.pop("odd", {}).items():
                    self.stat_update(f"cleaning {kind}", value=count)
                counter.write(b".")  # for the progress bar
                yield document


def _book(source: Any, text: Any, title: Any = "", author: Any = "", date: Any = "") -> Document:
    """Fields as one line of text each, at most 300 characters, since some catalogues are absurd; odd ones empty.

    A text that has lost its letters is left empty, and `metadata["not read"]` says why.
    """

    def field(value: Any) -> str:
        return " ".join(str(value).split())[:300] if value is not None else ""

    metadata = {"title": field(title), "author": field(author), "date": field(date)}
    try:
        text = repaired(text, field(source)) if isinstance(text, str) else ""
    except BadInput as error:
        text, metadata["not read"] = "", str(error)
    return Document(text=text, id=field(source), metadata=metadata)


def _damaged(path: Path, error: Exception) -> BadInput:
    return BadInput(f"{path} is damaged ({reason(error)}): collect it again")


# --- the kinds of file -----------------------------------------------------------------------------------------------


def _opened(path: Path) -> pq.ParquetFile:
    try:
        # A buffer, and no reading ahead: otherwise a file's whole column of texts, a gigabyte, is held in memory.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def check_columns(path: Path) -> None:
    schema = _opened(path).schema_arrow
    for column in ("file_id", "complete_text"):
        if column not in schema.names:
            raise BadInput(f"{path} has no column {column} (it has {', '.join(schema.names)}); not French-PD-Books?")
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise BadInput(f"{path}: column {column} is {kind}, not text; not French-PD-Books?")


def _from_parquet(path: Path) -> Iterator[Document]:
    file = _opened(path)
    columns = [c for c in ("file_id", "title", "author", "date", "complete_text") if c in file.schema_arrow.names]
    for batch in file.iter_batches(BOOKS_A_BATCH, columns=columns):
        for index in range(batch.num_rows):
            row = {name: _value(batch.column(i)[index]) for i, name in enumerate(columns)}
            yield _book(row.pop("file_id"), row.pop("complete_text"), **row)


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _from_jsonl(path: Path) -> Iterator[Document]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = dict(orjson.loads(line))  # refuses half a pair of surrogates
            except (ValueError, TypeError) as error:
                raise BadInput(f"{path}, line {number} is not a JSON object: mend or collect it again") from error
            source, text = row.get("id", row.get("file_id")), row.get("text", row.get("complete_text"))
            yield _book(source, text, row.get("title"), row.get("author"), row.get("date"))


def _has_tables(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".tsv") for name in archive.namelist())


def _from_formats(path: Path) -> Iterator[Document]:
    """A file that is one book, or a zip of them."""
    if path.suffix.lower() == ".zip":
        books = read_members(path.read_bytes(), str(path))
    else:
        books = iter([(path.name, attempt(lambda: read_book(path)))])
    for name, book in books:
        stem = Path(name).stem
        document = _book(stem, book.whole() if isinstance(book, BookText) else "", stem)
        document.metadata |= {"warnings": book.warnings} if isinstance(book, BookText) else {"not read": str(book)}
        yield document


def _page_tables(path: Path) -> Iterator[IO[bytes]]:
    """The TSV tables of an archive, or the one that a file is."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for member in sorted(n for n in archive.namelist() if n.endswith(".tsv")):
                yield open_member(archive, member, str(path))
    elif path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(path) as tar:
            for entry in tar:
                if entry.isfile() and entry.name.endswith(".tsv") and (raw := tar.extractfile(entry)):
                    yield raw
    else:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as table:
            yield table  # type: ignore[misc]


_PAGE_ID = re.compile(r"_p\d+$")
_CUT_WORD = re.compile(r"(?<=[^\W\d_])- (?=[^\W\d_])")


def _plain(field: str | None) -> str:
    """A field as R writes it: NA for none, quotation marks around some, doubled inside."""
    text = "" if field in (None, "NA") else str(field)
    inner = text[1:-1]
    quoted = len(text) > 1 and text[0] == text[-1] == '"' and inner.count('"') == 2 * inner.count('""')
    return inner.replace('""', '"') if quoted else text


def _from_pages(table: IO[bytes], name: str) -> Iterator[Document]:
    """The books of one table of pages, each page by its number, once; a book's pages are consecutive rows."""
    csv.field_size_limit(sys.maxsize)  # a page is a field
    with io.TextIOWrapper(table, encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not rows.fieldnames:  # an empty table has no books
            return
        rows.fieldnames = [_plain(column) for column in rows.fieldnames]
        missing = {"main_id", "texte"} - set(rows.fieldnames)
        if missing:
            raise BadInput(f"a table in {name} has no column {missing.pop()}: these are not pages of Gallica's fiction")
        cells = ({column: _plain(row[column]) for column in rows.fieldnames} for row in rows)
        for source, group in itertools.groupby(cells, key=lambda row: _PAGE_ID.sub("", row["main_id"])):
            read = list(group)
            given = [page.get("page", "") for page in read]
            number = list(map(int, given)) if all(map(str.isdecimal, given)) else list(range(len(read)))
            pages = {n: page["texte"] for n, page in sorted(zip(number, read, strict=True), key=lambda pair: pair[0])}
            author = ", ".join(filter(None, (read[0].get(c) for c in ("nom_auteur", "prenom_auteur"))))
            # A word cut at a line's end has "- " in its middle: the cleaning joins it where it sees the line's end.
            text = "\f".join(_CUT_WORD.sub("-\n", page.replace("_p_", "\n\n")) for page in pages.values())
            book = _book(source, text, read[0].get("titre"), author, read[0].get("date"))
            odd = {
                "pages_twice": len(read) - len(pages),
                "pages_moved": sum(a > b for a, b in itertools.pairwise(number)),
            }
            book.metadata["odd"] = {kind: count for kind, count in odd.items() if count}
            yield book
