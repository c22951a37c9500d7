"""Chooses the corpus: one copy of each book, whole works held out, nothing contaminated by held-out text or the novel.

A fingerprint is a sixteenth of a text's sequences of eight words, chosen by their hash alone: a sequence is in every
fingerprint or in none, so two fingerprints share what the texts share. Words are letters without case, accent or mark.
Novels by different hands share hardly a sequence of eight words (a few in ten thousand); an edition of the same book keeps
a third or more, however badly it was read.

Candidates are found by datatrove's MinHash: signatures of a sixteenth of the sequences of five words, in 24 buckets of 4
hashes. A pair whose sets are 0.6 alike becomes a candidate in 97 cases of 100, one of 0.4 (either read with a wrong word
in eighteen) in 47, one of 0.02 (two novels) in none of 250,000. A candidate is a copy if its fingerprints agree.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.binaryio import read_tuples_from_file
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from prep.common import BadInput, atomic_write, seal, write_text
from prep.filters import year_of

MINHASH = MinhashConfig(n_grams=5, num_buckets=24, hashes_per_bucket=4)
WORDS = 8  # of a fingerprint's sequences
SAMPLE = 16  # one sequence of so many is kept
SAME = 0.1  # of the smaller fingerprint shared by two copies of one text; two novels share 0.001
WELL_READ = 0.85  # share of known words; between two editions above it, differences are of names and spelling
# Sampled sequences that a book may share with protected text: 128 or so of all, less than a page. A proverb, a verse or
# a prayer that both quote is a dozen.
OVERLAP = 8
REPEATED, COPY, CONTAMINATED = "identifier seen before", "near-duplicate", "contaminated"

Pair = tuple[tuple[int, int], tuple[int, int]]  # two books, each (task, line)


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


# --- works and sides -------------------------------------------------------------------------------------------------


def fraction(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone: a draw that needs neither order nor memory."""
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

    Not the author: editions spell him in many ways or not at all. Two authors' works of one title on the same side cost
    nothing; one edition on either side is a leak. A book without a title is a work of its own.
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


def held_out(works: Iterable[str], share: float) -> set[str]:
    """The works that are held out: those whose hash falls into the first `share` of all hashes.

    Neither seed nor corpus enters, so every stage holds out the same works. Only where no work of the corpus falls there
    (a few dozen books), the nearest one is held out.
    """
    places = {work: fraction("held out", work) for work in works}
    limit = max(share, min(places.values(), default=0)) if share else -1
    return {work for work, place in places.items() if place <= limit}


# --- fingerprints ----------------------------------------------------------------------------------------------------

_LETTERS = bytes(byte if byte in b"abcdefghijklmnopqrstuvwxyz" else ord(" ") for byte in range(256))
_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))
_hash = functools.lru_cache(1_000_000)(xxhash.xxh64_intdigest)  # of a word, once; a million take some 200 MB


def word_hashes(text: str) -> np.ndarray:
    """One uint64 a word of a text."""
    words = unicodedata.normalize("NFD", text.lower()).encode("ascii", "ignore").translate(_LETTERS).split()
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def sampled(words: np.ndarray, length: int) -> np.ndarray:
    """Sorted hashes of a sixteenth of the sequences of `length` words, each once: those whose hash says so."""
    count = len(words) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for i in range(length):
        hashes = hashes * _ODD[0] + words[i : i + count]
    hashes = (hashes ^ (hashes >> np.uint64(31))) * _ODD[1]
    hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes[hashes % np.uint64(SAMPLE) == 0])


def fingerprint(text: str) -> np.ndarray:
    """A sorted array of uint64: the sampled sequences of eight words."""
    return sampled(word_hashes(text), WORDS)


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many sequences of sorted fingerprint `one` are in sorted fingerprint `other`."""
    if not len(one) or not len(other):
        return 0
    places = np.minimum(np.searchsorted(other, one), len(other) - 1)
    return int(np.count_nonzero(other[places] == one))


class Signatures(MinhashDedupSignature):
    """datatrove's signatures, and beside them an entry and a fingerprint of each book.

    The sequences are hashed by numpy, twenty times faster than datatrove's own, which joins words to strings.
    """

    name = "signatures"

    def __init__(self, corpus: Path):
        super().__init__(str(corpus / "signatures"), MINHASH, WhitespaceTokenizer())
        self.corpus = corpus
        self._sequences = np.empty(0, np.uint64)

    def get_shingles(self, text: str) -> np.ndarray:
        return self._sequences.reshape(-1, 1)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        folder = self.corpus
        (folder / "entries").mkdir(parents=True, exist_ok=True)
        prints: list[np.ndarray] = []
        with open(folder / "entries" / f"{rank:05d}.jsonl", "wb") as entries:
            super().run(self._noted(data, rank, entries, prints), rank, world_size)
        # Two arrays a task: the fingerprints one after the other, and where each ends.
        (folder / "prints").mkdir(exist_ok=True)
        np.save(folder / "prints" / f"{rank:05d}.npy", np.concatenate([np.empty(0, np.uint64), *prints]))
        np.save(folder / "prints" / f"{rank:05d}.ends.npy", np.cumsum([0, *map(len, prints)]))

    def _noted(self, data: Any, rank: int, entries: Any, prints: list[np.ndarray]) -> Iterator[Document]:
        for line, document in enumerate(data):
            with self.track_time():
                words = word_hashes(document.text)
                self._sequences = sampled(words, MINHASH.n_grams)
                prints.append(sampled(words, WORDS))
                title, author, date, known = (document.metadata[key] for key in ("title", "author", "date", "known"))
                work, digest = work_of(title, document.id), xxhash.xxh64_hexdigest(document.text.encode())
                entry = Entry(rank, line, document.id, title, author, date, work, len(document.text), known, digest)
                entries.write(orjson.dumps({**entry._asdict(), "opening": document.text[:1000]}) + b"\n")
            yield document


class Prints:
    """The fingerprints of a corpus, read from the disk as they are needed."""

    def __init__(self, folder: Path):
        self.array = functools.cache(lambda name: np.load(folder / "prints" / name, mmap_mode="r"))

    def __getitem__(self, entry: Entry) -> np.ndarray:
        start, end = self.array(f"{entry.rank:05d}.ends.npy")[entry.line : entry.line + 2]
        return self.array(f"{entry.rank:05d}.npy")[start:end]


def candidate_pairs(folder: Path) -> set[Pair]:
    """Pairs of books that have a bucket of their signatures in common."""
    pairs = set()
    for path in (folder / "buckets").glob("*.dups"):
        with open(path, "rb") as handle:
            pairs |= {((a, b), (c, d)) for a, b, c, d in read_tuples_from_file(handle, "4I", lines_to_buffer=-1)}
    return pairs


class Gone(NamedTuple):
    """Why a book was left out of the corpus."""

    reason: str
    because: str  # the book that stays, or the text that it overlaps with


# --- the choice ------------------------------------------------------------------------------------------------------


def copies(entries: Iterable[Entry], pairs: Iterable[Pair], prints: Prints) -> dict[Entry, Entry]:
    """For each book that is a copy of a better one: the one that stays, whatever the order of books and pairs."""
    by_place = {(entry.rank, entry.line): entry for entry in entries}
    alike: dict[Entry, set[Entry]] = defaultdict(set)
    for places in pairs:
        one, other = (by_place.get(place) for place in places)
        if one and other and shared(prints[one], prints[other]) >= SAME * min(len(prints[one]), len(prints[other])):
            alike[one].add(other)
            alike[other].add(one)
    gone: dict[Entry, Entry] = {}
    for entry in sorted(alike, key=lambda entry: entry.preference):
        better = [other for other in alike[entry] if other not in gone and other.preference < entry.preference]
        if better:
            gone[entry] = min(better, key=lambda other: other.preference)
    return gone


def choose(
    entries: list[Entry], pairs: Iterable[Pair], prints: Prints, novel: np.ndarray, holdout: float
) -> tuple[dict[Entry, bool], dict[Entry, Gone]]:
    """The books that stay, each with whether it is held out, and those that do not.

    `novel`: the fingerprint of a text that no book may overlap with; may be empty. `holdout`: share of works.
    """
    gone: dict[Entry, Gone] = {}
    first: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.preference):
        if entry.source in first:
            gone[entry] = Gone(REPEATED, f"same identifier, in file {first[entry.source].rank + 1}")
        first.setdefault(entry.source, entry)
    for entry, stays in copies(first.values(), pairs, prints).items():
        gone[entry] = Gone(COPY, f"a copy of {stays.source} ({stays.title}, {stays.date})")

    def decontaminate(candidates: Iterable[Entry], protected: np.ndarray, name: str) -> None:
        for entry in candidates:
            if (count := shared(prints[entry], protected)) >= OVERLAP:
                told = f"{name}: {count} of {len(prints[entry])} sampled sequences of eight words"
                gone[entry] = Gone(CONTAMINATED, told)

    decontaminate(set(entries) - gone.keys(), novel, "the novel")
    left = [entry for entry in entries if entry not in gone]
    works = held_out({entry.work for entry in left}, holdout)
    sides = {entry: entry.work in works for entry in left}
    protected = [prints[entry] for entry, held in sides.items() if held]
    together = np.unique(np.concatenate([np.empty(0, np.uint64), *protected]))
    decontaminate([entry for entry, held in sides.items() if not held], together, "held-out books")
    return {entry: held for entry, held in sides.items() if entry not in gone}, gone


class Choose(PipelineStep):
    """What only the whole corpus shows. It reads entries and fingerprints, no text.

    Writes `chosen.jsonl`, `rejected/<reason>/`, and `corpus.json`: `described` and the funnel of all rules.
    """

    name, type = "choose", "CHOOSE"

    def __init__(self, folder: Path, tasks: int, holdout: float, against: Path | None, described: dict[str, Any]):
        super().__init__()
        self.folder, self.tasks, self.described = folder, tasks, described
        self.holdout, self.against = holdout, against

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        folder = self.folder
        novel = np.empty(0, np.uint64)
        if self.against and not len(novel := fingerprint(self.against.read_text(encoding="utf-8"))):
            raise BadInput(f"--against {self.against} holds no text to compare with")
        entries = [entry for entry, _ in read_entries(folder, self.tasks)]
        kept, gone = choose(entries, candidate_pairs(folder), Prints(folder), novel, self.holdout)
        write_rejected(folder, self.tasks, gone)
        with atomic_write(folder / "chosen.jsonl", "wb") as handle:
            for entry in sorted(kept, key=lambda entry: (entry.rank, entry.line)):
                handle.write(orjson.dumps({**entry._asdict(), "heldout": kept[entry]}) + b"\n")
        report = funnel(folder, self.tasks, gone, entries)
        report["documents"] |= {
            "kept": sum(not held for held in kept.values()),
            "heldout": sum(kept.values()),
            "characters_kept": sum(entry.characters for entry in kept),
        }
        write_text(folder / "corpus.json", json.dumps(self.described | report, ensure_ascii=False, indent=2))
        seal(folder, "books/*", "chosen.jsonl", "corpus.json")


def chosen_books(folder: Path) -> list[tuple[Entry, bool]]:
    """The books of a finished corpus, each with whether it is held out."""
    records = [orjson.loads(line) for line in (folder / "chosen.jsonl").read_bytes().splitlines()]
    return [(Entry(**{name: record[name] for name in Entry._fields}), record["heldout"]) for record in records]


def read_entries(folder: Path, tasks: int) -> Iterator[tuple[Entry, str]]:
    """The entries of all tasks, in order, with the opening of each text."""
    for rank in range(tasks):
        with open(folder / "entries" / f"{rank:05d}.jsonl", "rb") as lines:
            for record in map(orjson.loads, lines):
                opening = record.pop("opening")
                yield Entry(**record), opening


def write_rejected(folder: Path, tasks: int, gone: dict[Entry, Gone]) -> None:
    """Into `rejected/<reason>/`, as the filters of the first stage do."""
    place, name = str(folder / "rejected"), "${reason}/00000.jsonl.gz"
    with JsonlWriter(place, name, adapter=lambda _, document: document.metadata["fields"]) as writer:
        for entry, text in read_entries(folder, tasks):
            if why := gone.get(entry):
                fields = entry._asdict() | {"id": entry.source, "because": why.because, "text": text}
                writer.write(Document(text, entry.source, metadata={"reason": why.reason, "fields": fields}))


def funnel(folder: Path, tasks: int, gone: dict[Entry, Gone], entries: list[Entry]) -> dict[str, Any]:
    """Books and characters left after each step, and how many each rejected; from datatrove's statistics of all tasks."""
    steps: dict[str, Counter[str]] = defaultdict(Counter)
    cleaned: Counter[str] = Counter()
    for rank in range(tasks):
        for step in json.loads((folder / "logs" / "clean" / "stats" / f"{rank:05d}.json").read_text(encoding="utf-8")):
            kind, name = step["name"].split(": ", 1)
            stats = {key: value if isinstance(value, int) else value["total"] for key, value in step["stats"].items()}
            if kind in ("READER", "RULE", "CLEAN"):
                steps[name].update(stats)
            cleaned.update({key[9:]: value for key, value in stats.items() if key.startswith("cleaning ")})
    table = [
        {
            "step": name,
            "documents": stats["forwarded"],
            "characters": stats["doc_len"],
            "rejected": stats["total"] - stats["forwarded"],
        }
        for name, stats in steps.items()
    ]
    documents, characters = len(entries), sum(entry.characters for entry in entries)
    for reason in (REPEATED, COPY, CONTAMINATED):
        out = [entry for entry, why in gone.items() if why.reason == reason]
        documents, characters = documents - len(out), characters - sum(entry.characters for entry in out)
        table.append({"step": reason, "documents": documents, "characters": characters, "rejected": len(out)})
    rejected = {str(row["step"]): row["rejected"] for row in table if row["rejected"]}
    contaminated = {entry.source: why.because for entry, why in gone.items() if why.reason == CONTAMINATED}
    return {
        "documents": {
            "read": table[0]["documents"],
            "characters_read": table[0]["characters"],
            "rejected": dict(sorted(rejected.items())),
            "cleaning": dict(sorted(cleaned.items())),
        },
        "funnel": table,
        "contaminated": dict(sorted(contaminated.items())),
    }
