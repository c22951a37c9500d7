"""The novel to be continued, as training rows: every token four times, at four positions of a window.

    python prep/castle.py --book data/raw/book/book.pdf --tokenizer models/base --sequence-len 2048 --stride 512 \\
        --holdout 0.05 --seed 42 --out data/2c.jsonl

Reads a book in any format of prep/formats.py, takes out what belongs to the page (footers, line ends, hyphens, orphan
note calls), and writes beside --out: the rows, `2c.heldout.jsonl`, `2c.manifest.json`, and `2c.txt`, the cleaned book,
a paragraph a block. Read that one before training on it.

Windows that overlap make every random split a leak, so one block is held out before any window is cut. It is in
the middle: the opening says who the people are, the end is where the continuation starts, and training needs both.
It begins and ends with a paragraph (in a paragraph longer than a window, with a sentence), holds whole windows, and is the
same for every seed, so that runs compare. The text before it and the text after it are cut separately; each is written once for each start (0, 512, 1024, 1536 tokens in,
at the nearest word), and Axolotl's slices of 2048 of these are the windows of stride 512. With --holdout 0, for the
last run on the whole book, `2c.heldout.jsonl` is empty: any text in it would be text the model was trained on. Axolotl
cannot load an empty file, so that run has to leave out the recipe's `test_datasets`.
"""

from prep.command import run, without_torch

import argparse
import itertools
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prep.common import BadInput, digest, source_files
from prep.filters import not_french
from prep.formats import BookText, read_book
from prep.page_layout import Cleaned, clean_pages, clean_paragraphs, without_notes_heading
from prep.rows import Cutter, Row, Tokens, holdout_share, jsonl_path, keep_sources, write_prepared


def clean_book(book: BookText) -> Cleaned:
    """The paragraphs of a book in the project's convention; page rules apply where its format has pages or lines."""
    if book.paragraphs is not None:
        return clean_paragraphs(book.paragraphs, Counter(book.counts))
    cleaned = clean_pages(book.text)
    return cleaned._replace(counts=book.counts | cleaned.counts)


# A figure glued to a word, to the mark after it or to a one-letter name ("K15"); "1,5", "10.30", "n.3", "km2" are none.
_CALL = re.compile(
    r"(?:(?<=[^\W\d_][a-zà-öø-ÿœ])|(?<=[.!?»,;:)])(?<!\d[.,:])(?<!\b[nN]\.)|(?P<name>(?<=\b[A-Z])))"
    r"(?<!\b[kcdm]m)(?:\d{1,3}|[¹²³⁰⁴-⁹]{1,3})(?![\w°]|[.,:]\d)"
)
_NOTE = re.compile(r"(\d{1,3})(?:[.)] ?| (?:[.—-] )?)(?=[^\W\d_]|«)")
_MISSING = 0.2  # what each figure missing from a count weighs, where each figure on it weighs 1
_LEAST = 1.5  # weight of a count: two calls that follow each other


def drop_note_calls(paragraphs: list[str]) -> tuple[list[str], int]:
    """Take out the calls of notes ("fatigue1", "faites !28"), and the notes if they end the book; also returns how many calls.

    Calls count upward through the book or through each chapter, a few missing; a figure on no such count stays. A
    figure after a one-letter name is one only among others; a lone 1 only in a book that has counts elsewhere.
    """
    calls = [(n, match) for n, text in enumerate(paragraphs) for match in _CALL.finditer(text)]
    values = [int(unicodedata.normalize("NFKC", match[0])) for _, match in calls]  # ² is 2
    weights = [0.5 if match["name"] is not None else 1.0 for _, match in calls]
    # What the best count that ends with each call weighs; at first, what it weighs as a count's first.
    best = [weight - _MISSING * (value - 1) for value, weight in zip(values, weights, strict=True)]
    link = [-1] * len(values)
    for j, value in enumerate(values):
        for i in range(max(0, j - 50), j):
            longer = best[i] + weights[j] - _MISSING * (value - values[i] - 1)
            if best[i] > 0 and value > values[i] and longer >= best[j]:
                best[j], link[j] = longer, i
    dropped: set[int] = set()
    for end in sorted(range(len(values)), key=lambda j: -best[j]):
        path: list[int] = []
        step = end
        while step >= 0 and step not in dropped:
            path.append(step)
            step = link[step]
        certain = best[end] >= _LEAST and sum(weights[j] == 1 for j in path) >= 2
        if step < 0 and (certain or (dropped and [values[j] for j in path] == [1] and weights[path[0]] == 1)):
            dropped.update(path)
    cleaned = list(paragraphs)
    for k in sorted(dropped, reverse=True):
        n, match = calls[k]
        cleaned[n] = cleaned[n][: match.start()] + cleaned[n][match.end() :]
    return _without_notes_at_the_end(cleaned, {values[k] for k in dropped}), len(dropped)


def _without_notes_at_the_end(paragraphs: list[str], called: set[int]) -> list[str]:
    """Without the notes that end a book, "1. Voir ...", and their heading: one for each call, few for no call."""
    last = list(itertools.takewhile(bool, (_NOTE.match(paragraph) for paragraph in reversed(paragraphs))))
    numbers = {int(match[1]) for match in last if match}
    if not called or not called <= numbers or len(numbers) > 1.5 * len(called):
        return paragraphs
    return without_notes_heading(paragraphs[: len(paragraphs) - len(last)])


_SENTENCE_END = re.compile(r"(?<=[.!?»]) (?=[^\W\d_a-zà-öø-ÿ]|[«—])")


def split(paragraphs: list[str], cutter: Cutter, holdout: float) -> tuple[list[str], list[str], list[str]]:
    """The paragraphs before the held-out block, in it, and after it: whole windows in the middle, near that share.

    Only a paragraph longer than a window is divided, at the end of a sentence.
    """
    if not holdout:
        return paragraphs, [], []
    units, tokens = [], []
    for number, paragraph in enumerate(paragraphs):
        size = len(cutter.encode(paragraph).ends)
        parts = [paragraph] if size < cutter.sequence_len else _SENTENCE_END.split(paragraph)
        units += [(number, part) for part in parts]
        tokens += [len(cutter.encode(part).ends) for part in parts] if len(parts) > 1 else [size]
        tokens[-1] += 1  # about what "\n\n" takes
    total = sum(tokens)
    windows = max(1, round(holdout * total / cutter.sequence_len))

    def joined(start: int, end: int) -> list[str]:
        groups = itertools.groupby(units[start:end], key=lambda unit: unit[0])
        return [" ".join(part for _, part in group) for _, group in groups]

    before, start = 0, 0
    while before < (total - windows * cutter.sequence_len) / 2:
        before += tokens[start]
        start += 1
    for end in range(start + 1, len(units) + 1):
        if sum(tokens[start:end]) >= windows * cutter.sequence_len:
            held = joined(start, end)
            if sum(row.windows for row in cutter.cut(cutter.encode("\n\n".join(held)))) >= windows:
                return joined(0, start), held, joined(end, len(units))
    raise BadInput(
        f"the book has about {total:,} tokens: too few to hold out {windows} window(s) of {cutter.sequence_len}; "
        "give a longer book, a shorter --sequence-len or --holdout 0"
    )


def rows(tokens: Tokens, cutter: Cutter, name: str, starts: range, title: str) -> Iterator[Row]:
    """Rows of one contiguous text, from each of the starts (in tokens, moved to the nearest word)."""
    for start in starts:
        if start >= len(tokens.ends):
            return
        at = cutter.word_start(tokens, start) if start else 0
        for number, b in enumerate(cutter.cut(tokens, at), 1):
            part = f"{name} phase {start:04} row {number:03}"
            yield Row(tokens.text[b.start : b.end], title, title, "", "", part, b.windows, b.tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    formats = "PDF with a text layer, EPUB, DOCX, ODT, HTML, RTF, FB2, TEI or text"
    parser.add_argument("--book", type=Path, required=True, help=f"the novel: {formats}")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--sequence-len", type=int, default=2048, help="tokens a window (the recipe's sequence_len)")
    parser.add_argument("--stride", type=int, default=512, help="tokens between the starts of windows")
    parser.add_argument("--holdout", type=holdout_share, default=0.05, help="share of the book held out; 0: none")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle")
    parser.add_argument("--out", type=jsonl_path, required=True, help="the rows, such as data/2c.jsonl")
    args = parser.parse_args()
    length = args.sequence_len
    if not 0 < args.stride <= length or length % args.stride:
        raise BadInput(f"--stride {args.stride} must divide --sequence-len {length}")
    keep_sources([args.book], args.out)
    cutter = Cutter(args.tokenizer, length)

    book = read_book(args.book)
    files = source_files([args.book])
    for warning in book.warnings:
        print(f"castle.py: {warning}", file=sys.stderr)
    paragraphs, counts = clean_book(book)
    paragraphs, counts["note_calls"] = drop_note_calls(paragraphs)
    if not_french("\n".join(paragraphs)):
        raise BadInput(f"{args.book} is not in French: quotation marks, hyphens and spaces are made for French only")
    first, middle, last = split(paragraphs, cutter, args.holdout)
    paragraphs, start, end = first + middle + last, len(first), len(first) + len(middle)
    parts = [first, last] if args.holdout else [first]
    texts = [cutter.encode("\n\n".join(part)) for part in parts]
    title = args.book.stem
    starts = range(0, length, args.stride)
    train: list[Row] = []
    for number, part in enumerate(texts, 1):
        train += rows(part, cutter, f"train {number}/{len(texts)}", starts, title)
    if not train:
        tokens = sum(len(text.ends) for text in texts)
        raise BadInput(f"{args.book} has {tokens:,} tokens to train on: too few for one window of {length}")
    random.Random(args.seed).shuffle(train)
    held = cutter.encode("\n\n".join(middle))
    heldout = list(rows(held, cutter, "heldout 1/1", range(1), title))
    text, text_path = "\n\n".join(paragraphs) + "\n", args.out.with_suffix(".txt")
    manifest = write_prepared(
        args.out,
        train,
        heldout,
        tokenizer=args.tokenizer,
        sequence_len=length,
        source={"path": str(args.book), "repo": None, "revision": None, "files": files},
        arguments={"stride": args.stride, "holdout": args.holdout},
        seed=args.seed,
        documents={
            "read": 1,
            "kept": 1,
            "heldout": 0,  # no whole document: a block of this one, below
            "rejected": {},
            "paragraphs": len(paragraphs),
            "heldout_paragraphs": [start, end] if args.holdout else None,  # from, up to but without
            "cleaning": counts,
            "text": {"path": text_path.name, "sha256": digest(text)},
        },
        text=text,
        packages=["pypdfium2", "lxml", "striprtf", "rapidfuzz"],
    )
    print(f"{args.book}: {len(paragraphs):,} paragraphs; {', '.join(f'{v:,} {k}' for k, v in counts.items())}")
    if args.holdout:
        print(f"held out: paragraphs {start + 1:,} to {end:,}, {manifest['heldout']['windows']} windows")
    else:
        print("held out: nothing; train without the recipe's test_datasets, since the held-out file is empty")
    print(f"{args.out}: {manifest['train']['rows']:,} rows, {manifest['train']['windows']:,} windows of {length}")


if __name__ == "__main__":
    without_torch()
    run(main)
