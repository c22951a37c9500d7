"""How often the verdicts cry wolf: novels by people, judged as if a model had written them.

Each novel of a folder is taken for the book: one block of it is held out, as preparation does, and is the author's own
level; six pieces of the rest, as long as samples, stand for a stage's samples: they should never be called degenerated.
Then the pieces of the held-out block, and those of another novel by the same author where there is one, are compared with
the rest of the book word by word: they share a language and a hand with it, and a letter read twice, but copy nothing.

The folder has a novel a file (.txt, UTF-8); --works is a CSV with the columns file_id (the file's stem) and author.
Prints the table of eval/README.md. The same folder and seed give the same figures.

    python bench/calibrate_verdicts.py --texts novels --works novels/works.csv
"""

import argparse
import csv
import random
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval import metrics, verdict
from prep.common import BadInput, run
from prep.typography import to_convention

HELDOUT = 0.1  # of a novel, from its middle
SAMPLES = 6  # of a stage: three prompts, two of each
REPORTS = 20  # of six pieces each, a novel


KINDS = {  # of alarm: what the verdict's line says, the figure it looks at
    "samples that loop": ("of samples loop", "looping"),
    "repeated 4-grams": ("of 4-grams", "rep_4"),
    "not French": ("not French", "not_french"),
    "OCR debris": ("OCR debris", "artefacts"),
}


def figures(pieces: list[str]) -> dict[str, float | None]:
    return metrics.degeneration([{"text": text, "ended": False} for text in pieces])


def parts(text: str, words: int) -> tuple[list[str], list[str], str, str]:
    """A novel's pieces: of the rest, and of the held-out block; then the rest's two ends as texts."""
    length = len(text)
    first, last = round(length * (0.5 - HELDOUT / 2)), round(length * (0.5 + HELDOUT / 2))
    before, heldout, after = text[:first], text[first:last], text[last:]
    return metrics.chunks(before, words) + metrics.chunks(after, words), metrics.chunks(heldout, words), before, after


def measured(novels: dict[str, str], authors: dict[str, str], words: int, seed: int) -> dict[str, Any]:
    """Alarms by kind over all reports, and the most that a figure lay above the author's own; shared runs of words.

    A report on copies takes six pieces of the held-out block for samples, and its others for the author's own.
    """
    drawn = random.Random(seed)
    alarms: Counter[str] = Counter()
    above: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    shared: dict[str, list[int]] = {
        "held-out pages with the rest of their novel": [],
        "another novel of the author": [],
    }
    reports = 0
    for name, text in tqdm(novels.items(), unit="novel", disable=not sys.stderr.isatty()):
        pieces, heldout, before, after = parts(text, words)
        if min(len(heldout), len(pieces)) <= SAMPLES:
            raise BadInput(
                f"{name} is too short: a tenth of it must fill {SAMPLES + 1} pieces of {words} words; lower --words"
            )
        usual = figures(heldout)
        book = metrics.CopyFinder([before, after])
        runs = [book.longest(piece)["words"] for piece in heldout]
        for _ in range(REPORTS):
            reports += 1
            found = figures(drawn.sample(pieces, SAMPLES))
            said = verdict.degenerated({"degeneration": found}, {"reference": {"degeneration": usual}})
            for kind, (words_said, key) in KINDS.items():
                alarms[kind] += words_said in said
                above[kind] = max(above[kind], (found[key] or 0) - (usual[key] or 0))
            order = drawn.sample(runs, len(runs))
            samples = [{"copied": {"words": run}} for run in order[:SAMPLES]]
            reference = {"reference": {"copied": order[SAMPLES:]}}
            said = verdict.memorised({"memorisation": None, "samples": samples}, reference) or ""
            alarms["copies"] += said.startswith("memorised")
        inside, outside = shared.values()
        inside += runs
        for other in sorted(novels):
            if other != name and other in authors and authors[other] == authors.get(name):
                outside += [book.longest(piece)["words"] for piece in metrics.chunks(novels[other], words)]
    return {"alarms": alarms, "reports": reports, "above": above, "shared": shared}


def table(result: dict[str, Any], novels: int, words: int) -> str:
    """What eval/README.md shows."""
    alarms, reports, above = result["alarms"], result["reports"], result["above"]
    thresholds = {
        "samples that loop": f"{verdict.LOOPING:.0%} above the author's",
        "repeated 4-grams": f"{verdict.REPEATED:.0%} above the author's",
        "not French": f"{verdict.NOT_FRENCH:.0%} above the author's",
        "OCR debris": f"{verdict.ARTEFACTS} lines above the author's",
    }
    lines = [
        f"| {novels} novels, {reports:,} reports of {SAMPLES} pieces of {words} words | threshold | highest seen | false alarms |",
        "|---|---|--:|--:|",
        *(
            f"| {kind} | {threshold} | {above[kind]:.3f} | {alarms[kind] / reports:.1%} |"
            for kind, threshold in thresholds.items()
        ),
        f"| copies | {verdict.COPY_WORDS} words, {verdict.COPY_TIMES} times the author's | | {alarms['copies'] / reports:.1%} |",
        "",
        f"| longest run of words that a piece of {words} words shares | pieces | median | 99 % | longest | over 12 words |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, runs in result["shared"].items():
        if len(runs) > 1:
            high = statistics.quantiles(runs, n=100)[-1]
            over = sum(run > 12 for run in runs) / len(runs)
            lines.append(
                f"| {name} | {len(runs):,} | {statistics.median(runs):.0f} | {high:.0f} | {max(runs)} | {over:.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder of novels, .txt")
    parser.add_argument("--works", type=Path, help="CSV with file_id and author")
    parser.add_argument("--words", type=int, default=250, help="of a piece (default 250: samples of 500 tokens)")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    paths = sorted(args.texts.glob("*.txt"))
    if not paths:
        raise BadInput(f"no .txt in {args.texts} (looked from {Path.cwd()})")
    novels = {path.stem: to_convention(path.read_text(encoding="utf-8")) for path in paths}
    authors: dict[str, str] = {}
    if args.works:
        with args.works.open(encoding="utf-8", newline="") as file:
            authors = {row["file_id"]: row["author"] for row in csv.DictReader(file)}
    print(table(measured(novels, authors, args.words, args.seed), len(novels), args.words))


if __name__ == "__main__":
    run(main)
