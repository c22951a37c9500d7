"""Texts that are nearly the same: fingerprints, MinHash signatures, pairs, and what overlaps with protected texts.

A fingerprint is a sixteenth of a text's runs of eight words, chosen by their hash alone: the same run is in every
fingerprint or in none, so that two fingerprints share what the texts share. Words are letters without case, accent or
mark. Novels by different hands share hardly a run of eight words (a few in ten thousand), and an edition of the same
book keeps, however it was recognised, a third or more.

Candidates are found by datatrove's MinHash: signatures of a sixteenth of the runs of five words, in 24 buckets of 4
hashes. A pair whose sets are 0.6 alike becomes a candidate in 97 cases of 100, one of 0.4 (either read with a wrong
word in eighteen) in 47, and one of 0.02 (two novels) in none of 250,000. A candidate is a duplicate if its fingerprints say so as well.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.utils.binaryio import read_tuples_from_file
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from prep.filters import year_of
from prep.works import work_of

MINHASH = MinhashConfig(n_grams=5, num_buckets=24, hashes_per_bucket=4)
RUN = 8  # words
SAMPLE = 16  # one run of so many is kept
SAME = 0.1  # of the smaller fingerprint shared by two copies of one text; two novels share 0.001
WELL_READ = 0.85  # share of known words; between two editions above it, differences are of names and spelling
_LETTERS = bytes(byte if byte in b"abcdefghijklmnopqrstuvwxyz" else ord(" ") for byte in range(256))
_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))


class Hashes(dict[bytes, int]):
    """The hash of each word, computed once, or anew after a million others: they take 140 MB."""

    def __missing__(self, word: bytes) -> int:
        if len(self) >= 1_000_000:
            self.clear()
        value = self[word] = xxhash.xxh64_intdigest(word)
        return value


_HASHES = Hashes()


def word_hashes(text: str) -> np.ndarray:
    """One uint64 a word of a text."""
    words = unicodedata.normalize("NFD", text.lower()).encode("ascii", "ignore").translate(_LETTERS).split()
    return np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))


def sampled_runs(words: np.ndarray, length: int) -> np.ndarray:
    """The hashes of runs of `length` words, sorted, each once: of the sixteenth of them whose hash says so."""
    count = len(words) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    runs = np.zeros(count, np.uint64)
    for i in range(length):
        runs = runs * _ODD[0] + words[i : i + count]
    runs = (runs ^ (runs >> np.uint64(31))) * _ODD[1]
    runs ^= runs >> np.uint64(29)
    return np.unique(runs[runs % np.uint64(SAMPLE) == 0])


def fingerprint(text: str) -> np.ndarray:
    """A sorted array of uint64: the sampled runs of eight words."""
    return sampled_runs(word_hashes(text), RUN)


class Entry(NamedTuple):
    """What is kept in memory of a cleaned book while the corpus is chosen: some 500 bytes."""

    rank: int  # the task, and source file, it came from
    line: int  # its place among that task's books
    source: str
    title: str
    author: str
    date: str
    work: str
    characters: int
    known: float  # share of its words that are French ones
    digest: str  # of the text, to tell two of one identifier apart

    @property
    def preference(self) -> tuple[bool, int, float, int, str, str]:
        """Of two copies the one with the smaller preference stays: one well read, then the older, better read, longer."""
        year = year_of(self.date) or 9999
        return (self.known < WELL_READ, year, -round(self.known, 2), -self.characters, self.source, self.digest)


class Signatures(MinhashDedupSignature):
    """datatrove's signatures, and beside them an entry and a fingerprint of each book.

    The runs are hashed by numpy, twenty times faster than datatrove's own, which joins words to strings.
    """

    name = "signatures"

    def __init__(self, folder: Path):
        super().__init__(str(folder / "signatures"), MINHASH, WhitespaceTokenizer())
        self.folder = str(folder)
        self._runs = np.empty(0, np.uint64)

    def get_shingles(self, text: str) -> np.ndarray:
        return self._runs.reshape(-1, 1)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        folder = Path(self.folder)
        (folder / "entries").mkdir(parents=True, exist_ok=True)
        prints: list[np.ndarray] = []
        with open(folder / "entries" / f"{rank:05d}.jsonl", "wb") as entries:
            super().run(self._noted(data, rank, entries, prints), rank, world_size)
        save_prints(folder, rank, prints)

    def _noted(self, data: Any, rank: int, entries: Any, prints: list[np.ndarray]) -> Iterator[Document]:
        for line, document in enumerate(data):
            with self.track_time():
                words = word_hashes(document.text)
                self._runs = sampled_runs(words, MINHASH.n_grams)
                prints.append(sampled_runs(words, RUN))
                fields = document.metadata
                entry = Entry(
                    rank,
                    line,
                    document.id,
                    fields["title"],
                    fields["author"],
                    fields["date"],
                    work_of(fields["title"], document.id),
                    len(document.text),
                    fields["known"],
                    xxhash.xxh64_hexdigest(document.text.encode()),
                )
                entries.write(orjson.dumps({**entry._asdict(), "opening": document.text[:1000]}) + b"\n")
            yield document


def save_prints(folder: Path, rank: int, prints: list[np.ndarray]) -> None:
    """Two arrays a task: the fingerprints one after the other, and where each ends."""
    (folder / "prints").mkdir(parents=True, exist_ok=True)
    np.save(folder / "prints" / f"{rank:05d}.npy", np.concatenate([np.empty(0, np.uint64), *prints]))
    np.save(folder / "prints" / f"{rank:05d}.ends.npy", np.cumsum([0, *map(len, prints)]))


class Prints:
    """The fingerprints of a corpus, read from the disk as they are needed."""

    def __init__(self, folder: Path):
        self.folder = folder / "prints"
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, entry: Entry) -> np.ndarray:
        if entry.rank not in self._open:
            stem = self.folder / f"{entry.rank:05d}"
            self._open[entry.rank] = (
                np.load(stem.with_suffix(".npy"), mmap_mode="r"),
                np.load(stem.with_suffix(".ends.npy")),
            )
        hashes, ends = self._open[entry.rank]
        return hashes[ends[entry.line] : ends[entry.line + 1]]


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many runs of sorted fingerprint `one` are in sorted fingerprint `other`."""
    if not len(one) or not len(other):
        return 0
    places = np.minimum(np.searchsorted(other, one), len(other) - 1)
    return int(np.count_nonzero(other[places] == one))


def candidate_pairs(folder: Path) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of books, each (rank, line), that have a bucket of their signatures in common."""
    pairs = set()
    for path in sorted((folder / "buckets").glob("*.dups")):
        with open(path, "rb") as handle:
            for a, b, c, d in read_tuples_from_file(handle, "4I", lines_to_buffer=-1):
                pairs.add(((a, b), (c, d)))
    return pairs


def copies(
    entries: Iterable[Entry], pairs: Iterable[tuple[tuple[int, int], tuple[int, int]]], prints: Prints
) -> dict[Entry, Entry]:
    """For each book that is a copy of a better one: the one that stays, whatever the order of books and pairs."""
    by_place = {(entry.rank, entry.line): entry for entry in entries}
    alike: dict[Entry, set[Entry]] = defaultdict(set)
    for places in pairs:
        one, other = (by_place.get(place) for place in places)
        if one and other:
            a, b = prints[one], prints[other]
            if shared(a, b) >= SAME * min(len(a), len(b)):
                alike[one].add(other)
                alike[other].add(one)
    gone: dict[Entry, Entry] = {}
    for entry in sorted(alike, key=lambda entry: entry.preference):
        better = [other for other in alike[entry] if other not in gone and other.preference < entry.preference]
        if better:
            gone[entry] = min(better, key=lambda other: other.preference)
    return gone
