"""False alarms of the verdicts: novels by people, judged as if a model had written them.

A tenth of each novel is held out and taken for the author's own pages; chunks of the rest, as long as samples, are taken
for a stage's samples. Then the chunks of the held-out part, and those of other novels by the same author, are searched for
the longest sequence of words that they share with the rest. The same folder and seed give the same tables.

    python bench/calibrate_verdicts.py --texts novels --works novels/works.csv      # novels/*.txt; columns file_id, author
"""

from prep.command import run

import argparse
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from eval import metrics, verdict
from eval.tables import markdown
from prep.common import BadInput, progress
from prep.formats import read_book
from prep.typography import to_convention

HELDOUT = 0.1  # of a novel, from its middle
SAMPLES = 6  # of a stage: three prompts, two of each
REPORTS = 20  # of six chunks each, a novel
KINDS = {"looping": "samples that loop", "rep_4": "repeated 4-grams", "not_french": "not French",
         "artefacts": "OCR debris"}  # fmt: skip
INSIDE, OUTSIDE = "held-out pages with the rest of their novel", "another novel of the author"


def figures(chunks: list[str]) -> dict[str, float | None]:
    return metrics.degeneration([{"text": text, "ended": False} for text in chunks])


def measured(novels: dict[str, str], authors: dict[str, str], words: int, seed: int) -> dict[str, Any]:
    """Alarms by kind over all reports, the most that a figure was above the author's own, and shared sequences of words."""
    drawn = random.Random(seed)
    alarms: Counter[str] = Counter()
    above: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    shared: dict[str, list[int]] = {INSIDE: [], OUTSIDE: []}
    for name, text in progress(novels.items(), unit="novel"):
        first, last = (round(len(text) * (0.5 + side * HELDOUT / 2)) for side in (-1, 1))
        heldout = metrics.chunks(text[first:last], words)
        chunks = metrics.chunks(text[:first], words) + metrics.chunks(text[last:], words)
        if min(len(heldout), len(chunks)) <= SAMPLES:
            needed = f"a tenth of it must fill {SAMPLES + 1} chunks of {words} words"
            raise BadInput(f"{name} is too short: {needed}; lower --words")
        usual = figures(heldout)
        book = metrics.CopyFinder([text[:first], text[last:]])
        lengths = [book.longest(chunk)["words"] for chunk in heldout]
        for _ in range(REPORTS):
            found = figures(drawn.sample(chunks, SAMPLES))
            alarms.update(verdict.alarms(found, usual))
            above = {key: max(most, (found[key] or 0) - (usual[key] or 0)) for key, most in above.items()}
            # For copies, six chunks of the held-out part are the samples and its others the author's own pages.
            order = drawn.sample(lengths, len(lengths))
            samples = [{"copied": {"words": length}} for length in order[:SAMPLES]]
            reference = {"reference": {"copied": order[SAMPLES:]}}
            said = verdict.memorised({"memorisation": None, "samples": samples}, reference) or ""
            alarms["copies"] += said.startswith("memorised")
        shared[INSIDE] += lengths
        for other in sorted(novels):
            if other != name and other in authors and authors[other] == authors.get(name):
                shared[OUTSIDE] += [book.longest(chunk)["words"] for chunk in metrics.chunks(novels[other], words)]
    return {"alarms": alarms, "reports": REPORTS * len(novels), "above": above, "shared": shared}


def tables(result: dict[str, Any], novels: int, words: int) -> str:
    """The two tables of bench/reports/verdicts.md."""
    rows = [
        (key, kind, f"{verdict.DEGENERATED[key][0]} above the author's", f"{result['above'][key]:.3f}")
        for key, kind in KINDS.items()
    ]
    rows.append(("copies", "copies", f"{verdict.COPY_WORDS} words, {verdict.COPY_TIMES} times the author's", ""))
    rates = [[*cells, f"{result['alarms'][key] / result['reports']:.1%}"] for key, *cells in rows]
    title = f"{novels} novels, {result['reports']:,} reports of {SAMPLES} chunks of {words} words"
    sequences = []
    for name, lengths in result["shared"].items():
        if len(lengths) > 1:
            middle, rare = statistics.median(lengths), statistics.quantiles(lengths, n=100)[-1]
            long = sum(length > 12 for length in lengths) / len(lengths)
            sequences.append(
                [name, f"{len(lengths):,}", f"{middle:.0f}", f"{rare:.0f}", str(max(lengths)), f"{long:.1%}"]
            )
    head = [f"longest shared sequence of words, chunks of {words} words", "chunks", "median", "99 %", "longest", "> 12"]
    return f"{markdown(([title, 'threshold', 'highest seen', 'false alarms'], rates))}\n\n{markdown((head, sequences))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder of novels, .txt")
    parser.add_argument("--works", type=Path, help="CSV with file_id and author")
    parser.add_argument("--words", type=int, default=250, help="of a chunk (default 250: samples of 500 tokens)")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    paths = sorted(args.texts.glob("*.txt"))
    if not paths:
        raise BadInput(f"no .txt in {args.texts} (relative to {Path.cwd()})")
    novels = {path.stem: to_convention(read_book(path).whole()) for path in paths}
    authors = pd.read_csv(args.works, dtype=str).set_index("file_id")["author"].dropna().to_dict() if args.works else {}
    print(tables(measured(novels, authors, args.words, args.seed), len(novels), args.words))


if __name__ == "__main__":
    run(main)
