"""Steps 1a and 1b: training rows from the books of Gallica.

    python prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 512 \\
        --windows 1000000 --split 1/2 --seed 42 --out data/2a.jsonl
    python prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 2048 \\
        --windows 250000 --split 2/2 --seed 42 --out data/2b.jsonl

First the corpus: books are cleaned; those that are no French prose fiction, were read badly, are copies or contaminated by
held-out text or the novel (--against) are rejected. It is made once, in data/gallica/<digest>, and both commands draw from
it. Then the rows: a book is either held out as a whole, or cut into chunks of which each split takes its own, so that
splits never share text, whatever the tokenizer, the seed and the sequence length. Windows are drawn evenly from as many
works as there are; `--windows all` takes everything.

Titles and --holdout alone decide which books are held out: give both splits the same --holdout, and neither trains on what
the other holds out. Same input and seed give the same bytes, however the books are laid out in files. Killed, the same
command resumes. Sources, filters and clusters: prep/README.md.
"""

from prep.command import run, without_torch

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from prep import filters
from prep.common import SEAL, BadInput, collected, digest, lock, positive, sha256, source_files, versions, write_json
from prep.dedup import MINHASH, Choose, Signatures
from prep.executor import COUNTER, Cluster, forget, take
from prep.page_layout import clean_pages
from prep.readers import FICTION_REPO, LIBRARY_REPO, LIBRARY_TOKENS, Books, source_paths
from prep.rows import CutRows, Cutter, Draw, DrawRows, Share, holdout_share, jsonl_path, keep_sources, manifest_path

CORPUS_VERSION = 11  # raised by hand when the code makes other books or rows of the same sources
PACKAGES = (  # decide them too
    "datatrove", "lxml", "numpy", "py3langid", "pyarrow", "pypdfium2", "pyspellchecker", "rapidfuzz", "striprtf", "xxhash"
)  # fmt: skip
MESSAGES = "messages.txt"  # in the corpus: which books were not read, or not wholly
HELDOUT_TOKENS = 262_144  # the default: enough for a validation loss to two decimals, and read in a minute on a GPU


class CleanPages(PipelineStep):
    """A book's pages become paragraphs in the project's typography, one blank line between two."""

    name, type = "cleaned", "CLEAN"

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


class CleanBooks(JsonlReader):
    """The books that the same task of stage `clean` wrote; it wrote no file where it kept no book."""

    def __init__(self, folder: Path):
        super().__init__(str(folder / "books"), compression="zstd")

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        name = f"{rank:05d}.jsonl.zst"
        if self.data_folder.isfile(name):
            yield from self.read_file(name)


def pipeline(args: argparse.Namespace, files: list[Path], corpus: Path, described: dict[str, Any]) -> list[tuple]:
    """The stages that make the corpus, each (name, steps, tasks). What costs little is before what costs much."""
    rejected, tasks = corpus / "rejected", len(files)
    period, fiction = [], []
    if args.from_year or args.to_year:
        period = [filters.InPeriod(rejected, args.from_year or 0, args.to_year or 9999)]
    if "curated" not in described["arguments"]:  # where the library shelves it as fiction
        fiction = [filters.Fiction(rejected)]
    clean = [
        Books(files, corpus / COUNTER, corpus / MESSAGES),
        filters.Read(rejected),
        filters.WithIdentifier(rejected),
        filters.WithText(rejected),
        *period,
        filters.LongEnough(rejected),
        filters.French(rejected),
        filters.Readable(rejected),
        *fiction,
        CleanPages(),
        filters.LongEnoughWhenCleaned(rejected),
        JsonlWriter(str(corpus / "books"), "${rank}.jsonl.zst", compression="zstd"),
        Signatures(corpus),
    ]
    signatures, buckets = str(corpus / "signatures"), str(corpus / "buckets")
    group = MinhashDedupBuckets(signatures, buckets, config=MINHASH, lines_to_buffer=1000)
    return [
        ("clean", clean, tasks),
        ("buckets", [group], MINHASH.num_buckets),
        ("choose", [Choose(corpus, tasks, args.holdout, args.against, described)], 1),
    ]


def count_or_all(text: str) -> float:
    return math.inf if text == "all" else positive(text)


def split(text: str) -> Share:
    number, of = map(int, text.split("/"))
    if not 1 <= number <= of:
        raise ValueError
    return Share(number, of)


def utf8_file(text: str) -> Path:
    try:
        Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no UTF-8 text: give the novel's (data/2c.txt)") from error
    return Path(text).resolve()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder of parquet, page tables, JSONL or books (prep/readers.py)")
    add("--tokenizer", type=Path, required=True, help="folder of the base model")
    add("--sequence-len", type=int, required=True, help="tokens a window (the recipe's sequence_len)")
    add("--windows", type=count_or_all, required=True, help="how many windows to write, or: all")
    add("--split", type=split, default=Share(1, 2), metavar="K/N", help="which share (default 1/2)")
    add("--holdout", type=holdout_share, default=0.01, help="share of works held out; 0: none (default 0.01)")
    add("--heldout-windows", type=positive, metavar="N", help="held-out windows at most (default: 262,144 tokens)")
    add("--seed", type=int, default=42, help="of the draw and the order of rows (default 42)")
    add("--out", type=jsonl_path, required=True, help="the rows, such as data/2a.jsonl")
    add = parser.add_argument_group("which books (the same for both splits)").add_argument
    add("--from-year", type=int, metavar="YEAR", help="published then or later")
    add("--to-year", type=int, metavar="YEAR", help="published then or before")
    add("--against", type=utf8_file, metavar="FILE", help="a text no book may overlap with: the novel")
    add("--cap-per-work", type=positive, metavar="N", help="windows of one work at most, all volumes")
    add = parser.add_argument_group("who does the work").add_argument
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="(default local)")
    add("--workers", type=positive, default=os.cpu_count(), help="tasks at once (default: one a core)")
    add("--partition", default="", help="Slurm's partition")
    add("--time", default="12:00:00", help="Slurm's limit for one task (default %(default)s)")
    add("--fresh", action="store_true", help="make the corpus again even if it is there")
    add("--drop-sources", action="store_true", help="remove the source files in the end: the corpus has their text")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.executor == "ray" and not importlib.util.find_spec("ray"):
        raise BadInput("--executor ray: ray is not installed here; pip install ray")
    cutter = Cutter(args.tokenizer, args.sequence_len)
    heldout_windows = args.heldout_windows or max(1, HELDOUT_TOKENS // args.sequence_len)
    draw = Draw(args.split, args.windows, heldout_windows, args.cap_per_work, args.seed)
    files = source_paths(args.source)
    keep_sources(files, args.out)
    origin = {key: collected(args.source).get(key) for key in ("repo", "revision")}
    warn_if_short(origin["repo"], len(files), args)
    described: dict[str, Any] = {
        "version": CORPUS_VERSION,
        "files": source_files(files),
        "arguments": {
            "holdout": args.holdout,
            "from_year": args.from_year,
            "to_year": args.to_year,
            "against": args.against and sha256(args.against),
            **({"curated": origin["repo"]} if origin["repo"] == FICTION_REPO else {}),
        },
        "packages": versions(*PACKAGES),
    }
    out = args.out.resolve()
    corpus = out.parent / "gallica" / digest(described)[:12]
    manifest: dict[str, Any] = {
        "tokenizer": args.tokenizer,
        "source": {"path": str(args.source)} | origin | {"files": described["files"]},
        "arguments": {
            "split": f"{args.split.number}/{args.split.of}",
            "heldout_windows": heldout_windows,
            "cap_per_work": args.cap_per_work,
            **described["arguments"],
        },
        "packages": PACKAGES,
    }
    record = args.source / "source.json"
    if args.drop_sources and (args.executor == "slurm" or not record.is_file()):
        raise BadInput(f"--drop-sources: {args.source} was not made by collect.py, or the executor is slurm")
    take(corpus)
    gone = [path for path in files if not path.exists()]
    if gone and (args.fresh or not (corpus / SEAL).is_file()):
        raise BadInput(
            f"{gone[0]} was dropped or lost, and its text is in no whole corpus of these arguments: "
            f"remove {record} and collect it again"
        )
    if args.fresh:
        forget(corpus)
    asked = [draw, args.sequence_len, out, manifest, sha256(args.tokenizer / "tokenizer.json")]
    rows = corpus / f"rows-{digest(list(map(str, asked)))[:12]}"
    cluster = Cluster(args.executor, args.workers, args.partition, args.time)
    # A bucket takes a second or two: one worker here, one job on a cluster.
    buckets = cluster._replace(workers=1)
    stages: list[Any] = []
    for name, steps, tasks in pipeline(args, files, corpus, described):
        who, per_job = (buckets, tasks) if name == "buckets" else (cluster, 1)
        stages.append(who.stage(name, steps, tasks, corpus, stages[-1] if stages else None, per_job))
    cut = [CleanBooks(corpus), CutRows(corpus, rows, cutter, draw)]
    stages.append(cluster.stage("cut", cut, len(files), rows, stages[-1]))
    last = [DrawRows(corpus, rows, len(files), cutter, draw, out, manifest)]
    stages.append(cluster.stage("draw", last, 1, rows, stages[-1]))
    print(f"{args.out}: rows from {len(files)} files of {args.source} (corpus: {corpus})", flush=True)
    try:
        cluster.run(stages, corpus)
    except BadInput:
        if not stages[-2].get_incomplete_ranks():  # refused by the draw: no other command reads these
            shutil.rmtree(rows)
        raise
    finally:
        tell(corpus / MESSAGES)
    if args.executor == "slurm":
        print(f"submitted; when job draw is done, the rows are in {out}, and {rows} can be removed")
        return
    shutil.rmtree(rows)
    if args.drop_sources and gone != files:
        drop(record)
    told = json.loads(manifest_path(out).read_text(encoding="utf-8"))
    documents = told["documents"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in documents["rejected"].items()) or "none"
    print(f"{documents['read']:,} books read: {documents['kept']:,} to train on, {documents['heldout']:,} held out")
    print(f"rejected: {reasons}" + (f" ({corpus / 'rejected'})" if documents["rejected"] else ""))
    for part in (told["train"], told["heldout"]):
        print(f"{part['path']}: {part['rows']:,} rows, {part['windows']:,} windows of {args.sequence_len}")


def warn_if_short(repo: str | None, files: int, args: argparse.Namespace) -> None:
    """Say at the start how many files of the whole library would do, where these cannot be enough."""
    wanted = args.windows * args.sequence_len * args.split.of
    if repo == LIBRARY_REPO and math.inf > wanted > files * LIBRARY_TOKENS:
        enough = math.ceil(wanted / LIBRARY_TOKENS)
        print(
            f"{args.source} has {files} files of {repo}, and each holds about {LIBRARY_TOKENS / 1e6:.0f} M tokens of prose fiction: "
            f"for this many windows in each of {args.split.of} splits at least {enough} are needed "
            f"(python prep/collect.py gallica --dataset {repo} --files {enough})",
            file=sys.stderr,
        )


def drop(record: Path) -> None:
    """Remove the files that collect.py recorded. The record says so first, or the next `make data` would bring them again."""
    lock(record.parent.resolve())  # as collect.py does
    told = json.loads(record.read_text(encoding="utf-8"))
    write_json(record, told | {"files": [file | {"dropped": True} for file in told["files"]]})
    for file in told["files"]:
        record.with_name(file["name"]).unlink(missing_ok=True)
    print(f"{record.parent}: dropped, {sum(file['bytes'] for file in told['files']) / 1e6:,.1f} MB")


def tell(messages: Path) -> None:
    """Print what the readers have said of books, each line once: a resumed task says it again."""
    lines = sorted(set(messages.read_text(encoding="utf-8").splitlines())) if messages.is_file() else []
    for line in lines[:20]:
        print(line, file=sys.stderr)
    if len(lines) > 20:
        print(f"and {len(lines) - 20} more in {messages}", file=sys.stderr)


if __name__ == "__main__":
    without_torch()
    from prep import gallica

    run(gallica.main)  # not this file's own: workers find the steps above in a module, not in __main__
