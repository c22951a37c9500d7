"""Score cleaned text against clean truth: character error rate, paragraphs found, what was left in.

Both sides are brought to the project's typographic convention first, so that only the cleaning is scored.

    python prep/score.py --text data/2c.txt --truth truth.txt
    python prep/score.py --parquet data/raw/gallica --truth truth/ --show 20

With --parquet every document of the files whose truth/<file_id>.txt exists is cleaned by `prep/pages.py` and scored.
A truth file holds one paragraph a block, blocks separated by blank lines. The character error rate is the Levenshtein
distance over the truth's characters, paragraph ends counted as spaces; a paragraph boundary is found when it stands
before the same word of the truth (words aligned by the fewest edits).
"""

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from prep.files import BadInput, run
from prep.pages import clean_pages
from prep.typography import to_convention


class Score(NamedTuple):
    """Sums, so that the scores of several books add up."""

    characters: int = 0  # of the truth
    errors: int = 0  # character edits
    truth_boundaries: int = 0
    found_boundaries: int = 0
    right_boundaries: int = 0
    hyphen_errors: int = 0  # words that differ in hyphens (or a space in their place) alone
    numbers_left: int = 0  # places where words with a digit stand that the truth has not
    headers_left: int = 0  # places where capitals stand that the truth has not

    def __add__(self, other: "Score") -> "Score":  # type: ignore[override]
        return Score(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def error_rate(self) -> float:
        return self.errors / max(1, self.characters)

    @property
    def precision(self) -> float:
        return self.right_boundaries / max(1, self.found_boundaries)

    @property
    def recall(self) -> float:
        return self.right_boundaries / max(1, self.truth_boundaries)

    @property
    def f1(self) -> float:
        return 2 * self.right_boundaries / max(1, self.found_boundaries + self.truth_boundaries)

    def __str__(self) -> str:
        return (
            f"CER {self.error_rate:.3%}  paragraphs P {self.precision:.2%} R {self.recall:.2%} F1 {self.f1:.2%}  "
            f"hyphens {self.hyphen_errors}  numbers {self.numbers_left}  headers {self.headers_left}"
        )


def paragraphs_of(text: str) -> list[str]:
    """Paragraphs of a text whose paragraphs are blocks, in the convention; a block's own line ends become spaces."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")))
    return [line for line in to_convention("\n".join(filter(None, blocks))).split("\n") if line]


def score(found: list[str], truth: list[str], differences: list[str] | None = None) -> Score:
    """Compare two lists of paragraphs; descriptions of what differs go to `differences`."""
    show = differences.append if differences is not None else lambda _: None
    text, clean = " ".join(found), " ".join(truth)
    errors = Levenshtein.distance(text, clean, score_hint=len(clean) // 100)
    words, clean_words = text.split(), clean.split()
    starts, clean_starts = _starts(found), _starts(truth)
    aligned = [0] * (len(words) + 1)  # found word -> truth word
    hyphens = numbers = headers = 0
    for op in Levenshtein.opcodes(words, clean_words):
        for j in range(op.src_start, op.src_end):
            aligned[j] = min(op.dest_start + j - op.src_start, max(op.dest_start, op.dest_end - 1))
        if op.tag != "equal":
            extra, wanted = words[op.src_start : op.src_end], clean_words[op.dest_start : op.dest_end]
            alike = bool(wanted) and "".join(extra).replace("-", "") == "".join(wanted).replace("-", "")
            hyphens += alike
            number = not alike and sum(map(_has_digit, extra)) > sum(map(_has_digit, wanted))
            header = not alike and sum(map(_capitals, extra)) > sum(map(_capitals, wanted))
            numbers += number
            headers += header
            context = " ".join(clean_words[max(0, op.dest_start - 4) : op.dest_start])
            kind = "hyphen" if alike else "number" if number else "header" if header else "text"
            show(f"{kind}: {context} [{' '.join(extra)} -> {' '.join(wanted)}]")
    right = set()
    for j in starts:
        if (i := aligned[j]) in clean_starts and i not in right:
            right.add(i)
        else:
            show(f"boundary too many: {' '.join(words[max(0, j - 8) : j])} ¶ {' '.join(words[j : j + 8])}")
    for i in sorted(clean_starts - right):
        show(f"boundary missing: {' '.join(clean_words[max(0, i - 8) : i])} ¶ {' '.join(clean_words[i : i + 8])}")
    return Score(len(clean), errors, len(clean_starts), len(starts), len(right), hyphens, numbers, headers)


def _starts(paragraphs: list[str]) -> set[int]:
    """Word indices at which a paragraph starts, but for the first."""
    starts, at = set(), 0
    for paragraph in paragraphs:
        starts.add(at)
        at += len(paragraph.split())
    return starts - {0}


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))


def _capitals(word: str) -> bool:
    return len(word) >= 3 and word.isupper()


def documents(folder: Path, truth: Path) -> Iterator[tuple[str, str, str]]:
    """(file_id, complete_text, truth) of every document in a folder of parquet files that has a truth."""
    import pyarrow.parquet as parquet

    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise BadInput(f"no .parquet file in {folder}: give the folder of the raw Gallica files")
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=16, columns=["file_id", "complete_text"]):
            for row in batch.to_pylist():
                path = truth / f"{row['file_id']}.txt"
                if path.is_file():
                    yield row["file_id"], row["complete_text"], path.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="a prepared text, paragraphs separated by blank lines")
    source.add_argument("--parquet", type=Path, help="a folder of raw parquet files to clean and score")
    parser.add_argument(
        "--truth", type=Path, required=True, help="the truth: a file, or with --parquet a folder of them"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N differences of each text")
    args = parser.parse_args()
    total = Score()
    seconds = read = 0.0
    if args.text:
        for path in (args.text, args.truth):
            if not path.is_file():
                raise BadInput(f"no such file: {path}")
        differences: list[str] = []
        text, truth = (path.read_text(encoding="utf-8") for path in (args.text, args.truth))
        total = score(paragraphs_of(text), paragraphs_of(truth), differences)
        print(*differences[: args.show], sep="\n", end="\n" if args.show else "")
    else:
        scored = 0
        for file_id, raw, truth in tqdm(documents(args.parquet, args.truth), unit=" books", disable=None):
            began = time.process_time()
            found = clean_pages(raw).paragraphs
            seconds += time.process_time() - began
            read += len(raw.encode())
            differences = []
            result = score(found, paragraphs_of(truth), differences)
            tqdm.write(f"{file_id}  {result}")
            for line in differences[: args.show]:
                tqdm.write(f"    {line}")
            total += result
            scored += 1
        if not scored:
            raise BadInput(f"no document of {args.parquet} has a truth <file_id>.txt in {args.truth}")
        print(f"{scored} books, cleaned at {read / seconds / 1e6:.1f} MB a second of processor time")
    print(f"all  {total}")


if __name__ == "__main__":
    run(main)
