"""Rows of whole windows: cut from text, drawn evenly over works, written with their manifest.

Axolotl's `type: completion` (0.19.0, prompt_strategies/completion.py) tokenises a row, puts BOS first where the tokenizer
does, appends EOS, truncates at 64 x sequence_len and slices at sequence_len; `min_sample_len: <sequence_len>` then drops
the slices that are not full. So a row is contiguous text that ends with the word in which its last window ends: the rest
of that word is dropped together with the EOS, which is at no true end. Text is cut by character offsets and never decoded.
"""

import argparse
import bisect
import contextlib
import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from prep.common import BadInput, atomic_write, sha256, versions, write_text
from prep.dedup import Entry, chosen_books, fraction

MAX_WINDOWS = 16  # a row; Axolotl truncates silently at 64 and tokenises 1,000 rows a batch in each process
# 16 windows of 2048 tokens at 3 characters per token. A chunk's last window is lost by half on average: 1,024 tokens of
# 32,768, 3 %. Smaller chunks lose more, and larger ones leave fewer to a book (the average one has 4 of these).
CHUNK = 98_304
KNOWN = 2**17  # words whose tokens are kept, 27 MB
BATCH = 150  # words tokenised as one text: a longer one takes longer per word
SPECIAL = "special token in text"  # "</s>" in a text would become an end of text


class Row(NamedTuple):
    """One training row: the six fields of the JSONL line, then what Axolotl will make of the text."""

    text: str
    source: str  # identifier in the source, such as Gallica's ark
    title: str
    author: str  # "" when unknown: a column of nulls and strings is an error for the JSON loader of `datasets`
    date: str
    part: str  # where in the document the row is; unique within a document
    windows: int
    tail: int
    conversations: tuple[dict[str, str], ...] = ()  # of {from, value}, where the row is one

    def line(self) -> str:
        """The row as one line of JSON, newline included."""
        fields: dict[str, Any] = dict(zip(self._fields[:6], self[:6], strict=True))
        if self.conversations:
            fields["conversations"] = self.conversations
        return json.dumps(fields, ensure_ascii=False) + "\n"


def read_row(file: IO[bytes], offset: int) -> Row:
    """A row that was written as a JSON list at that place."""
    file.seek(offset)
    return Row(*json.loads(file.readline()))


# --- text to rows ----------------------------------------------------------------------------------------------------


_BETWEEN_WORDS = re.compile(r" (?<=[^ ▁] )(?=[^ ▁])")


class Bounds(NamedTuple):
    """Characters `start` to `end` of a text: `windows` full windows, then `tail` tokens (EOS counted) to be dropped."""

    start: int
    end: int
    windows: int
    tail: int


class Tokens(NamedTuple):
    """A text and the characters at which its tokens end, an array of shape (tokens,), special tokens left out."""

    text: str
    ends: np.ndarray


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer as Axolotl loads it (AutoTokenizer), from a local folder that holds a `tokenizer.json`."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise BadInput(f"no tokenizer.json in {folder}: give the folder of the base model (--tokenizer models/base)")
    from transformers import AutoTokenizer  # here, for it takes each worker seconds
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise
        raise BadInput(f"the tokenizer in {folder} cannot be loaded ({error}); collect the base model again") from error
    if not isinstance(tokenizer, TokenizersBackend):
        raise BadInput(f"the tokenizer in {folder} gives no character offsets; a fast tokenizer is needed")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer in {folder} has no end-of-sequence token, which Axolotl appends to every row")
    return tokenizer


class Cutter:
    """Cuts text into rows that Axolotl slices into exactly the stated number of windows."""

    def __init__(self, folder: str | Path, sequence_len: int):
        if sequence_len < 64:
            raise BadInput(f"--sequence-len {sequence_len} is too short: a window has at least 64 tokens")
        tokenizer = load_tokenizer(folder)
        self.sequence_len = sequence_len
        self.eos = tokenizer.eos_token_id
        self.specials = [token for token in tokenizer.all_special_tokens if token]
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        mask = self._tokenizer.encode("a").special_tokens_mask
        self.before = mask.index(0)  # special tokens ahead of the text: 1 (BOS) or 0
        self._around = sum(mask) + (self._tokenizer.encode("a").ids[-1] != self.eos)  # a row's that are not its text's
        # Llama's kind has no token in which a space follows a letter, and puts a space before every text: a word after a
        # space has the same tokens everywhere.
        self._by_words = not any("▁" in token.lstrip("▁") for token in self._tokenizer.get_vocab()) and (
            self._bare(["à la mer"])[0].ids == [i for e in self._bare(["à", "la", "mer"]) for i in e.ids]
        )
        self._known: dict[str, list[int]] = {}  # where the tokens of a word after a space end
        # A window ends inside a word; the row continues to the word's end, but over no more than this many characters
        # (unspaced rubbish exists), which are at most half a window even at four byte tokens a character.
        reach = min(40, sequence_len // 8)
        self._word_end = re.compile(rf"\S{{0,{reach}}}")
        self._next_word = re.compile(rf"\s*\S{{1,{reach}}}")

    def _bare(self, texts: list[str]) -> list[Any]:
        """Texts tokenised without special tokens and offsets, a third faster than with."""
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def count(self, text: str) -> int:
        """Tokens Axolotl makes of a row: those of the text, the special ones the tokenizer adds, and one EOS."""
        ids = self._bare([text])[0].ids
        return self._around + len(ids) - (ids[-1:] == [self.eos])

    def encode(self, text: str) -> Tokens:
        """Tokenise a text; where words have the same tokens everywhere, only those that are new."""
        if not self._by_words or not text:
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
            return Tokens(text, np.array([end for _, end in offsets], np.int64))
        words = _BETWEEN_WORDS.split(text)
        self._learn(words)
        ends = [self._known[word] for word in words]
        lengths = np.fromiter(map(len, words), np.int64) + 1
        inside = np.fromiter(itertools.chain.from_iterable(ends), np.int64)
        return Tokens(text, inside + np.repeat(np.cumsum(lengths) - lengths, list(map(len, ends))))

    def _learn(self, words: list[str]) -> None:
        """Have all these words in `_known`."""
        if len(self._known) > KNOWN:
            self._known.clear()
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        batches = [new[i : i + BATCH] for i in range(0, len(new), BATCH)]
        texts = ["a " + " ".join(batch) for batch in batches]
        for batch, encoding in zip(batches, self._tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            ends = [end for _, end in encoding.offsets]
            start = 2
            first = bisect.bisect_left(ends, start)  # a space that is a token belongs to the next word
            for word in batch:
                last = bisect.bisect_left(ends, start + len(word) + 1, first)
                self._known[word] = [end - start for end in ends[first:last]]
                start, first = start + len(word) + 1, last

    def word_start(self, tokens: Tokens, index: int) -> int:
        """The character at which the word nearest to token `index` starts, by distance in tokens."""
        at = int(tokens.ends[index - 1]) if index else 0
        word = re.compile(r"(?<!\S)\S")
        following = word.search(tokens.text, at)
        before = max((m.start() for m in word.finditer(tokens.text, max(0, at - 200), at + 1)), default=None)
        choices = [c for c in (before, following and following.start()) if c is not None]
        return min(choices, key=lambda c: abs(int(np.searchsorted(tokens.ends, c, side="right")) - index), default=at)

    def cut(self, tokens: Tokens, start: int = 0, windows: float = math.inf) -> Iterator[Bounds]:
        """Rows of at most `windows` windows in all, one after the other from character `start`, without overlap.

        A row's own tokens are counted, for its first word may have others there than inside the text.
        """
        while windows > 0 and (row := self._next(tokens, start, min(windows, MAX_WINDOWS))):
            yield row
            windows -= row.windows
            start = row.end

    def _next(self, tokens: Tokens, start: int, most: float) -> Bounds | None:
        text, length = tokens.text, self.sequence_len
        while start < len(text) and text[start].isspace():
            start += 1
        first = int(np.searchsorted(tokens.ends, start, side="right"))
        for windows in range(int(min(most, (self.before + len(tokens.ends) - first) // length)), 0, -1):
            last = first + windows * length - self.before - 1
            end = self._word_end.match(text, int(tokens.ends[last])).end()  # type: ignore[union-attr]
            count = self._count_row(tokens, start, end)
            while count - 1 < windows * length and (word := self._next_word.match(text, end)):
                end = word.end()
                count = self._count_row(tokens, start, end)
            tail = count - windows * length
            if 0 < tail < length:
                return Bounds(start, end, windows, tail)
        return None

    def _count_row(self, tokens: Tokens, start: int, end: int) -> int:
        """`count` of characters `start` to `end`; only the first word is tokenised again where all else stays as it is."""
        text = tokens.text
        space = _BETWEEN_WORDS.search(text, start, end)
        if not self._by_words or not space or text[end : end + 1] not in ("", " "):
            return self.count(text[start:end])
        after, last = np.searchsorted(tokens.ends, (space.start(), end), side="right")
        return self.count(text[start : space.start()]) + int(last - after)


# --- what a split may take of a document -----------------------------------------------------------------------------


def chunks(text: str, splits: int) -> list[str]:
    """Cut a cleaned document into equal chunks, as many for each split, at the ends of paragraphs.

    Only the text and the number of splits decide, so that splits are disjoint whatever the tokenizer and seed. Where no
    paragraph ends nearby, a chunk ends with a sentence or a word.
    """
    count = splits * math.ceil(len(text) / (splits * CHUNK))
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
    """The chunks a split takes of each document: every `of`-th, from the `number`-th on (counted from 1)."""

    number: int
    of: int

    def chunks(self, text: str, work: str, source: str, seed: int) -> list[tuple[str, str]]:
        """This split's chunks, each (name, text), in an order drawn by `seed`.

        The work decides where the first split begins, so that editions of one work are shared out alike.
        """
        cut = chunks(text, self.of)
        turn = int(fraction("turn", work) * self.of)
        own = [i for i in range(len(cut)) if (i + turn) % self.of == self.number - 1]
        own.sort(key=lambda i: fraction(seed, source, i))
        return [(f"share {self.number}/{self.of} chunk {i + 1:03d}/{len(cut):03d}", cut[i]) for i in own]


class Draw(NamedTuple):
    """What one command asks of the corpus."""

    share: Share
    windows: float  # infinite: all there are
    heldout_windows: int
    cap_per_work: int | None  # windows of a work, all its editions and volumes together
    seed: int


def document_rows(text: str, entry: Entry, share: Share, cutter: Cutter, seed: int, most: float) -> Iterator[Row]:
    """The rows of one document, of at most `most` windows in all; no more chunks are tokenised than that needs."""
    for name, chunk in share.chunks(text, entry.work, entry.source, seed):
        if most <= 0:
            return
        for number, b in enumerate(cutter.cut(cutter.encode(chunk), windows=most), 1):
            part = f"{name} row {number:02d}"
            yield Row(chunk[b.start : b.end], entry.source, entry.title, entry.author, entry.date, part, *b[2:])
            most -= b.windows


class Document(NamedTuple):
    """A document's place in the draw and its rows, each (task, offset, windows)."""

    order: float
    work: str
    rows: list[tuple[int, int, int]]

    @property
    def windows(self) -> int:
        return sum(windows for *_, windows in self.rows)


class CutRows(PipelineStep):
    """Cut the chosen documents of a task into rows: `<task>.rows`, and an index by document."""

    name, type = "cut", "CUT"

    def __init__(self, corpus: Path, folder: Path, cutter: Cutter, draw: Draw):
        super().__init__()
        self.corpus, self.folder, self.cutter, self.draw = corpus, folder, cutter, draw

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        draw = self.draw
        mine = {entry.line: (entry, heldout) for entry, heldout in chosen_books(self.corpus) if entry.rank == rank}
        index: list[tuple[bool, bool, Document]] = []  # held out, has a special token
        with open(self.folder / f"{rank:05d}.rows", "wb") as handle:
            for line, document in enumerate(data or ()):
                if line not in mine:
                    continue
                entry, heldout = mine[line]
                special = any(token in document.text for token in self.cutter.specials)
                # No document gives more than its whole side does.
                share, most = draw.share, min(draw.windows, draw.cap_per_work or math.inf)
                if heldout:
                    share, most = Share(1, 1), draw.heldout_windows
                rows: list[tuple[int, int, int]] = []
                for row in document_rows(document.text, entry, share, self.cutter, draw.seed, 0 if special else most):
                    rows.append((rank, handle.tell(), row.windows))
                    handle.write(json.dumps(row).encode() + b"\n")
                index.append((heldout, special, Document(fraction(draw.seed, entry.source), entry.work, rows)))
        write_text(self.folder / f"{rank:05d}.index.json", json.dumps(index))


# --- the draw --------------------------------------------------------------------------------------------------------


def even_shares(available: list[int], order: list[float], wanted: int) -> list[int]:
    """Windows to take from each, `wanted` in all, as evenly as there are; a remainder goes to the first in `order`."""
    array = np.array(available, dtype=np.int64)
    caps = range(max(available, default=0) + 1)
    cap = bisect.bisect_right(caps, wanted, key=lambda cap: int(np.minimum(array, cap).sum())) - 1
    taken = np.minimum(array, cap)
    longer = sorted(np.flatnonzero(array > cap), key=lambda i: order[i])
    taken[longer[: wanted - int(taken.sum())]] += 1
    return taken.tolist()


class Pool:
    """The documents of one side, training or held out, and the draw of windows from them."""

    def __init__(self, documents: list[Document], cap_per_work: int | None, seed: int):
        self.seed = seed
        self.works: dict[str, list[Document]] = defaultdict(list)
        for document in sorted(documents):
            self.works[document.work].append(document)
        counts = [sum(document.windows for document in members) for members in self.works.values()]
        self.available = [min(count, cap_per_work or count) for count in counts]

    def shares(self, wanted: int) -> list[tuple[Document, int]]:
        """Documents with some windows each, `wanted` in all: evenly over works, then over the documents of a work."""
        shares: list[tuple[Document, int]] = []
        of_works = even_shares(self.available, [fraction(self.seed, work) for work in self.works], wanted)
        for members, share in zip(self.works.values(), of_works, strict=True):
            counts = even_shares([d.windows for d in members], [d.order for d in members], share)
            shares += [(document, count) for document, count in zip(members, counts, strict=True) if count]
        return shares

    def draw(self, shares: list[tuple[Document, int]], folder: Path, cutter: Cutter) -> Iterator[Row]:
        """The rows of exactly these windows, shuffled; a document's last row is shortened to what is left of its share."""
        picked: list[tuple[float, int, int, int]] = []
        for document, share in shares:
            for number, (rank, offset, windows) in enumerate(document.rows):
                if share > 0:
                    picked.append((fraction(self.seed, document.order, number), rank, offset, min(windows, share)))
                share -= windows
        with contextlib.ExitStack() as stack:
            ranks = {rank for _, rank, *_ in picked}
            files = {rank: stack.enter_context(open(folder / f"{rank:05d}.rows", "rb")) for rank in ranks}
            for _, rank, offset, windows in sorted(picked):
                row = read_row(files[rank], offset)
                if windows < row.windows:
                    bounds = next(cutter.cut(cutter.encode(row.text), windows=windows), None)
                    if not bounds or bounds.windows != windows:
                        raise BadInput(
                            f"{row.source}, {row.part}: cannot be cut to {windows} of its {row.windows} windows; "
                            "ask for one window more or less (--windows)"
                        )
                    row = row._replace(text=row.text[: bounds.end], windows=windows, tail=bounds.tail)
                yield row


class DrawRows(PipelineStep):
    """Draw from all that was cut, and write rows, held-out rows and manifest."""

    name, type = "draw", "DRAW"

    def __init__(
        self, corpus: Path, folder: Path, tasks: int, cutter: Cutter, draw: Draw, out: Path, manifest: dict[str, Any]
    ):
        super().__init__()
        self.corpus, self.folder, self.tasks, self.cutter = corpus, folder, tasks, cutter
        self.asked, self.out, self.manifest = draw, out, manifest

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        asked, length = self.asked, self.cutter.sequence_len
        sides: tuple[list[Document], list[Document]] = ([], [])
        special = [0, 0]
        for task in range(self.tasks):
            for heldout_book, has_special, book in json.loads((self.folder / f"{task:05d}.index.json").read_bytes()):
                special[heldout_book] += has_special
                sides[heldout_book].append(Document(*book))
        train, heldout = Pool(sides[0], asked.cap_per_work, asked.seed), Pool(sides[1], None, asked.seed)
        there, held = sum(train.available), sum(heldout.available)
        windows = there if asked.windows == math.inf else int(asked.windows)
        if there < max(1, windows):
            remedy = f"The books were too short, or rejected: {self.corpus / 'corpus.json'} counts them by reason"
            if there:
                files = math.ceil(self.tasks * windows / there)
                remedy = f"Ask for fewer (--windows all: what there is), or collect about {files} files instead of {self.tasks}"
            raise BadInput(
                f"{self.manifest['source']['path']} gives {there:,} windows of {length} tokens to share "
                f"{asked.share.number}/{asked.share.of}; at least {max(1, windows):,} are wanted. {remedy}"
            )
        if self.manifest["arguments"]["holdout"] and not held:
            raise BadInput(f"no held-out book fills a window of {length} tokens: raise --holdout")
        shares, heldout_shares = train.shares(windows), heldout.shares(min(asked.heldout_windows, held))
        report = json.loads((self.corpus / "corpus.json").read_text(encoding="utf-8"))
        documents = report["documents"]
        if any(special):
            documents["rejected"] = dict(sorted((documents["rejected"] | {SPECIAL: sum(special)}).items()))
            documents["kept"] -= special[0]
            documents["heldout"] -= special[1]
        documents |= {
            "used": len(shares),
            "heldout_used": len(heldout_shares),
            "works_used": len({document.work for document, _ in shares}),
            "funnel": report["funnel"],
            "contaminated": report["contaminated"],
        }
        write_prepared(
            self.out,
            train.draw(shares, self.folder, self.cutter),
            heldout.draw(heldout_shares, self.folder, self.cutter),
            sequence_len=length,
            seed=asked.seed,
            documents=documents,
            **self.manifest | {"arguments": self.manifest["arguments"] | {"windows": windows}},
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_rows(path: Path, handle: IO[bytes], rows: Iterable[Row], sequence_len: int) -> dict[str, Any]:
    """Write rows and return the manifest's account of these very bytes."""
    digest, counts = hashlib.sha256(), np.zeros(4, np.int64)
    for row in rows:
        line = row.line().encode()
        handle.write(line)
        digest.update(line)
        counts += (1, row.windows, row.tail, len(line))
    number, windows, tail, size = counts.tolist()
    return {
        "path": path.name,
        "rows": number,
        "windows": windows,
        "tokens": windows * sequence_len,
        "tail_tokens": tail,
        "bytes": size,
        "sha256": digest.hexdigest(),
    }


def jsonl_path(text: str) -> Path:
    """An argparse type: the file of rows, beside which others are written under its stem."""
    if not text.endswith(".jsonl"):
        raise argparse.ArgumentTypeError(f"{text} must end in .jsonl")
    return Path(text)


def holdout_share(text: str) -> float:
    """An argparse type: the share that is held out."""
    if not 0 <= float(text) <= 0.5:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 0.5")
    return float(text)


def heldout_path(out: Path) -> Path:
    """data/2a.jsonl -> data/2a.heldout.jsonl"""
    return out.with_suffix(".heldout.jsonl")


def manifest_path(out: Path) -> Path:
    """data/2a.jsonl -> data/2a.manifest.json"""
    return out.with_suffix(".manifest.json")


def keep_sources(sources: Iterable[Path], out: Path) -> None:
    """Raise BadInput where a source is one of the files that are written with the rows `out`."""
    written = {path.resolve() for path in (out, heldout_path(out), manifest_path(out), out.with_suffix(".txt"))}
    for path in sources:
        if path.resolve() in written:
            raise BadInput(f"{path} would be overwritten: copy it elsewhere, or give another --out than {out}")


def write_prepared(
    out: Path,
    train: Iterable[Row],
    heldout: Iterable[Row],
    *,
    tokenizer: Path,
    sequence_len: int,
    source: dict[str, Any],
    arguments: dict[str, Any],
    seed: int,
    documents: dict[str, Any],
    text: str = "",
    packages: Iterable[str] = (),
) -> dict[str, Any]:
    """Write rows, held-out rows, the `text` they are cut from (`2c.txt`) if given, and the manifest; returns the manifest.

    All are written under temporary names and renamed at the end, the manifest last: if the command is killed in between,
    the old manifest's sha256s do not match the new files. `tokens` counts those in full windows (special tokens
    included), `tail_tokens` those that `min_sample_len` drops.
    """
    held, manifest_file = heldout_path(out), manifest_path(out)
    # Contexts leave in reverse order: rows, held-out rows, text, manifest.
    with (
        atomic_write(manifest_file) as manifest_handle,
        atomic_write(out.with_suffix(".txt")) if text else contextlib.nullcontext() as text_handle,
        atomic_write(held, "wb") as held_handle,
        atomic_write(out, "wb") as train_handle,
    ):
        manifest = {
            "source": source,
            "arguments": arguments,
            "seed": seed,
            "tokenizer": {"path": str(tokenizer), "sha256": sha256(tokenizer / "tokenizer.json")},
            "sequence_len": sequence_len,
            "documents": documents,
            "train": _write_rows(out, train_handle, train, sequence_len),
            "heldout": _write_rows(held, held_handle, heldout, sequence_len),
            "versions": versions("tokenizers", "transformers", *packages),
        }
        if text_handle:
            text_handle.write(text)
        json.dump(manifest, manifest_handle, ensure_ascii=False, indent=2)
        manifest_handle.write("\n")
    return manifest
