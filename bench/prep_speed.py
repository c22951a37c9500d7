"""How fast the rows of Gallica are made, and in how much memory: this project's whole pipeline beside the naive method.

    python bench/prep_speed.py --source FOLDER --tokenizer models/base --books 50 100 200    -> bench/reports/prep.json

Both make windows of 512 tokens from the same parquet files with the same tokenizer, one after the other. The naive
method is what projects like this one do: take a random book, a random slice of it of 6 characters a token, tokenise it,
decode a window, repeat, in one process; its books lie in memory and nothing is cleaned. Ours is the command
`prep/gallica.py --windows all` as it stands, from a bare folder: cleaning, rules, signatures and all, two workers.

The corpus of each size is made from the novels of FOLDER: a book more is one of them with two small words in three
another word of the same book, so that it has their pages, headers and letters, and no two are near-duplicates.
A processor second is what a process ran, whatever else the machine did: on a busy machine it is the figure to compare.
Memory is resident memory, sampled ten times a second: of the largest worker, and of all processes together.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from eval.machine import cpu_name
from prep.duplicates import Signatures, sampled_runs, word_hashes
from prep.files import atomic_write, run
from prep.pages import clean_pages
from prep.rows import Cutter, load_tokenizer, versions
from prep.sources import read_books, source_paths

ROOT = Path(__file__).parent.parent
LENGTH = 512
FILES = 8  # as the library's own files are many: tasks for two workers


def perturbed(text: str, draw: random.Random) -> str:
    """Another book on the same pages: two words in three are other words of the book, headers stay."""
    words = re.split(r"( |\n)", text)
    pool = [word for word in words if word.isalpha() and word.islower()]
    return "".join(
        draw.choice(pool) if word.islower() and word.isalpha() and draw.random() < 0.65 else word for word in words
    )


def write_corpus(source: Path, folder: Path, count: int) -> int:
    """`count` books in FILES parquet files; returns their bytes of text."""
    novels = [
        book
        for path in source_paths(source)
        for book in read_books(path)
        if len(book.text) > 100_000 and "kocr" not in book.source and "kdup" not in book.source
    ]
    novels = [book for book in novels if " the " not in book.text[:20_000]]
    folder.mkdir()
    size = 0
    for number in range(FILES):
        rows = []
        for i in range(number, count, FILES):
            book = novels[i % len(novels)]
            text = book.text if i < len(novels) else perturbed(book.text, random.Random(i))
            size += len(text.encode())
            title = book.title if i < len(novels) else f"{book.title} autrement {chr(97 + i // 26)}{chr(97 + i % 26)}"
            rows.append(
                {
                    "file_id": f"book{i:05d}",
                    "title": title,
                    "author": book.author,
                    "date": book.date,
                    "complete_text": text,
                }
            )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"gallica_mono_{number + 1}.parquet")
    return size


def naive(source: Path, tokenizer: Path, seconds: float) -> dict[str, Any]:
    """Windows made in `seconds`, reading the files counted in."""
    draw = random.Random(1)
    began, cpu_began = time.monotonic(), time.process_time()
    tokens = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    books: list[str] = []
    for path in sorted(source.glob("*.parquet")):
        books += pq.read_table(path, columns=["complete_text"])["complete_text"].to_pylist()
    windows = 0
    while time.monotonic() - began < seconds:
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
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def ours(source: Path, tokenizer: Path, folder: Path, workers: int, size: int) -> dict[str, Any]:
    """The whole command, its memory watched; then what each step of its log took."""
    words = ["--source", source, "--tokenizer", tokenizer, "--sequence-len", LENGTH, "--windows", "all"]
    words += ["--split", "1/1", "--holdout", 0.02, "--workers", workers, "--out", folder / "2a.jsonl"]
    peaks = {"worker": 0, "sum": 0, "main": 0}
    began, cpu_began = time.monotonic(), children_cpu()
    process = psutil.Popen(
        [sys.executable, str(ROOT / "prep" / "gallica.py"), *map(str, words)], stderr=subprocess.DEVNULL
    )

    def watch() -> None:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            sizes = []
            for child in process.children(recursive=True):
                try:
                    sizes.append(child.memory_info().rss)
                except psutil.Error:
                    continue
            try:
                own = process.memory_info().rss
            except psutil.Error:
                break
            for key, value in (("worker", max(sizes, default=0)), ("main", own), ("sum", own + sum(sizes))):
                peaks[key] = max(peaks[key], value)
            time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    if process.wait() != 0:
        raise RuntimeError("prep/gallica.py failed")
    spent = time.monotonic() - began
    thread.join()
    manifest = json.loads((folder / "2a.manifest.json").read_text(encoding="utf-8"))
    windows = manifest["train"]["windows"] + manifest["heldout"]["windows"]
    steps: dict[str, float] = {}
    for path in sorted(folder.glob("gallica/*/logs/clean/stats/*.json")):
        for step in json.loads(path.read_text(encoding="utf-8")):
            if step["time_stats"]:
                name = step["name"].split(": ", 1)[1].replace("🐿 Jsonl", "written")
                steps[name] = steps.get(name, 0) + step["time_stats"]["total"]
    return {
        "books": manifest["documents"]["kept"] + manifest["documents"]["heldout"],
        "rejected": manifest["documents"]["rejected"],
        "windows": windows,
        "seconds": round(spent, 1),
        "windows_a_second": round(windows / spent),
        "windows_a_second_a_core": round(windows / spent / workers),
        "cpu_seconds": round(children_cpu() - cpu_began, 1),
        "windows_a_cpu_second": round(windows / (children_cpu() - cpu_began)),
        "mb_a_second_by_step": {name: round(size / 1e6 / total, 1) for name, total in steps.items() if total > 0.01},
        "peak_worker_mb": peaks["worker"] >> 20,
        "peak_main_mb": peaks["main"] >> 20,
        "peak_sum_mb": peaks["sum"] >> 20,
    }


def children_cpu() -> float:
    """Seconds of processor time of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def single_steps(source: Path, tokenizer: Path, scratch: Path) -> dict[str, float]:
    """MB of text a processor second of the steps whose time datatrove's statistics do not tell apart."""
    texts = [book.text for path in source_paths(source)[:1] for book in read_books(path)]
    texts = ["\n\n".join(clean_pages(text).paragraphs) for text in texts[:12]]
    size = sum(len(text.encode()) for text in texts) / 1e6
    cutter = Cutter(load_tokenizer(tokenizer), LENGTH)
    minhash = Signatures(scratch)

    def signature(text: str) -> None:
        words = word_hashes(text)
        sampled_runs(words, 8)
        minhash.get_signature(sampled_runs(words, 5).reshape(-1, 1))

    rates = {}
    for name, step in (("signatures", signature), ("tokenised and cut", cutter.passages)):
        began = time.process_time()
        for text in texts:
            step(text)
        rates[name] = round(size / (time.process_time() - began), 1)
    return rates


def growth(sizes: list[dict[str, Any]]) -> dict[str, float]:
    """What more books cost, the start of programs apart: from the smallest size to the largest."""
    few, many = sizes[0], sizes[-1]
    seconds = many["ours"]["cpu_seconds"] - few["ours"]["cpu_seconds"]
    windows = many["ours"]["windows"] - few["ours"]["windows"]
    rate = windows / seconds
    return {
        "windows_a_cpu_second": round(rate),
        "times_naive_a_core": round(rate / many["naive"]["windows_a_cpu_second"], 2),
        "cpu_seconds_a_mb": round(seconds / (many["text_mb"] - few["text_mb"]), 3),
    }


LIBRARY_MB = (
    16.4e9 * 6.1 / 1e6
)  # 16.4 G words; a French word has 6.1 bytes in the novels of the benchmark, its space counted


def tables(report: dict[str, Any]) -> str:
    """The tables of prep/README.md."""
    machine, grown = report["machine"], report["growth"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {report['workers']} workers; windows of {report['sequence_len']} tokens.",
        "",
        "| books | MB | naive, windows a processor second | ours | start-up included, windows a second: naive | ours | largest worker, MB | all processes, MB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in report["sizes"]:
        one, other = size["naive"], size["ours"]
        lines.append(
            f"| {size['books']} | {size['text_mb']:g} | {one['windows_a_cpu_second']:,} | {other['windows_a_cpu_second']:,} "
            f"| {one['windows_a_second']:,} | {other['windows_a_second']:,} | {other['peak_worker_mb']:,} | {other['peak_sum_mb']:,} |"
        )
    lines += ["", "| step | MB a processor second |", "|---|---:|"]
    steps = {k: v for k, v in report["sizes"][-1]["ours"]["mb_a_second_by_step"].items() if k != "signatures"}
    lines += [f"| {name} | {rate:g} |" for name, rate in (steps | report["single_steps"]).items()]
    hours = LIBRARY_MB * grown["cpu_seconds_a_mb"] / 3600
    lines += [
        "",
        f"Beyond the start of programs, more books cost {grown['cpu_seconds_a_mb']:g} processor seconds a MB: "
        f"{grown['windows_a_cpu_second']:,} windows a processor second, {grown['times_naive_a_core']:g} times the naive "
        f"method's on one core, {2 * grown['times_naive_a_core']:.2g} times on two.",
        "",
        f"The whole library (261,000 books, 16.4 G words, {LIBRARY_MB / 1000:,.0f} GB of text), were every book fiction and "
        f"all of it tokenised: {hours:,.0f} processor hours, {hours / 16:.1f} h on 16 cores, {hours / 320 * 60:.0f} minutes on 20 "
        "Slurm nodes of 16. Of it, two splits' 1.02 G tokens need a thirtieth tokenised.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a folder of French novels in parquet")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--books", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--seconds", type=float, default=20, help="of the naive method, a size (default 20)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "reports" / "prep.json")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in args.books:
            corpus = Path(scratch) / f"corpus{count}"
            size = write_corpus(args.source, corpus, count)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                baseline = alone.submit(naive, corpus, args.tokenizer, args.seconds).result()
            made = ours(corpus, args.tokenizer, Path(scratch) / f"rows{count}", args.workers, size)
            result = {
                "books": count,
                "text_mb": round(size / 1e6, 1),
                "naive": baseline,
                "ours": made,
                "times_naive": round(made["windows_a_second"] / baseline["windows_a_second"], 2),
                "load_average": round(os.getloadavg()[0], 1),
            }
            results.append(result)
            print(json.dumps(result), flush=True)
        steps = single_steps(args.source, args.tokenizer, Path(scratch) / "signatures")
    report = {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30),
        },
        "sequence_len": LENGTH,
        "workers": args.workers,
        "sizes": results,
        "growth": growth(results),
        "single_steps": steps,
        "versions": versions("datatrove", "tokenizers", "pyarrow", "numpy"),
    }
    with atomic_write(args.out) as handle:
        json.dump(report, handle, indent=1)
        handle.write("\n")
    print(tables(report))


if __name__ == "__main__":
    run(main)
