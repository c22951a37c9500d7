"""Steps 1a and 1b: training rows from the books of Gallica.

    python prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 512 \\
        --windows 1000000 --split 1/2 --seed 42 --out data/2a.jsonl
    python prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 2048 \\
        --windows 250000 --split 2/2 --seed 42 --out data/2b.jsonl

Two phases, both pipelines of datatrove. The first makes the corpus: books are cleaned, those that are no French prose
fiction or were read badly are rejected, copies and whatever overlaps with held-out text or with the novel (--against)
removed. It is made once and lies in data/gallica/<digest>; both commands above draw from the same one. The second
cuts rows: each book is either held out as a whole or cut into segments, of which each split takes its own, so that
rows of split 1/2 and of split 2/2 never share a passage, whatever the tokenizer, the seed and the sequence length.
Windows are drawn evenly from as many works as there are. `--windows all` takes everything.

Which books are held out hangs on their titles and --holdout alone: give both splits the same --holdout, and neither
trains on what the other holds out. Same input and seed give the same bytes, however the books lie in files. Killed,
the same command goes on where it was. Sources, rules and clusters: prep/README.md.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from prep.common import BadInput, run, sha256, source_files
from prep.corpus import PACKAGES, Wanted, described, digest, stages
from prep.drawing import CleanBooks, Cut, Draw, Share, Short, Write
from prep.executor import Cluster, alone
from prep.readers import source_paths
from prep.rows import Cutter, load_tokenizer, manifest_path

HELDOUT_TOKENS = 262_144  # the default: enough for a validation loss to two decimals, and read in a minute on a GPU
SURPLUS = 1.1  # times the windows wanted, for planning by estimated lengths


def count_or_all(value: str) -> float:
    return math.inf if value == "all" else int(value)


def split(value: str) -> Share:
    number, of = map(int, value.split("/"))
    if not 1 <= number <= of:
        raise ValueError
    return Share(number, of)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments, checked as far as they can be without reading a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of parquet, TSV archives, JSONL or text")
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
    chosen = parser.add_argument_group("which books (the same for both splits)")
    chosen.add_argument("--from-year", type=int, metavar="YEAR", help="published then or later")
    chosen.add_argument("--to-year", type=int, metavar="YEAR", help="published then or before")
    chosen.add_argument("--against", type=Path, metavar="FILE", help="a text no book may overlap with: the novel")
    chosen.add_argument("--cap-per-work", type=int, metavar="N", help="windows of one work at most, all volumes")
    who = parser.add_argument_group("who does the work")
    who.add_argument("--executor", choices=("local", "slurm", "ray"), default="local", help="(default local)")
    who.add_argument("--workers", type=int, default=os.cpu_count(), help="tasks at once (default: one a core)")
    who.add_argument("--partition", default="", help="Slurm's partition")
    who.add_argument("--time", default="12:00:00", help="Slurm's limit for one task (default %(default)s)")
    who.add_argument("--work", type=Path, help="folder of the corpus (default: gallica, beside --out)")
    args = parser.parse_args(argv)
    if args.windows < 1 or (args.heldout_windows is not None and args.heldout_windows < 1):
        raise BadInput("--windows and --heldout-windows must be at least 1; --holdout 0 holds nothing out")
    if args.workers < 1 or (args.cap_per_work is not None and args.cap_per_work < 1):
        raise BadInput("--workers and --cap-per-work must be at least 1")
    if args.out.suffix != ".jsonl":
        raise BadInput(f"--out {args.out} must end in .jsonl")
    if not 0 <= args.holdout <= 0.5:
        raise BadInput(f"--holdout {args.holdout} must be a share between 0 and 0.5")
    if args.against and not args.against.is_file():
        raise BadInput(f"--against {args.against} is no file: give the novel's text (data/2c.txt)")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    Cutter(tokenizer, args.sequence_len)  # raises before anything is read
    heldout_windows = args.heldout_windows or max(1, HELDOUT_TOKENS // args.sequence_len)
    draw = Draw(args.split, args.sequence_len, args.windows, heldout_windows, args.cap_per_work, args.seed)
    cluster = Cluster(args.executor, args.workers, args.partition, args.time)

    files = source_paths(args.source)
    held = source_files(files)
    wanted = Wanted(args.from_year, args.to_year, args.holdout, args.against and args.against.resolve())
    hangs_on = described(held, wanted)
    out = args.out.resolve()
    corpus = (args.work.resolve() if args.work else out.parent / "gallica") / digest(hangs_on)
    record = args.source / "source.json"
    origin = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    manifest: dict[str, Any] = {
        "tokenizer": str(args.tokenizer),
        "source": {"path": str(args.source)} | {k: origin.get(k) for k in ("repo", "revision")} | {"files": held},
        "arguments": {
            "split": f"{args.split.number}/{args.split.of}",
            "holdout": args.holdout,
            "heldout_windows": heldout_windows,
            "from_year": args.from_year,
            "to_year": args.to_year,
            "against": hangs_on["wanted"]["against"],
            "cap_per_work": args.cap_per_work,
        },
        "packages": PACKAGES,
    }
    with alone(corpus):
        last = stages(files, wanted, corpus, cluster, hangs_on)
        if args.executor != "slurm":
            last.run()
        surplus = SURPLUS
        while True:
            asked = [draw, surplus, str(out), manifest, sha256(args.tokenizer / "tokenizer.json")]
            cut = corpus / f"rows-{digest([str(part) for part in asked])}"
            cut.mkdir(exist_ok=True)
            tokenizer.save(cut / "tokenizer.json")
            cutting = [CleanBooks(corpus), Cut(corpus, cut, draw, surplus)]
            stage = cluster.stage("cut", cutting, len(files), cut, last if args.executor == "slurm" else None)
            final = cluster.stage("draw", [Write(corpus, cut, len(files), draw, out, manifest)], 1, cut, stage)
            try:
                final.run()
            except Short:
                print(
                    f"the books hold fewer windows than their lengths promised: cutting again, {2 * surplus:g} times as many"
                )
                surplus *= 2
                shutil.rmtree(cut)
                continue
            break
        if args.executor == "slurm":
            print(f"submitted; when job draw is done, the rows are in {out}, and {cut} can be removed")
            return
        shutil.rmtree(cut)
    told = json.loads(manifest_path(out).read_text(encoding="utf-8"))
    documents = told["documents"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in documents["rejected"].items()) or "none"
    print(f"{documents['read']:,} books read: {documents['kept']:,} to train on, {documents['heldout']:,} held out")
    print(f"rejected: {reasons}" + (f" ({corpus / 'rejected'})" if documents["rejected"] else ""))
    for name in ("train", "heldout"):
        part = told[name]
        print(f"{part['path']}: {part['rows']:,} rows, {part['windows']:,} windows of {args.sequence_len}")


if __name__ == "__main__":
    run(main)
