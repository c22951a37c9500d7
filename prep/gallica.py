"""Steps 1a and 1b: training rows from the books of Gallica.

    python prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 512 \\
        --windows 1000000 --split 1/2 --seed 42 --out data/2a.jsonl
    python prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 2048 \\
        --windows 250000 --split 2/2 --seed 42 --out data/2b.jsonl

Reads every parquet file of a folder (the columns of PleIAs/French-PD-Books), a few books at a time. A book is cleaned,
then either held out as a whole or cut into segments, of which each split takes its own: rows of split 1/2 and of split
2/2 never share a passage, whatever the tokenizer, the seed and the sequence length, so that either file can be made
again alone. Windows are drawn evenly from as many books as there are. `--windows all` takes everything.

Which books are held out hangs on their titles and --holdout alone: give both splits the same --holdout, and neither
trains on what the other holds out. Same input and seed give the same bytes, however the books lie in files.
"""

import argparse
import hashlib
import itertools
import json
import math
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from prep.files import BadInput, run
from prep.pages import clean_pages
from prep.rows import Cutter, Row, load_tokenizer, source_files, write_prepared

BOOKS_A_BATCH = 8  # read at once; a book has up to 13 M characters
SHORTEST = 4_000  # characters after cleaning; below, it is a leaflet or a failed scan
# 16 windows of 2048 tokens at 3 characters a token. A segment's last window is lost by half on average: 1,024 tokens
# of 32,768, 3 %. Smaller segments lose more, and larger ones leave fewer to a book (the average one has 4 of these).
SEGMENT = 98_304
# For planning only. French has 3.0 characters a token in Llama's vocabulary of 32 k and up to 4 in larger ones. Set too
# high, more is tokenised than is needed; too low, a second reading may be.
CHARACTERS_A_TOKEN = 3.5
HELDOUT_TOKENS = 262_144  # the default: enough for a validation loss to two decimals, and read in a minute on a GPU


# --- what a book is --------------------------------------------------------------------------------------------------


class Book(NamedTuple):
    """A book as the library gives it; missing fields are empty."""

    source: str
    title: str
    author: str
    date: str
    text: str


def fraction(*parts: object) -> float:
    """A number in [0, 1) that hangs on the parts alone: a draw that needs neither order nor memory."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56


_VOLUME = re.compile(
    r"\b(?:tome|tom|t|volume|vol|v|partie|part|livre|serie)\b *(?:\d+|[ivxlc]+)\b.*|\b(?:\d+|[ivxlc]+)$"
)
_SUBTITLE = re.compile(
    r"[:;/(\[=]|, *(?=(?:roman|nouvelle|conte|recit|histoire|etude|poe[ms]|drame|comedie|souvenir|moeurs))"
)
_ARTICLE = re.compile(r"^(?:le|la|les|l|un|une|des|du|de|d) ")


def work_of(title: str, source: str) -> str:
    """The work a book is an edition of: its title without subtitle, volume, article, accents and case.

    The author is left out on purpose. Editions spell him in many ways or not at all, and to put the works of two
    authors that bear one title on the same side costs nothing, while one edition on either side is a leak.
    A book without title stands for itself.
    """
    letters = unicodedata.normalize("NFKD", title.casefold().replace("œ", "oe").replace("æ", "ae"))
    letters = "".join(c for c in letters if not unicodedata.combining(c))
    main = _SUBTITLE.split(letters, maxsplit=1)[0]
    for candidate in (main, letters):
        words = re.sub(r"[^a-z0-9]+", " ", candidate).strip()
        work = _ARTICLE.sub("", _VOLUME.sub("", words).strip()) or words
        if work:
            return work
    return source


class HeldOut:
    """Decides which works are held out: those whose hash falls into the first `share` of all hashes.

    Neither seed nor corpus enters, so that every stage holds out the same works. Only where no work of the corpus
    falls there (a few dozen books), the one that comes nearest is held out.
    """

    def __init__(self, share: float, works: Iterable[str]):
        nearest = min((fraction("held out", work) for work in works), default=0.0)
        self.limit = 0.0 if share == 0 else max(share, math.nextafter(nearest, 1))

    def __call__(self, work: str) -> bool:
        return fraction("held out", work) < self.limit


# --- reading ---------------------------------------------------------------------------------------------------------


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, by name, each with a footer that can be read and the columns that are needed."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise BadInput(f"no *.parquet in {folder}: collect some first (python prep/collect.py gallica)")
    for path in files:
        schema = _opened(path).schema_arrow
        for column in ("file_id", "complete_text"):
            if column not in schema.names:
                raise BadInput(
                    f"{path} has no column {column} (it has {', '.join(schema.names)}); not French-PD-Books?"
                )
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise BadInput(f"{path}: column {column} is {kind}, not text; not French-PD-Books?")
    return files


def _opened(path: Path) -> pq.ParquetFile:
    try:
        # A buffer, and no reading ahead: otherwise a file's whole column of texts, a gigabyte, is held in memory.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} is no whole parquet file ({_first_line(error)}): collect it again") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _records(path: Path, columns: tuple[str, ...], rows: int) -> Iterator[dict[str, Any]]:
    """The rows of a file, a few at a time. A text that is no valid UTF-8 comes as None, a missing column not at all."""
    file = _opened(path)
    try:
        for batch in file.iter_batches(rows, columns=[c for c in columns if c in file.schema_arrow.names]):
            for index in range(batch.num_rows):
                yield {
                    name: _value(column[index]) for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} is damaged ({_first_line(error)}): collect it again") from error


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _field(value: Any) -> str:
    """A catalogue field as one line of text; 300 characters, since some are absurd."""
    return " ".join(str(value).split())[:300] if value is not None else ""


class Entry(NamedTuple):
    """What planning needs of a book, before its text is read."""

    work: str
    characters: int  # as the catalogue says; 0 where it says nothing


def catalogue(files: list[Path]) -> list[Entry]:
    """The books' works and lengths, from small columns only: the texts stay on the disk."""
    entries = []
    for path in files:
        for record in _records(path, ("file_id", "title", "character_count"), 10_000):
            size = record.get("character_count")
            work = work_of(_field(record.get("title")), _field(record["file_id"]))
            entries.append(Entry(work, max(0, size) if isinstance(size, int) else 0))
    return entries


def read_books(files: list[Path]) -> Iterator[Book]:
    """Every row of every file."""
    columns = ("file_id", "title", "author", "date", "complete_text")
    for path in files:
        for record in _records(path, columns, BOOKS_A_BATCH):
            source, title, author, date = (_field(record.get(column)) for column in columns[:4])
            yield Book(source, title, author, date, record["complete_text"] or "")


# --- from a book to its passages -------------------------------------------------------------------------------------


def segments(text: str, splits: int) -> list[str]:
    """Cut a cleaned book into equal segments, as many for each split, at the ends of paragraphs.

    Only the text and the number of splits decide, so that splits are disjoint whoever takes them, and when. A book
    shorter than `splits` segments is shared out in equal parts. Where no paragraph ends nearby, a sentence or a word
    does.
    """
    count = splits * math.ceil(len(text) / (splits * SEGMENT))
    size = len(text) / count
    seams = [0, *(_seam(text, round(size * i), round(size / 4)) for i in range(1, count)), len(text)]
    return [text[a:b].strip() for a, b in itertools.pairwise(seams)]


def _seam(text: str, at: int, reach: int) -> int:
    """The end of a paragraph nearest to `at`, else of a sentence, else of a word, at most `reach` characters away."""
    for mark in ("\n\n", ". ", " "):
        found = [text.rfind(mark, at - reach, at), text.find(mark, at, at + reach)]
        if near := [place for place in found if place >= 0]:
            return min(near, key=lambda place: abs(place - at)) + len(mark)
    return at


class Share(NamedTuple):
    """The segments a run takes of each book: every `of`-th, from the `number`-th on (counted from 1)."""

    number: int
    of: int

    def segments(self, text: str, work: str, source: str, seed: int) -> list[tuple[str, str]]:
        """This share's segments with their names, in an order drawn by `seed`.

        Where the first share begins hangs on the work, so that editions of one work are shared out alike.
        """
        cut = segments(text, self.of)
        turn = int(fraction("turn", work) * self.of)
        own = [i for i in range(len(cut)) if (i + turn) % self.of == self.number - 1]
        own.sort(key=lambda i: fraction(seed, source, i))
        return [(f"share {self.number}/{self.of} segment {i + 1:03d}/{len(cut):03d}", cut[i]) for i in own]


def rows_of(book: Book, named: list[tuple[str, str]], cutter: Cutter, most: int) -> Iterator[Row]:
    """Rows of at most `most` windows in all, from segments in the given order; no more are tokenised than that needs."""
    while named and most > 0:
        batch: list[tuple[str, str]] = []
        characters = 0
        while named and len(batch) < 8 and characters < most * cutter.sequence_len * CHARACTERS_A_TOKEN:
            batch.append(named.pop(0))
            characters += len(batch[-1][1])
        for (name, text), tokens in zip(batch, cutter.encode([text for _, text in batch]), strict=True):
            for number, p in enumerate(cutter.cut(tokens, windows=most), 1):
                part = f"{name} passage {number:02d}"
                passage = text[p.start : p.end]
                yield Row(passage, book.source, book.title, book.author, book.date, part, p.windows, p.tail)
                most -= p.windows


# --- spreading over books --------------------------------------------------------------------------------------------


def level(available: np.ndarray, wanted: float) -> int | None:
    """The smallest cap on every book under which `wanted` windows remain; None if there are too few without one."""
    if available.sum() < wanted:
        return None
    if wanted <= 0:
        return 0
    ordered = np.sort(available)
    below = np.cumsum(ordered) - ordered  # windows of the books before this one
    left = np.arange(len(ordered), 0, -1)  # books from this one on
    enough = below + ordered * left >= wanted  # capped at this book's own number
    i = int(np.argmax(enough))
    return math.ceil((wanted - below[i]) / left[i])


def shares_of(available: list[int], order: list[float], wanted: int) -> list[int]:
    """Windows to take from each book, `wanted` in all, as evenly as their lengths allow.

    A remainder smaller than the number of books goes to those first in `order`.
    """
    array = np.array(available, dtype=np.int64)
    cap = level(array, wanted)
    if cap is None:
        raise ValueError(f"{wanted} windows wanted of {array.sum()}")
    taken = np.minimum(array, max(0, cap - 1))
    longer = sorted(np.flatnonzero(array >= cap), key=lambda i: order[i])
    taken[longer[: wanted - int(taken.sum())]] += 1
    return taken.tolist()


class Pool:
    """Rows cut from books, kept on disk until it is known how many windows each book shall give."""

    def __init__(self, spool: IO[bytes], share: Share, cap: int | None):
        self.spool, self.share, self.cap = spool, share, cap
        self.books: list[tuple[float, list[tuple[int, int]]]] = []  # place in the draw; offset and windows of each row

    def add(self, book: Book, work: str, cutter: Cutter, seed: int) -> None:
        """Cut this share's rows of a book, `cap` windows at most."""
        rows = []
        most = self.cap if self.cap is not None else len(book.text)
        for row in rows_of(book, self.share.segments(book.text, work, book.source, seed), cutter, most):
            rows.append((self.spool.tell(), row.windows))
            self.spool.write(json.dumps(row).encode() + b"\n")
        if rows:
            self.books.append((fraction(seed, book.source), rows))

    def empty(self, cap: int | None) -> None:
        """Start again with another cap."""
        self.spool.seek(0)
        self.spool.truncate()
        self.books, self.cap = [], cap

    def windows(self) -> list[int]:
        """How many each book can give."""
        return [sum(windows for _, windows in rows) for _, rows in self.books]

    def shares(self, wanted: int) -> list[int]:
        """How many each book shall give for `wanted` in all."""
        return shares_of(self.windows(), [order for order, _ in self.books], wanted)

    def draw(self, shares: list[int], cutter: Cutter, seed: int) -> Iterator[Row]:
        """The rows of exactly these windows, shuffled."""
        chosen: list[tuple[float, int, int]] = []
        for (order, rows), share in zip(self.books, shares, strict=True):
            for number, (offset, windows) in enumerate(rows):
                if share > 0:
                    chosen.append((fraction(seed, order, number), offset, min(windows, share)))
                share -= windows
        for _, offset, windows in sorted(chosen):
            self.spool.seek(offset)
            row = Row(*json.loads(self.spool.readline()))
            if windows < row.windows:
                (passage,) = cutter.cut(cutter.encode([row.text])[0], windows=windows)
                row = row._replace(text=row.text[: passage.end], windows=windows, tail=passage.tail)
            yield row


# --- the run ---------------------------------------------------------------------------------------------------------


def unusable(book: Book, specials: list[str]) -> str | None:
    """Why a book as read cannot be used, or None."""
    if not book.source:
        return "no identifier"
    if not book.text.strip():
        return "no text"
    if any(special in book.text for special in specials):
        return "special token in text"  # "</s>" in a text would become an end of text
    return None


def gather(
    files: list[Path], total: int, held_out: HeldOut, cutter: Cutter, seed: int, train: Pool, heldout: Pool
) -> dict[str, Any]:
    """Read every book once and fill both pools. Returns what became of the documents, for the manifest."""
    rejected: Counter[str] = Counter()
    sides: Counter[str] = Counter()
    cleaning: Counter[str] = Counter()
    seen: set[str] = set()
    with tqdm(total=total, unit="book", desc="books") as bar:
        for book in read_books(files):
            bar.update()
            sides["read"] += 1
            sides["characters_read"] += len(book.text)
            reason = unusable(book, cutter.specials)
            if reason is None and book.source in seen:
                reason = "identifier seen before"
            if reason is None:
                seen.add(book.source)
                cleaned = clean_pages(book.text)
                book = book._replace(text="\n\n".join(cleaned.paragraphs))
                cleaning.update(cleaned.counts)
                if len(book.text) < SHORTEST:
                    reason = "too short"
            if reason:
                rejected[reason] += 1
                continue
            work = work_of(book.title, book.source)
            side = "heldout" if held_out(work) else "kept"
            sides[side] += 1
            sides["characters_kept"] += len(book.text)
            (heldout if side == "heldout" else train).add(book, work, cutter, seed)
    counted = {key: sides[key] for key in ("read", "kept", "heldout", "characters_read", "characters_kept")}
    return counted | {"rejected": dict(sorted(rejected.items())), "cleaning": dict(sorted(cleaning.items()))}


def cap_for(lengths: list[int], splits: int, sequence_len: int, wanted: float) -> int | None:
    """How many windows a book need give at most, by the lengths in the catalogue; None: all it has."""
    windows = np.array(lengths) // (splits * CHARACTERS_A_TOKEN * sequence_len)
    return level(windows, 1.1 * wanted) if wanted < math.inf else None


def count_or_all(value: str) -> float:
    return math.inf if value == "all" else int(value)


def split(value: str) -> Share:
    number, of = map(int, value.split("/"))
    if not 1 <= number <= of:
        raise ValueError
    return Share(number, of)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of parquet files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--sequence-len", type=int, required=True, help="tokens a window (the recipe's sequence_len)")
    parser.add_argument("--windows", type=count_or_all, required=True, help="how many windows to write, or: all")
    parser.add_argument("--split", type=split, default=Share(1, 2), metavar="K/N", help="which share (default 1/2)")
    parser.add_argument("--holdout", type=float, default=0.01, help="share of works held out; 0: none (default 0.01)")
    parser.add_argument(
        "--heldout-windows", type=int, metavar="N", help="held-out windows at most (default: 262,144 tokens)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the draw and the order of rows (default 42)")
    parser.add_argument("--out", type=Path, required=True, help="the rows, such as data/2a.jsonl")
    args = parser.parse_args(argv)
    if args.windows < 1 or (args.heldout_windows is not None and args.heldout_windows < 1):
        raise BadInput("--windows and --heldout-windows must be at least 1; --holdout 0 holds nothing out")
    if args.out.suffix != ".jsonl":
        raise BadInput(f"--out {args.out} must end in .jsonl")
    if not 0 <= args.holdout <= 0.5:
        raise BadInput(f"--holdout {args.holdout} must be a share between 0 and 0.5")
    cutter = Cutter(load_tokenizer(args.tokenizer), args.sequence_len)
    heldout_windows = args.heldout_windows
    if heldout_windows is None:
        heldout_windows = max(1, HELDOUT_TOKENS // args.sequence_len)

    files = parquet_files(args.source)
    entries = catalogue(files)
    held_out = HeldOut(args.holdout, {entry.work for entry in entries})
    train_lengths = [entry.characters for entry in entries if not held_out(entry.work)]
    heldout_lengths = [entry.characters for entry in entries if held_out(entry.work)]
    cap = cap_for(train_lengths, args.split.of, args.sequence_len, args.windows)
    heldout_cap = cap_for(heldout_lengths, 1, args.sequence_len, heldout_windows)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Spools without a name are gone with the process, however it ends.
    folder = args.out.parent
    with tempfile.TemporaryFile(dir=folder) as spool, tempfile.TemporaryFile(dir=folder) as heldout_spool:
        train, heldout = Pool(spool, args.split, cap), Pool(heldout_spool, Share(1, 1), heldout_cap)
        documents = gather(files, len(entries), held_out, cutter, args.seed, train, heldout)
        # Short of windows though some books gave all they were let: the catalogue's lengths had promised too much.
        while train.cap in train.windows() and sum(train.windows()) < args.windows < math.inf:
            assert train.cap is not None
            print(f"the catalogue promised more than the books hold: reading again for {2 * train.cap} windows a book")
            train.empty(2 * train.cap)
            heldout.empty(heldout.cap)
            documents = gather(files, len(entries), held_out, cutter, args.seed, train, heldout)
        available, heldout_available = sum(train.windows()), sum(heldout.windows())
        wanted = available if args.windows == math.inf else int(args.windows)
        if available < max(1, wanted):
            raise BadInput(
                f"{args.source} gives {available:,} windows of {args.sequence_len} tokens to share {args.split.number}/"
                f"{args.split.of}; at least {max(1, wanted):,} are wanted. Ask for fewer (--windows all: what there is) or "
                "collect more files"
            )
        if args.holdout and not heldout_available:
            raise BadInput(f"no held-out book fills a window of {args.sequence_len} tokens: raise --holdout")

        shares = train.shares(wanted)
        heldout_shares = heldout.shares(min(heldout_windows, heldout_available))
        record = args.source / "source.json"
        origin = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        manifest = write_prepared(
            args.out,
            tqdm(train.draw(shares, cutter, args.seed), desc="rows", unit="row"),
            heldout.draw(heldout_shares, cutter, args.seed),
            tokenizer=args.tokenizer,
            sequence_len=args.sequence_len,
            source={"path": str(args.source)}
            | {key: origin.get(key) for key in ("repo", "revision")}
            | {"files": source_files(tqdm(files, desc="checksums", unit="file"))},
            arguments={
                "windows": wanted,
                "split": f"{args.split.number}/{args.split.of}",
                "holdout": args.holdout,
                "heldout_windows": heldout_windows,
            },
            seed=args.seed,
            documents=documents
            | {"used": int(np.count_nonzero(shares)), "heldout_used": int(np.count_nonzero(heldout_shares))},
            packages=["pyarrow", "rapidfuzz"],
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in documents["rejected"].items()) or "none"
    print(f"{documents['read']:,} books read: {documents['kept']:,} to train on, {documents['heldout']:,} held out")
    print(f"rejected: {reasons}")
    for name in ("train", "heldout"):
        part = manifest[name]
        print(f"{part['path']}: {part['rows']:,} rows, {part['windows']:,} windows of {args.sequence_len}")


if __name__ == "__main__":
    run(main)
