"""Rows from a finished corpus: which passages a split may take, how many of each work, and in which order.

Two stages: `cut` tokenises, in a task for each source file, as much of each book as it may have to give; `draw` takes
the wanted number of windows from all, evenly over works, and writes them.
"""

import contextlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader

from prep.common import BadInput, atomic_write
from prep.corpus import chosen, estimated_windows
from prep.dedup import Entry
from prep.rows import Cutter, Loaded, Row, write_prepared
from prep.works import fraction

# 16 windows of 2048 tokens at 3 characters a token. A segment's last window is lost by half on average: 1,024 tokens
# of 32,768, 3 %. Smaller segments lose more, and larger ones leave fewer to a book (the average one has 4 of these).
SEGMENT = 98_304
# For planning only. French has 3.0 characters a token in Llama's vocabulary of 32 k and up to 4 in larger ones. Set too
# high, more is tokenised than is needed; too low, a second cutting may be.
CHARACTERS_A_TOKEN = 3.5
CHECKED = 50  # one row in so many is tokenised once more, as a whole
SPECIAL = "special token in text"  # "</s>" in a text would become an end of text


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


def rows_of(entry: Entry, named: list[tuple[str, str]], cutter: Cutter, most: int) -> Iterator[Row]:
    """Rows of at most `most` windows in all, from segments in the given order; no more are tokenised than that needs."""
    for name, text in named:
        if most <= 0:
            return
        for number, p in enumerate(cutter.passages(text, most), 1):
            part = f"{name} passage {number:02d}"
            passage = text[p.start : p.end]
            yield Row(passage, entry.source, entry.title, entry.author, entry.date, part, p.windows, p.tail)
            most -= p.windows


# --- spreading over works --------------------------------------------------------------------------------------------


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


class Draw(NamedTuple):
    """What one command asks of the corpus."""

    share: Share
    sequence_len: int
    windows: float  # infinite: all there are
    heldout_windows: int
    cap_per_work: int | None  # windows of a work, all its editions and volumes together
    seed: int

    def caps(self, books: list[tuple[Entry, bool]], surplus: float) -> dict[Entry, int]:
        """How many windows each book is cut into at most: what its work may have to give, and `surplus` times that."""
        caps: dict[Entry, int] = {}
        for side, splits, wanted in ((False, self.share.of, self.windows), (True, 1, float(self.heldout_windows))):
            works: dict[str, int] = defaultdict(int)
            for entry, heldout in books:
                if heldout == side:
                    works[entry.work] += estimated_windows(entry, splits, self.sequence_len, CHARACTERS_A_TOKEN)
            if self.cap_per_work and not side:
                works = {work: min(count, self.cap_per_work) for work, count in works.items()}
            cap = level(np.array(list(works.values())), surplus * wanted) if wanted < math.inf else None
            for entry, heldout in books:
                if heldout == side:
                    # A short book's estimate may be out by a window: all of it is cut.
                    caps[entry] = entry.characters if cap is None else max(1, cap)
                    if self.cap_per_work and not side:
                        caps[entry] = min(caps[entry], self.cap_per_work)
        return caps


class CleanBooks(JsonlReader):
    """The books of the same task of stage `clean`, which wrote no file where no book was left."""

    def __init__(self, folder: Path):
        super().__init__(str(folder / "books"), compression="zstd")

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        name = f"{rank:05d}.jsonl.zst"
        if self.data_folder.isfile(name):
            yield from self.read_file(name)


class Cut(PipelineStep):
    """Tokenise the chosen books of a task; rows and an index of them by book go to `cut`."""

    name = "cut"
    type = "CUT"

    def __init__(self, corpus: Path, cut: Path, draw: Draw, surplus: float):
        super().__init__()
        self.corpus, self.cut, self.draw, self.surplus = str(corpus), str(cut), draw, surplus

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        cut, draw = Path(self.cut), self.draw
        books = chosen(Path(self.corpus))
        caps = draw.caps(books, self.surplus)
        mine = {entry.line: (entry, heldout) for entry, heldout in books if entry.rank == rank}
        cutter = Cutter(Loaded.read(cut / "tokenizer.json"), draw.sequence_len)
        index: list[dict[str, Any]] = []
        with open(cut / f"{rank:05d}.rows", "wb") as handle:
            for line, document in enumerate(data or ()):
                if line not in mine:
                    continue
                entry, heldout = mine[line]
                with self.track_time():
                    if any(special in document.text for special in cutter.specials):
                        index.append({"source": entry.source, "reason": SPECIAL})
                        continue
                    share = Share(1, 1) if heldout else draw.share
                    named = share.segments(document.text, entry.work, entry.source, draw.seed)
                    rows: list[tuple[int, int]] = []
                    for row in rows_of(entry, named, cutter, caps[entry]):
                        if len(rows) % CHECKED == 0:
                            check(row, cutter)
                        rows.append((handle.tell(), row.windows))
                        handle.write(json.dumps(row).encode() + b"\n")
                    index.append(
                        {
                            "source": entry.source,
                            "work": entry.work,
                            "heldout": heldout,
                            "cap": caps[entry],
                            "rows": rows,
                        }
                    )
                self.update_doc_stats(document)
        with atomic_write(cut / f"{rank:05d}.index.json") as out:
            json.dump(index, out)


def check(row: Row, cutter: Cutter) -> None:
    """Raise BadInput where a row is not the number of tokens that its pieces added up to."""
    found, counted = cutter.count(row.text), row.windows * cutter.sequence_len + row.tail
    if found != counted:
        raise BadInput(
            f"{row.source}, {row.part}: {found} tokens, not {counted}: this tokenizer joins words; please report it"
        )


class Cutting(NamedTuple):
    """A book that was cut: where its rows lie, and how many windows each has."""

    order: float  # its place in the draw
    work: str
    cap: int
    rows: list[tuple[int, int, int]]  # task, offset, windows

    @property
    def windows(self) -> int:
        return sum(windows for *_, windows in self.rows)


class Pool:
    """The books of one side, cut, and the draw of windows from them."""

    def __init__(self, books: list[Cutting]):
        self.books = sorted(books)

    def available(self, cap_per_work: int | None) -> dict[str, int]:
        """How many windows each work can give."""
        works: dict[str, int] = defaultdict(int)
        for book in self.books:
            works[book.work] += book.windows
        return {work: min(count, cap_per_work or count) for work, count in works.items()}

    def shares(self, wanted: int, cap_per_work: int | None, seed: int) -> list[int]:
        """How many each book shall give for `wanted` in all: evenly over works, then over the books of a work."""
        available = self.available(cap_per_work)
        of_work = dict(
            zip(
                available,
                shares_of(list(available.values()), [fraction(seed, work) for work in available], wanted),
                strict=True,
            )
        )
        members: dict[str, list[int]] = defaultdict(list)
        for i, book in enumerate(self.books):
            members[book.work].append(i)
        shares = [0] * len(self.books)
        for work, indices in members.items():
            books = [self.books[i] for i in indices]
            of_books = shares_of([b.windows for b in books], [b.order for b in books], of_work[work])
            for i, share in zip(indices, of_books, strict=True):
                shares[i] = share
        return shares

    def draw(self, shares: list[int], folder: Path, cutter: Cutter, seed: int) -> Iterator[Row]:
        """The rows of exactly these windows, shuffled."""
        picked: list[tuple[float, int, int, int]] = []
        for book, share in zip(self.books, shares, strict=True):
            for number, (rank, offset, windows) in enumerate(book.rows):
                if share > 0:
                    picked.append((fraction(seed, book.order, number), rank, offset, min(windows, share)))
                share -= windows
        with contextlib.ExitStack() as stack:
            files = {
                rank: stack.enter_context(open(folder / f"{rank:05d}.rows", "rb"))
                for rank in {rank for _, rank, *_ in picked}
            }
            for _, rank, offset, windows in sorted(picked):
                files[rank].seek(offset)
                row = Row(*json.loads(files[rank].readline()))
                if windows < row.windows:
                    passage = next(iter(cutter.passages(row.text, windows)), None)
                    if not passage or (passage.start, passage.windows) != (0, windows):
                        raise BadInput(
                            f"{row.source}, {row.part}: cannot be cut to {windows} of its {row.windows} windows: a word is "
                            "longer than a window; ask for one window less or more"
                        )
                    row = row._replace(text=row.text[: passage.end], windows=passage.windows, tail=passage.tail)
                yield row


class Short(Exception):
    """Fewer windows were cut than are wanted, and some books could give more."""


class Write(PipelineStep):
    """Draw from all that was cut, and write rows, held-out rows and manifest."""

    name = "draw"
    type = "DRAW"

    def __init__(self, corpus: Path, cut: Path, tasks: int, draw: Draw, out: Path, manifest: dict[str, Any]):
        super().__init__()
        self.corpus, self.cut, self.tasks = str(corpus), str(cut), tasks
        self.draw, self.out, self.manifest = draw, str(out), manifest

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        cut, draw = Path(self.cut), self.draw
        pools, special = self.pools()
        train, heldout = pools
        available = train.available(draw.cap_per_work)
        total, wanted = sum(available.values()), draw.windows
        if total < max(1.0, wanted if wanted < math.inf else 1.0):
            if any(book.windows >= book.cap != draw.cap_per_work for book in train.books):
                raise Short
            raise BadInput(
                f"{self.manifest['source']['path']} gives {total:,} windows of {draw.sequence_len} tokens to share "
                f"{draw.share.number}/{draw.share.of}; at least {1 if wanted == math.inf else int(wanted):,} are wanted. "
                "Ask for fewer (--windows all: what there is) or collect more files"
            )
        heldout_available = sum(heldout.available(None).values())
        if self.manifest["arguments"]["holdout"] and not heldout_available:
            raise BadInput(f"no held-out book fills a window of {draw.sequence_len} tokens: raise --holdout")
        windows = total if wanted == math.inf else int(wanted)
        shares = train.shares(windows, draw.cap_per_work, draw.seed)
        heldout_shares = heldout.shares(min(draw.heldout_windows, heldout_available), None, draw.seed)
        report = json.loads((Path(self.corpus) / "corpus.json").read_text(encoding="utf-8"))
        documents = report["documents"]
        if special:
            documents["rejected"] = dict(sorted((documents["rejected"] | {SPECIAL: sum(special)}).items()))
            documents["kept"] -= special[0]
            documents["heldout"] -= special[1]
        used = {book.work for book, share in zip(train.books, shares, strict=True) if share}
        cutter = Cutter(Loaded.read(cut / "tokenizer.json"), draw.sequence_len)
        write_prepared(
            self.out,
            train.draw(shares, cut, cutter, draw.seed),
            heldout.draw(heldout_shares, cut, cutter, draw.seed),
            sequence_len=draw.sequence_len,
            seed=draw.seed,
            documents=documents
            | {
                "used": int(np.count_nonzero(shares)),
                "heldout_used": int(np.count_nonzero(heldout_shares)),
                "works_used": len(used),
                "funnel": report["funnel"],
                "overlapping": report["overlapping"],
            },
            **self.manifest | {"arguments": self.manifest["arguments"] | {"windows": windows}},
        )

    def pools(self) -> tuple[tuple[Pool, Pool], list[int]]:
        """Training and held-out books; how many of either were rejected for a special token."""
        sides: tuple[list[Cutting], list[Cutting]] = ([], [])
        heldout_of = {(entry.source): heldout for entry, heldout in chosen(Path(self.corpus))}
        special = [0, 0]
        for rank in range(self.tasks):
            for book in json.loads((Path(self.cut) / f"{rank:05d}.index.json").read_text(encoding="utf-8")):
                if "reason" in book:
                    special[heldout_of[book["source"]]] += 1
                elif book["rows"]:
                    order = fraction(self.draw.seed, book["source"])
                    rows = [(rank, offset, windows) for offset, windows in book["rows"]]
                    sides[book["heldout"]].append(Cutting(order, book["work"], book["cap"], rows))
        return (Pool(sides[0]), Pool(sides[1])), special if any(special) else []
