"""How fast the rows of Gallica are made, and in how much memory: this project's whole pipeline beside the naive method.

    python bench/prep_speed.py --source FOLDER --tokenizer models/base     -> bench/reports/prep.json
    python bench/prep_speed.py --again                                     the tables once more, from that report

Both make windows of 512 tokens from the same parquet files with the same tokenizer, in turns, so often as --repeats says;
the table has the middle run. The naive method is what projects like this one do: take a random book, a random slice of it
of 6 characters a token, tokenise it, decode a window, repeat, in one process; its books lie in memory, nothing is cleaned,
and its start is not counted. Ours is the command `prep/gallica.py --windows all` as it stands, start and all, from a bare
folder: cleaning, rules, signatures, two workers.

The corpus of each size is made from the novels of FOLDER: a book more is one of them with three small words in five another
word of the same book, and one in 25 a form that no other book has, as a novel brings new ones (3 % of its words after
fifty other novels). So it has their pages, headers and letters, and no two are near-duplicates.
A processor second is what processes ran, whatever else the machine did: on a busy machine it is the figure to compare.
Memory is resident memory, sampled ten times a second: of the largest worker, and of all processes together (pages that
workers share are counted in each).
"""

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
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

from prep.common import BadInput, atomic_write, cpu_name, run, versions
from prep.dedup import Signatures, sampled, word_hashes
from prep.page_layout import clean_pages
from prep.readers import read_books, source_paths
from prep.rows import Cutter, load_tokenizer

ROOT = Path(__file__).parent.parent
LENGTH = 512
LIBRARY_BOOKS, LIBRARY_WORDS = 261_000, 16.4e9  # of PleIAs/French-PD-Books
WANTED_TOKENS = 512e6  # by each of 2a and 2b
FILES = 8  # as the library's own files are many: tasks for two workers


def perturbed(text: str, draw: random.Random) -> str:
    """Another book on the same pages: other words of the book for most of its small words, headers stay.

    One in 25 has a letter too many, as no other book has it.
    """
    words = re.split(r"( |\n)", text)
    pool = [word for word in words if word.isalpha() and word.islower()]

    def another(word: str) -> str:
        chance = draw.random()
        if chance < 0.04:
            place = draw.randrange(len(word) + 1)
            return word[:place] + draw.choice("abcdefghijklmnopqrstuvwxyzéèêàùç") + word[place:]
        return draw.choice(pool) if chance < 0.65 else word

    return "".join(another(word) if word.islower() and word.isalpha() else word for word in words)


def write_corpus(source: Path, folder: Path, count: int) -> tuple[int, int]:
    """`count` books in FILES parquet files; returns their bytes and words."""
    novels = [
        book
        for path in source_paths(source)
        for book in read_books(path)
        if len(book.text) > 100_000 and "kocr" not in book.id and "kdup" not in book.id
    ]
    novels = [book for book in novels if " the " not in book.text[:20_000]]
    folder.mkdir()
    size = words = 0
    for number in range(FILES):
        rows = []
        for i in range(number, count, FILES):
            book = novels[i % len(novels)]
            text = book.text if i < len(novels) else perturbed(book.text, random.Random(i))
            size += len(text.encode())
            words += len(text.split())
            letters = "".join(chr(97 + digit) for digit in (i // 676, i // 26 % 26, i % 26))
            title = book.metadata["title"] if i < len(novels) else f"{book.metadata['title']} autrement {letters}"
            rows.append(
                {
                    "file_id": f"book{i:05d}",
                    "title": title,
                    "author": book.metadata["author"],
                    "date": book.metadata["date"],
                    "complete_text": text,
                }
            )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"gallica_mono_{number + 1}.parquet")
    return size, words


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
    before = {child.pid for child in psutil.Process().children()}
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
    while left := {child.pid for child in psutil.Process().children()} - before:
        os.waitpid(left.pop(), 0)  # the server of its workers, which it does not wait for
    cpu_seconds = children_cpu() - cpu_began
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
        "cpu_seconds": round(cpu_seconds, 1),
        "windows_a_cpu_second": round(windows / cpu_seconds),
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
    texts = [book.text for path in source_paths(source) for book in itertools.islice(read_books(path), 10)]
    texts = ["\n\n".join(clean_pages(text).paragraphs) for text in texts]
    size = sum(len(text.encode()) for text in texts) / 1e6
    cutter = Cutter(load_tokenizer(tokenizer), LENGTH)
    minhash = Signatures(scratch)

    def signature(text: str) -> None:
        words = word_hashes(text)
        sampled(words, 8)
        minhash.get_signature(sampled(words, 5).reshape(-1, 1))

    def tokens(text: str) -> None:
        for start in range(0, len(text), 25_000):  # a row of 16 windows
            cutter.count(text[start : start + 25_000])

    rates = {}
    for name, step in (
        ("signatures", signature),
        ("tokenised and cut", lambda text: list(cutter.cut(cutter.encode([text])[0]))),
        ("for comparison: rows tokenised whole", tokens),
    ):
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


def tables(report: dict[str, Any]) -> str:
    """What prep/README.md says of speed and memory, all of it from the report."""
    machine, grown = report["machine"], report["growth"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {report['workers']} workers; windows of "
        f"{report['sequence_len']} tokens; the middle one of {len(report['sizes'][0]['times_naive'])} runs, in turns.",
        "",
        "| books | MB | windows a second: naive | ours | ours a core | times naive, each run "
        "| windows a processor second: naive | ours | largest worker, MB | all processes, MB |",
        "|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for size in report["sizes"]:
        one, other = size["naive"], size["ours"]
        lines.append(
            f"| {size['books']} | {size['text_mb']:g} | {one['windows_a_second']:,} | {other['windows_a_second']:,} "
            f"| {other['windows_a_second_a_core']:,} | {', '.join(f'{times:g}' for times in size['times_naive'])} "
            f"| {one['windows_a_cpu_second']:,} | {other['windows_a_cpu_second']:,} "
            f"| {other['peak_worker_mb']:,} | {other['peak_sum_mb']:,} |"
        )
    lines += ["", "| step | MB a second, one worker |", "|---|---:|"]
    steps = {
        name: rate
        for name, rate in report["sizes"][-1]["ours"]["mb_a_second_by_step"].items()
        if name != "signatures" and rate < 1000  # the others only look at a field
    }
    lines += [f"| {name} | {rate:g} |" for name, rate in (steps | report["single_steps"]).items()]
    lines += [
        "",
        f"The start of programs costs {grown['start_cpu_seconds']:g} processor seconds whatever the corpus (a third of it is "
        f"Transformers, loading the tokenizer as Axolotl does), and more books {grown['cpu_seconds_a_mb']:g} processor seconds a MB: "
        f"{grown['windows_a_cpu_second']:,} windows a processor second, {grown['times_naive_a_core']:g} times the naive "
        f"method's on one core, {2 * grown['times_naive_a_core']:.2g} times on two.",
        "",
        on_paper(report),
    ]
    return "\n".join(lines)


def on_paper(report: dict[str, Any]) -> str:
    """What the whole library would take at the rate of the report."""
    megabytes = LIBRARY_WORDS * report["bytes_a_word"] / 1e6
    hours = megabytes * report["growth"]["cpu_seconds_a_mb"] / 3600
    tokens = 2 * WANTED_TOKENS
    share = tokens / (LIBRARY_WORDS * report["tokens_a_word"])
    return (
        f"On paper: the whole library ({LIBRARY_BOOKS:,} books, {LIBRARY_WORDS / 1e9:g} G words, at {report['bytes_a_word']:g} "
        f"bytes a word {megabytes / 1000:,.0f} GB of text), were every book fiction and all of it cut: {hours:,.1f} processor "
        f"hours, {hours / 16:.1f} h on one machine of 16 such cores, {hours / 320 * 60:.0f} minutes on 20 Slurm nodes of 16, if "
        f"disks keep up and the one task that draws is not counted. The two splits' {tokens / 1e9:.2f} G tokens are one "
        f"part in {round(1 / share)} of it."
    )


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Whatever the command leaves behind becomes a child of this process, which waits for it and counts its time.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in args.books:
            corpus = Path(scratch) / f"corpus{count}"
            size, words = write_corpus(args.source, corpus, count)
            baselines, made, loads = [], [], []
            for number in range(args.repeats):
                loads.append(round(os.getloadavg()[0], 1))
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                    baselines.append(alone.submit(naive, corpus, args.tokenizer, args.seconds).result())
                rows = Path(scratch) / f"rows{count}.{number}"
                made.append(ours(corpus, args.tokenizer, rows, args.workers, size))
                shutil.rmtree(rows)
            result = {
                "books": count,
                "text_mb": round(size / 1e6, 1),
                "naive": middle(baselines),
                "ours": middle(made),
                "times_naive": [
                    round(b["windows_a_second"] / a["windows_a_second"], 2)
                    for a, b in zip(baselines, made, strict=True)
                ],
                "load_average": loads,
            }
            results.append(result)
            print(json.dumps(result), flush=True)
        steps = single_steps(corpus, args.tokenizer, Path(scratch) / "signatures")
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30),
        },
        "sequence_len": LENGTH,
        "workers": args.workers,
        "bytes_a_word": round(size / words, 2),
        "tokens_a_word": round(LENGTH * result["ours"]["windows"] / words, 2),
        "sizes": results,
        "growth": growth(results),
        "single_steps": steps,
        "versions": versions("datatrove", "tokenizers", "pyarrow", "numpy"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a folder of French novels in parquet")
    parser.add_argument("--tokenizer", type=Path, help="folder of the base model")
    parser.add_argument("--books", type=int, nargs="+", default=[50, 200, 800], help="sizes (default 50 200 800)")
    parser.add_argument("--repeats", type=int, default=3, help="of both, at each size (default 3)")
    parser.add_argument("--seconds", type=float, default=15, help="of the naive method each time (default 15)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "reports" / "prep.json")
    parser.add_argument("--readme", type=Path, help="put the tables between the marks of this page, too")
    parser.add_argument("--again", action="store_true", help="measure nothing: tables of the report that is there")
    args = parser.parse_args()
    if not args.again and not (args.source and args.tokenizer):
        raise BadInput("give --source and --tokenizer; or --again for the tables of a report that is there")
    if args.again:
        report = json.loads(args.out.read_text(encoding="utf-8"))
    else:
        report = measured(args)
        with atomic_write(args.out) as handle:
            json.dump(report, handle, indent=1)
            handle.write("\n")
    if args.readme:
        from eval.readme import fill  # here: the processes that are measured need none of it

        fill(args.readme, "speed", f"{tables(report)}\n")
    print(tables(report))


if __name__ == "__main__":
    run(main)
