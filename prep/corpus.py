"""The corpus that all splits are drawn from: books of a source, cleaned, selected, each once, none near protected text.

Three stages of datatrove, each with its own workers, logs and completion marks:

    clean     a task for each source file: rules, cleaning, the text and a fingerprint of each book that is left
    buckets   a task for each MinHash bucket: which signatures meet
    choose    one task: copies and identifiers seen before, the works held out, and whatever overlaps with them

All lie in one folder named by a digest of what they hang on: source files, arguments, code and packages. Another source
or another rule is another folder, so that nothing of one run can get into another. What was thrown away lies in
`rejected/<reason>/`, and `corpus.json` has the funnel: books and characters, in and out, of every rule.
"""

import contextlib
import gzip
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets
from datatrove.pipeline.writers import JsonlWriter

from prep.common import BadInput, atomic_write, sha256, versions
from prep.dedup import MINHASH, Entry, Prints, Signatures, candidate_pairs, copies, fingerprint, shared
from prep.executor import Cluster
from prep.filters import (
    Fiction,
    French,
    InPeriod,
    LongEnough,
    LongEnoughWhenCleaned,
    Readable,
    WithIdentifier,
    WithText,
)
from prep.page_layout import clean_pages
from prep.readers import Books
from prep.works import HeldOut

PACKAGES = ("datatrove", "numpy", "py3langid", "pyarrow", "pyspellchecker", "rapidfuzz", "xxhash")
# Sampled runs of eight words that a book may share with the protected texts: 128 or so of all, less than a page. A
# proverb, a verse or a prayer that both quote is a dozen.
OVERLAP = 8
# This folder's modules that decide what a corpus is; the others cut rows from it, or bring it here.
CODE = ("corpus", "dedup", "front_matter", "page_layout", "paragraphs", "filters", "readers", "typography", "works")
TWICE, COPY, NEAR = "identifier seen before", "near-duplicate", "overlaps protected text"


class Wanted(NamedTuple):
    """What a corpus is to be: the arguments that its bytes hang on."""

    from_year: int | None
    to_year: int | None
    holdout: float  # share of works
    against: Path | None  # a text to keep clear of: the novel

    def described(self) -> dict[str, Any]:
        return {**self._asdict(), "against": self.against and sha256(self.against)}


class CleanPages(PipelineStep):
    """A book's pages become paragraphs in the project's convention, one blank line between two."""

    name = "cleaned"
    type = "CLEAN"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data or ():
            with self.track_time():
                cleaned = clean_pages(document.text)
                document.text = "\n\n".join(cleaned.paragraphs)
            self.stat_update("total", "forwarded")
            self.update_doc_stats(document)
            for kind, count in cleaned.counts.items():
                self.stat_update(f"cleaning {kind}", value=count)
            yield document


def cleaning(files: list[Path], wanted: Wanted, folder: Path) -> list[PipelineStep]:
    """The first stage. What costs little stands before what costs much; all but the last two rules see raw pages."""
    rejected = folder / "rejected"
    years = wanted.from_year, wanted.to_year
    return [
        Books(files),
        WithIdentifier(rejected),
        WithText(rejected),
        *([InPeriod(rejected, years[0] or 0, years[1] or 9999)] if any(years) else []),
        LongEnough(rejected),
        French(rejected),
        Readable(rejected),
        Fiction(rejected),
        CleanPages(),
        LongEnoughWhenCleaned(rejected),
        JsonlWriter(str(folder / "books"), "${rank}.jsonl.zst", compression="zstd"),
        Signatures(folder),
    ]


class Choose(PipelineStep):
    """The last stage: what only the whole corpus shows. It reads entries and fingerprints, no text."""

    name = "choose"
    type = "CHOOSE"

    def __init__(self, folder: Path, tasks: int, wanted: Wanted, described: dict[str, Any]):
        super().__init__()
        self.folder, self.tasks, self.wanted, self.described = str(folder), tasks, wanted, described

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        folder = Path(self.folder)
        entries = [entry for entry, _ in read_entries(folder, self.tasks)]
        prints = Prints(folder)
        kept, gone = choose(entries, candidate_pairs(folder), prints, self.wanted)
        write_rejected(folder, self.tasks, gone)
        chosen = sorted(kept, key=lambda entry: (entry.rank, entry.line))
        with atomic_write(folder / "chosen.jsonl", "wb") as handle:
            for entry in chosen:
                handle.write(orjson.dumps({**entry._asdict(), "heldout": kept[entry]}) + b"\n")
        report = funnel(folder, self.tasks, gone, entries)
        sides = {side: sum(held == side for held in kept.values()) for side in (False, True)}
        report["documents"] |= {
            "kept": sides[False],
            "heldout": sides[True],
            "characters_kept": sum(entry.characters for entry in kept),
        }
        with atomic_write(folder / "corpus.json") as handle:
            json.dump(self.described | report, handle, ensure_ascii=False, indent=2)


class Gone(NamedTuple):
    """Why a book was left out of the corpus, as its folder of rejected books tells it."""

    reason: str
    because: str  # the book that stays; the protected texts that it overlaps with


def choose(
    entries: list[Entry], pairs: Iterable[tuple[tuple[int, int], tuple[int, int]]], prints: Prints, wanted: Wanted
) -> tuple[dict[Entry, bool], dict[Entry, Gone]]:
    """The books that stay, each with whether it is held out, and those that do not."""
    gone: dict[Entry, Gone] = {}
    first: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.preference):
        if entry.source in first:
            gone[entry] = Gone(TWICE, f"same identifier, in file {first[entry.source].rank + 1}")
        first.setdefault(entry.source, entry)
    for entry, stays in copies(first.values(), pairs, prints).items():
        gone[entry] = Gone(COPY, f"a copy of {stays.source} ({stays.title}, {stays.date})")

    novel = np.empty(0, np.uint64)
    if wanted.against:
        novel = fingerprint(wanted.against.read_text(encoding="utf-8"))
        if not len(novel):
            raise BadInput(f"--against {wanted.against} holds no text to keep clear of")
    for entry in set(entries) - gone.keys():
        if (runs := shared(prints[entry], novel)) >= OVERLAP:
            gone[entry] = Gone(NEAR, f"the novel: {runs} of {len(prints[entry])} sampled runs of eight words")
    left = [entry for entry in entries if entry not in gone]
    held_out = HeldOut(wanted.holdout, {entry.work for entry in left})
    kept = {entry: held_out(entry.work) for entry in left}
    protected = [prints[entry] for entry, held in kept.items() if held]
    together = np.unique(np.concatenate(protected)) if protected else np.empty(0, np.uint64)
    for entry, held in list(kept.items()):
        if not held and (runs := shared(prints[entry], together)) >= OVERLAP:
            gone[entry] = Gone(NEAR, f"held-out books: {runs} of {len(prints[entry])} sampled runs of eight words")
            del kept[entry]
    return kept, gone


def read_entries(folder: Path, tasks: int) -> Iterator[tuple[Entry, str]]:
    """The entries of all tasks, in order, with the opening of each text."""
    for rank in range(tasks):
        with open(folder / "entries" / f"{rank:05d}.jsonl", "rb") as lines:
            for line in lines:
                record = orjson.loads(line)
                opening = record.pop("opening")
                yield Entry(**record), opening


def write_rejected(folder: Path, tasks: int, gone: dict[Entry, Gone]) -> None:
    """Into `rejected/<reason>/`, as the rules of the first stage do."""
    with contextlib.ExitStack() as stack:
        handles: dict[str, Any] = {}
        for reason in {why.reason for why in gone.values()}:
            (folder / "rejected" / reason).mkdir(parents=True, exist_ok=True)
            handles[reason] = stack.enter_context(gzip.open(folder / "rejected" / reason / "00000.jsonl.gz", "wb"))
        for entry, opening in read_entries(folder, tasks):
            if entry in gone:
                reason, because = gone[entry]
                record = entry._asdict() | {"id": entry.source, "because": because, "text": opening}
                handles[reason].write(orjson.dumps(record) + b"\n")


def funnel(folder: Path, tasks: int, gone: dict[Entry, Gone], entries: list[Entry]) -> dict[str, Any]:
    """Books and characters left after each step, and how many each rejected; from datatrove's statistics of all tasks."""
    steps: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # in, out, characters out
    cleaned: dict[str, int] = defaultdict(int)
    for rank in range(tasks):
        for step in json.loads((folder / "logs" / "clean" / "stats" / f"{rank:05d}.json").read_text(encoding="utf-8")):
            kind, name = step["name"].split(": ", 1)
            stats = {key: value if isinstance(value, int) else value["total"] for key, value in step["stats"].items()}
            if kind in ("READER", "RULE", "CLEAN"):
                for i, key in enumerate(("total", "forwarded", "doc_len")):
                    steps[name][i] += stats.get(key, 0)
            for key, value in stats.items():
                if key.startswith("cleaning "):
                    cleaned[key.removeprefix("cleaning ")] += value
    table = [
        {"step": name, "documents": left, "characters": characters, "rejected": read - left}
        for name, (read, left, characters) in steps.items()
    ]
    documents, characters = len(entries), sum(entry.characters for entry in entries)
    for reason in (TWICE, COPY, NEAR):
        out = [entry for entry, why in gone.items() if why.reason == reason]
        documents, characters = documents - len(out), characters - sum(entry.characters for entry in out)
        table.append({"step": reason, "documents": documents, "characters": characters, "rejected": len(out)})
    overlapping = {entry.source: why.because for entry, why in gone.items() if why.reason == NEAR}
    return {
        "documents": {
            "read": table[0]["documents"],
            "characters_read": table[0]["characters"],
            "rejected": {
                str(row["step"]): row["rejected"]
                for row in sorted(table, key=lambda r: str(r["step"]))
                if row["rejected"]
            },
            "cleaning": dict(sorted(cleaned.items())),
        },
        "funnel": table,
        "overlapping": dict(sorted(overlapping.items())),
    }


# --- the folder and its stages ---------------------------------------------------------------------------------------


def described(files: list[dict[str, Any]], wanted: Wanted) -> dict[str, Any]:
    """All that the corpus hangs on: files (name, bytes, sha256), arguments, code, packages."""
    code = hashlib.sha256()
    for name in CODE:
        code.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return {
        "files": files,
        "wanted": wanted.described(),
        "code": code.hexdigest(),
        "packages": versions(*PACKAGES),
    }


def digest(value: Any) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def stages(
    files: list[Path], wanted: Wanted, folder: Path, cluster: Cluster, hangs_on: dict[str, Any]
) -> PipelineExecutor:
    """The three stages; the last one, whose `run` runs those before it that are not complete."""
    tasks = len(files)
    clean = cluster.stage("clean", cleaning(files, wanted, folder), tasks, folder, None)
    meet = MinhashDedupBuckets(
        str(folder / "signatures"), str(folder / "buckets"), config=MINHASH, lines_to_buffer=1000
    )
    # A bucket takes a second or two: one worker here, one job there.
    alone = cluster._replace(workers=1)
    buckets = alone.stage("buckets", [meet], MINHASH.num_buckets, folder, clean, tasks_per_job=MINHASH.num_buckets)
    return cluster.stage("choose", [Choose(folder, tasks, wanted, hangs_on)], 1, folder, buckets)


def chosen(folder: Path) -> list[tuple[Entry, bool]]:
    """The books of a finished corpus, each with whether it is held out."""
    with open(folder / "chosen.jsonl", "rb") as lines:
        found = []
        for line in lines:
            record = orjson.loads(line)
            heldout = record.pop("heldout")
            found.append((Entry(**record), heldout))
    return found


def estimated_windows(entry: Entry, splits: int, sequence_len: int, characters_a_token: float) -> int:
    """Windows that one split of a book holds, by its length."""
    return math.floor(entry.characters / (splits * characters_a_token * sequence_len))
