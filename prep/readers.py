"""Books from a local folder, whatever they lie in: parquet, page tables, JSONL or plain text.

| file | a book is | fields |
|---|---|---|
| `*.parquet` | a row | the columns of PleIAs/French-PD-Books: `file_id`, `complete_text`; `title`, `author`, `date` where there are any |
| `*.tsv`, alone, in `.gz`, or any number in a `.zip` or `.tar[.gz]` | the pages of one `main_id` | biglam/gallica_literary_fictions: `main_id`, `titre`, `nom_auteur`, `prenom_auteur`, `date`, `page`, `texte` (`_p_` ends a paragraph) |
| `*.jsonl`, `*.jsonl.gz` | a line | `id` (or `file_id`), `text` (or `complete_text`), `title`, `author`, `date` |
| `*.txt` | the file | its name is identifier and title |

A file is read a few books at a time and never held whole. One that cannot be read to its end raises BadInput: a corpus
of half its books would be a wrong one. A book whose fields are odd comes with what can be read of them.
"""

import csv
import gzip
import io
import itertools
import json
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from prep.common import BadInput

BOOKS_A_BATCH = 8  # read at once; a book has up to 13 M characters
SUFFIXES = (".parquet", ".tsv", ".tsv.gz", ".zip", ".tar", ".tar.gz", ".tgz", ".jsonl", ".jsonl.gz", ".txt")


class Book(NamedTuple):
    """A book as its source gives it; missing fields are empty."""

    source: str  # the identifier in the source, such as Gallica's ark
    title: str
    author: str
    date: str
    text: str


def source_paths(folder: Path) -> list[Path]:
    """The files of books in a folder, by name. Raises BadInput where there is none, or one that is clearly no source."""
    files = sorted(p for p in folder.glob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise BadInput(
            f"no file of books in {folder} ({' '.join('*' + s for s in SUFFIXES)}): collect some first (python prep/collect.py gallica)"
        )
    for path in files:
        if path.suffix == ".parquet":
            _check_columns(path)
    return files


def read_books(path: Path) -> Iterator[Book]:
    """Every book of a file, in the file's order. Raises BadInput where the file is damaged."""
    name = path.name
    try:
        if name.endswith(".parquet"):
            yield from _from_parquet(path)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _from_jsonl(path)
        elif name.endswith(".txt"):
            yield Book(path.stem, path.stem, "", "", path.read_text(encoding="utf-8", errors="replace"))
        else:
            for table in _page_tables(path):
                yield from _from_pages(table, name)
    except (pa.ArrowException, zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise BadInput(f"{path} is damaged ({_first_line(error)}): collect it again") from error


class Books(PipelineStep):
    """The reader at the head of the pipeline: each task reads one file of the source."""

    name = "books"
    type = "READER"

    def __init__(self, files: list[Path]):
        super().__init__()
        self.files = [str(path.resolve()) for path in files]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for path in self.files[rank::world_size]:
            for book in read_books(Path(path)):
                document = Document(
                    text=book.text,
                    id=book.source,
                    metadata={"title": book.title, "author": book.author, "date": book.date},
                )
                self.stat_update("total", "forwarded")
                self.update_doc_stats(document)
                yield document


# --- the kinds of file -----------------------------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _field(value: Any) -> str:
    """A catalogue field as one line of text; 300 characters, since some are absurd."""
    return " ".join(str(value).split())[:300] if value is not None else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _opened(path: Path) -> pq.ParquetFile:
    try:
        # A buffer, and no reading ahead: otherwise a file's whole column of texts, a gigabyte, is held in memory.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} is no whole parquet file ({_first_line(error)}): collect it again") from error


def _check_columns(path: Path) -> None:
    schema = _opened(path).schema_arrow
    for column in ("file_id", "complete_text"):
        if column not in schema.names:
            raise BadInput(f"{path} has no column {column} (it has {', '.join(schema.names)}); not French-PD-Books?")
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise BadInput(f"{path}: column {column} is {kind}, not text; not French-PD-Books?")


def _from_parquet(path: Path) -> Iterator[Book]:
    file = _opened(path)
    columns = [c for c in ("file_id", "title", "author", "date", "complete_text") if c in file.schema_arrow.names]
    try:
        for batch in file.iter_batches(BOOKS_A_BATCH, columns=columns):
            for index in range(batch.num_rows):
                row = {name: _value(batch.column(i)[index]) for i, name in enumerate(columns)}
                source, title, author, date = (_field(row.get(c)) for c in ("file_id", "title", "author", "date"))
                yield Book(source, title, author, date, _text(row["complete_text"]))
    except OSError as error:
        raise BadInput(f"{path} is damaged ({_first_line(error)}): collect it again") from error


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _from_jsonl(path: Path) -> Iterator[Book]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise BadInput(f"{path}, line {number} is no JSON object: mend or collect it again")
            source = row.get("id") if row.get("id") is not None else row.get("file_id")
            text = row.get("text") if row.get("text") is not None else row.get("complete_text")
            title, author, date = (_field(row.get(c)) for c in ("title", "author", "date"))
            yield Book(_field(source), title, author, date, _text(text))


def _page_tables(path: Path) -> Iterator[IO[str]]:
    """The TSV tables of an archive, or the one that a file is."""

    def decoded(raw: IO[bytes]) -> IO[str]:
        return io.TextIOWrapper(raw, encoding="utf-8", errors="replace", newline="")

    name = path.name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for member in sorted(n for n in archive.namelist() if n.endswith(".tsv")):
                yield decoded(archive.open(member))
    elif name.endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(path) as tar:
            for entry in tar:
                if entry.isfile() and entry.name.endswith(".tsv") and (raw := tar.extractfile(entry)):
                    yield decoded(raw)
    elif name.endswith(".gz"):
        with gzip.open(path, "rb") as packed:
            yield decoded(packed)  # type: ignore[arg-type]
    else:
        with open(path, "rb") as plain:
            yield decoded(plain)


def _from_pages(table: IO[str], name: str) -> Iterator[Book]:
    """The books of one table of pages; a book's pages stand one after the other."""
    csv.field_size_limit(sys.maxsize)  # a page is a field
    with table:
        rows = csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not rows.fieldnames:  # an empty table has no books
            return
        missing = {"main_id", "texte"} - set(rows.fieldnames)
        if missing:
            raise BadInput(f"a table in {name} has no column {missing.pop()}: these are not pages of Gallica's fiction")
        for source, pages in itertools.groupby(rows, key=lambda row: row["main_id"]):
            held = list(pages)
            first = held[0]
            author = ", ".join(filter(None, (_field(first.get(c)) for c in ("nom_auteur", "prenom_auteur"))))
            text = "\f".join((row["texte"] or "").replace("_p_", "\n") for row in held)
            yield Book(_field(source), _field(first.get("titre")), author, _field(first.get("date")), text)
