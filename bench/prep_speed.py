"""How fast the rows of Gallica are made, and in how much memory: the whole pipeline beside the naive method.

    python bench/prep_speed.py --source FOLDER --tokenizer models/base     -> bench/reports/prep.json and prep.md

Both make windows of 512 tokens from the same parquet files with the same tokenizer, in turns. The naive method: a random
slice of a random book, 6 characters per token, tokenised, a window decoded, in one process that holds all books; its start is
not counted. Ours is `prep/gallica.py --windows all` from a bare folder, start and all, with two workers.

The corpus of each size is made from the novels of FOLDER: a further book is one of them with three small words in five
another word of the same book, and one in 25 a form that no other book has. So it has their pages and headers, and no two
are near-duplicates. Processor seconds are those of our processes, so they compare on a busy machine. They and the resident
memory are sampled ten times a second (pages that workers share count in each).
"""

from prep.command import run

import argparse
import contextlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from tabulate import tabulate
from tokenizers import Tokenizer

from bench.common import apart, write_report
from prep.common import ROOT, BadInput, cpu_name, progress, versions
from prep.readers import read_books, source_paths

LENGTH = 512
LIBRARY_WORDS = 16.4e9  # of PleIAs/French-PD-Books
FILES = 8  # as the library's own files are many: tasks for the workers
WORKERS = 2
SECONDS = 15  # of the naive method each time
REPEATS = 3  # of both, at each size


def perturbed(text: str, draw: random.Random) -> str:
    """Another book on the same pages: other words of the book for most of its small words, headers stay.

    One in 25 has a letter too many, as no other book has it. Words beside a mark count too: left alone, they joined enough
    runs of eight that a held-out book protected its sisters, and of 800 books 83 were rejected.
    """
    words = re.split(r"(\W+)", text)
    pool = [word for word in words if word.isalpha() and word.islower()]

    def another(word: str) -> str:
        chance = draw.random()
        if chance < 0.04:
            place = draw.randrange(len(word) + 1)
            return word[:place] + draw.choice("abcdefghijklmnopqrstuvwxyzéèêàùç") + word[place:]
        return draw.choice(pool) if chance < 0.65 else word

    return "".join(another(word) if word.islower() and word.isalpha() else word for word in words)


def write_corpus(source: Path, folder: Path, count: int, files: int = FILES) -> tuple[int, int]:
    """`count` books in parquet files; returns their bytes and words."""
    books = [book for path in source_paths(source) for book in read_books(path) if len(book.text) > 100_000]
    novels = [book for book in books if not re.search("kocr|kdup", book.id) and " the " not in book.text[:20_000]]
    if not novels:
        raise BadInput(f"no novel of 100,000 characters in {source}")
    folder.mkdir(parents=True, exist_ok=True)  # killed, it left tables of the same names
    with ProcessPoolExecutor(WORKERS) as pool:
        made = [*progress(pool.map(partial(write_table, novels, folder, count, files), range(files)), total=files)]
    return sum(size for size, _ in made), sum(words for _, words in made)


def write_table(novels: list[Document], folder: Path, count: int, files: int, number: int) -> tuple[int, int]:
    """Every `files`-th of `count` books, from `number` on; their bytes and words."""
    rows, size, words = [], 0, 0
    for i in range(number, count, files):
        text, fields = novels[i % len(novels)].text, novels[i % len(novels)].metadata
        if i >= len(novels):
            letters = "".join(chr(97 + digit) for digit in (i // 676, i // 26 % 26, i % 26))
            text = perturbed(text, random.Random(i))
            fields = fields | {"title": f"{fields['title']} autrement {letters}"}
        size += len(text.encode())
        words += len(text.split())
        named = {name: fields[name] for name in ("title", "author", "date")}
        rows.append({"file_id": f"book{i:05d}", **named, "complete_text": text})
    pq.write_table(pa.Table.from_pylist(rows), folder / f"gallica_mono_{number + 1}.parquet")
    return size, words


def naive(source: Path, tokenizer: Path) -> dict[str, Any]:
    """Windows made in `SECONDS`, reading the files counted in."""
    draw = random.Random(1)
    began, cpu_began = time.monotonic(), time.process_time()
    tokens = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    books: list[str] = []
    for path in sorted(source.glob("*.parquet")):
        books += pq.read_table(path, columns=["complete_text"])["complete_text"].to_pylist()
    windows = 0
    while time.monotonic() - began < SECONDS:
        book = draw.choice(books)
        start = draw.randrange(max(1, len(book) - 6 * LENGTH))
        ids = tokens.encode(book[start : start + 6 * LENGTH]).ids[:LENGTH]
        windows += bool(tokens.decode(ids)) and len(ids) == LENGTH
    spent = time.monotonic() - began
    return {
        "windows": windows,
        "seconds": round(spent, 1),
        "windows_a_second": round(windows / spent),
        "windows_a_cpu_second": round(windows / (time.process_time() - cpu_began)),
    }


def ours(source: Path, tokenizer: Path, folder: Path, size: int) -> dict[str, Any]:
    """The whole command, its memory watched; then what each step of its log took."""
    words = ["--source", source, "--tokenizer", tokenizer, "--sequence-len", LENGTH, "--windows", "all"]
    words += ["--split", "1/1", "--holdout", 0.02, "--workers", WORKERS, "--out", folder / "2a.jsonl"]
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "prep/gallica.py"), *map(str, words)]
    process = psutil.Popen(command)
    worker = total = 0
    cpu: dict[int, float] = {}  # seconds of each process, as last seen
    while process.poll() is None:
        sizes = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            for each in [process, *process.children(recursive=True)]:
                times = each.cpu_times()
                cpu[each.pid] = times.user + times.system
                sizes.append(each.memory_info().rss)
        worker, total = max(worker, *sizes[1:], 0), max(total, sum(sizes))
        time.sleep(0.1)
    spent = time.monotonic() - began
    if process.wait() != 0:
        raise RuntimeError("prep/gallica.py failed")
    cpu_seconds = sum(cpu.values())
    manifest = json.loads((folder / "2a.manifest.json").read_text(encoding="utf-8"))
    windows = manifest["train"]["windows"] + manifest["heldout"]["windows"]
    steps: Counter[str] = Counter()
    for path in sorted(folder.glob("gallica/*/logs/clean/stats/*.json")):
        for step in json.loads(path.read_text(encoding="utf-8")):
            if step["time_stats"]:
                steps[step["name"].split(": ", 1)[1].replace("🐿 Jsonl", "written")] += step["time_stats"]["total"]
    return {
        "books": manifest["documents"]["kept"] + manifest["documents"]["heldout"],
        "rejected": manifest["documents"]["rejected"],
        "windows": windows,
        "seconds": round(spent, 1),
        "windows_a_second": round(windows / spent),
        "cpu_seconds": round(cpu_seconds, 1),
        "windows_a_cpu_second": round(windows / cpu_seconds),
        "mb_a_second_by_step": {name: round(size / 1e6 / total, 1) for name, total in steps.items() if total > 0.01},
        "peak_worker_mb": worker >> 20,
        "peak_sum_mb": total >> 20,
    }


def growth(sizes: list[dict[str, Any]]) -> dict[str, float]:
    """What more books cost, the start of programs apart: from the smallest size to the largest."""
    few, many = sizes[0], sizes[-1]
    seconds = many["ours"]["cpu_seconds"] - few["ours"]["cpu_seconds"]
    rate = (many["ours"]["windows"] - few["ours"]["windows"]) / seconds
    cost = seconds / (many["text_mb"] - few["text_mb"])
    return {
        "start_cpu_seconds": round(few["ours"]["cpu_seconds"] - cost * few["text_mb"], 1),
        "windows_a_cpu_second": round(rate),
        "times_naive_a_core": round(rate / many["naive"]["windows_a_cpu_second"], 2),
        "cpu_seconds_a_mb": round(cost, 3),
    }


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of repeated runs the one of middle speed."""
    return sorted(runs, key=lambda run: run["windows_a_second"])[len(runs) // 2]


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    machine, grown = report["machine"], report["growth"]
    rows = [
        {
            "books": size["books"],
            "MB": size["text_mb"],
            "windows/s: naive": size["naive"]["windows_a_second"],
            "ours": size["ours"]["windows_a_second"],
            "times naive, each run": ", ".join(f"{times:g}" for times in size["times_naive"]),
            "windows per processor second: naive": size["naive"]["windows_a_cpu_second"],
            "ours ": size["ours"]["windows_a_cpu_second"],
            "largest worker, MB": size["ours"]["peak_worker_mb"],
            "all processes, MB": size["ours"]["peak_sum_mb"],
        }
        for size in report["sizes"]
    ]
    steps = report["sizes"][-1]["ours"]["mb_a_second_by_step"]  # a filter that only looks at a field is no cost
    return f"""# Speed and memory of the preparation

{machine["cpu"]}, {machine["cores"]} cores, {machine["memory_gb"]} GB; {report["workers"]} workers; windows of {report["sequence_len"]} tokens;
the middle of {len(report["sizes"][0]["times_naive"])} runs, in turns. Ours counts its start, the naive method does not.

{tabulate(rows, headers="keys", tablefmt="github", intfmt=",", disable_numparse=[4])}

{tabulate([[name, rate] for name, rate in steps.items() if rate < 1000], headers=["step", "MB/s, one worker"], tablefmt="github")}

The start costs {grown["start_cpu_seconds"]:g} processor seconds, every further MB {grown["cpu_seconds_a_mb"]:g}: {grown["windows_a_cpu_second"]:,} windows per
processor second, {grown["times_naive_a_core"]:g} times the naive method's. The whole library (261,000 books, {LIBRARY_WORDS / 1e9:g} G words)
would take {LIBRARY_WORDS * report["bytes_a_word"] / 1e6 * grown["cpu_seconds_a_mb"] / 3600:,.0f} processor hours at that rate.
"""


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    results = []
    for count in args.books:
        with tempfile.TemporaryDirectory() as scratch:
            corpus = Path(scratch) / "corpus"
            size, words = write_corpus(args.source, corpus, count)
            baselines, made = [], []
            for number in range(REPEATS):
                baselines.append(apart(naive, corpus, args.tokenizer))
                made.append(ours(corpus, args.tokenizer, Path(scratch) / f"rows{number}", size))
        rates = [(a["windows_a_second"], b["windows_a_second"]) for a, b in zip(baselines, made, strict=True)]
        result = {
            "books": count,
            "text_mb": round(size / 1e6, 1),
            "naive": middle(baselines),
            "ours": middle(made),
            "times_naive": [round(our / its, 2) for its, our in rates],
        }
        results.append(result)
        print(json.dumps(result), flush=True)
    memory = round(psutil.virtual_memory().total / 2**30)
    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gb": memory},
        "sequence_len": LENGTH,
        "workers": WORKERS,
        "bytes_a_word": round(size / words, 2),
        "sizes": results,
        "growth": growth(results),
        "versions": versions("datatrove", "tokenizers", "pyarrow", "numpy"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a folder of French novels in parquet")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--books", type=int, nargs="+", default=[50, 200, 800], help="sizes (default 50 200 800)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "reports" / "prep.json")
    parser.add_argument("--library", type=Path, help="only make the largest corpus, 40 tables in this folder")
    args = parser.parse_args()
    if args.library:
        write_corpus(args.source, args.library, args.books[-1], 40)
        return
    if len(args.books) < 2:
        raise BadInput("--books needs two sizes: what a further megabyte costs is their difference")
    report = measured(args)
    write_report(args.out, report, page(report))
    print(page(report))


if __name__ == "__main__":
    run(main)
