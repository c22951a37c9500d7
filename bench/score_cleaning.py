"""Score cleaned text against clean truth: character error rate, paragraphs found, what was left in.

Both sides are brought to the project's typographic convention first, so that only the cleaning is scored.

    python bench/score_cleaning.py --text data/2c.txt --truth truth.txt
    python bench/score_cleaning.py --parquet data/raw/gallica --truth truth/ --show 20

    python bench/score_cleaning.py --scan scan.txt --truth truth.txt --show 20

With --parquet every document of the files whose truth/<file_id>.txt exists is cleaned by `prep/page_layout.py` and scored.
A truth file holds one paragraph a block, blocks separated by blank lines. The character error rate is the Levenshtein
distance over the truth's characters, paragraph ends counted as spaces; a paragraph boundary is found when it stands
before the same word of the truth (words aligned by the fewest edits).

With --scan (a file, pages separated by form feeds, or a folder of *.txt, and --truth a folder of the same names) recognition
errors are not counted, since cleaning cannot mend them: only hyphenated line ends wrongly joined or kept (of those
whose word the truth has; real compounds apart), page numbers and headers left between the first and the last words
of the work, and words left before and after it.
"""

import argparse
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from prep.common import BadInput, run
from prep.page_layout import clean_pages
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


class ScanScore(NamedTuple):
    """Sums over scans: what cleaning can mend, whatever was misread."""

    pages: int = 0  # with any text
    cuts: int = 0  # words cut at a line's end that the truth has, read rightly
    cuts_wrong: int = 0  # of these, words that the truth writes without a hyphen and the cleaned text not so
    compounds: int = 0  # cut words that the truth writes with a hyphen
    compounds_wrong: int = 0
    numbers_left: int = 0  # places where figures of a page number stand that the truth has not
    headers_left: int = 0
    words_before: int = 0  # before the first words of the truth
    words_after: int = 0
    notice_left: int = 0  # words "gallica" left: there are some wherever a legal page is

    def __add__(self, other: "ScanScore") -> "ScanScore":  # type: ignore[override]
        return ScanScore(*(a + b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.pages} pages  line ends right {1 - self.cuts_wrong / max(1, self.cuts):.2%} of {self.cuts}, "
            f"compounds {1 - self.compounds_wrong / max(1, self.compounds):.2%} of {self.compounds}  "
            f"per 100 pages: numbers {100 * self.numbers_left / max(1, self.pages):.2f} "
            f"headers {100 * self.headers_left / max(1, self.pages):.2f}  words before {self.words_before} "
            f"after {self.words_after}  legal {self.notice_left}"
        )


_LETTERS = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_CUT = re.compile(r"([^\W\d_]+)-\s*\n(?:.{0,45}\n){0,4}?\s*([^\W\d_]+)")


def score_scan(raw: str, found: list[str], truth: list[str], differences: list[str] | None = None) -> ScanScore:
    """Compare the cleaned text of a scan with the truth of another edition; `raw` is the scan, for its cut words."""
    show = differences.append if differences is not None else lambda _: None
    words, clean = " ".join(found).split(), " ".join(truth).split()
    forms: dict[str, set[bool]] = {}  # letters of the truth's words -> whether written with a hyphen
    for word in clean:
        for part in _LETTERS.findall(word):
            forms.setdefault(part.replace("-", "").lower(), set()).add("-" in part)
    halves = {(head.lower(), tail.lower()) for head, tail in _CUT.findall(raw)}
    cuts = Counter(f"{head}{tail}".lower() for head, tail in _CUT.findall(raw))
    midline = set(_LETTERS.findall(raw.lower()))
    runs: list[list[int]] = []  # of differing words: from, to in the found; from, to in the truth
    same = []
    for op in Levenshtein.opcodes(words, clean):
        if op.tag == "equal":
            same.append(op)
        elif runs and runs[-1][1] == op.src_start and runs[-1][3] == op.dest_start:
            runs[-1][1], runs[-1][3] = op.src_end, op.dest_end
        else:
            runs.append([op.src_start, op.src_end, op.dest_start, op.dest_end])
    sure = [op for op in same if op.src_end - op.src_start >= 5]
    if not sure:
        raise BadInput("the scan and the truth have nothing in common: give the truth of this work")
    begins, ends = sure[0].src_start, sure[-1].src_end
    numbers = headers = wrong = compounds_wrong = 0
    titles, figures, pages = _page_edges(raw)
    for a, b, c, d in runs:
        if a < begins or b > ends:
            continue
        extra, wanted = words[a:b], clean[c:d]
        kind = ""
        joined, right = " ".join(extra).lower(), " ".join(wanted).lower()
        if joined.replace("-", "").replace(" ", "") == right.replace("-", "").replace(" ", ""):
            # Case differs between editions, and so do some hyphens: what the scan itself has in mid-line is its own.
            own = all(word in midline or word in right.split() for word in _LETTERS.findall(joined))
            pairs = {f"{x} {y}" for x, y in itertools.pairwise(_LETTERS.findall(joined))}
            split = any(f"{head} {tail}" in pairs for head, tail in halves)
            if split or (joined.count("-") != right.count("-") and not own and _parts(extra) & cuts.keys()):
                compounds_wrong += "-" in right
                wrong += "-" not in right
                kind = "compound" if "-" in right else "cut"
        elif len(extra) > len(wanted):
            page = a / len(words)
            around = {word for word in [*words[a - 8 : a], *words[b : b + 8]] if len(word) > 5}
            left = [
                w
                for w in extra
                if w not in wanted
                and any(
                    abs(page - p) < 0.03 and (not around or around & on_page)
                    for p, on_page in figures.get(_figure(w), [])
                )
            ]
            left = left if len(extra) <= len(wanted) + 6 else []  # more is a picture, read as letters
            numbers += bool(left)
            title = _key(extra)
            header = (
                len(extra) <= len(wanted) + 12
                and any(fuzz.partial_ratio(key, title) >= 85 for key in titles if len(key) <= len(title))
                and not any(
                    fuzz.partial_ratio(key, _key(wanted)) >= 85 for key in titles if len(key) <= len(_key(wanted))
                )
            )
            headers += header
            kind = " ".join(["number"] * bool(left) + ["header"] * header)
        if kind:
            show(f"{kind}: {' '.join(clean[max(0, c - 4) : c])} [{' '.join(extra)} -> {' '.join(wanted)}]")
    show(f"before: {' '.join(words[:begins])}")
    show(f"after: {' '.join(words[ends:])}")
    solid = sum(n for key, n in cuts.items() if forms.get(key) == {False})
    compounds = sum(n for key, n in cuts.items() if forms.get(key) == {True})
    legal = sum("gallica" in word.lower() for word in words)
    return ScanScore(
        pages, solid, wrong, compounds, compounds_wrong, numbers, headers, begins, len(words) - ends, legal
    )


def _page_edges(raw: str) -> tuple[list[str], dict[int, list[tuple[float, set[str]]]], int]:
    """Running titles (their letters), figures with the place (0 to 1) and the words of each page they stand on, pages.

    Both from the first two and last two lines of pages. A lone digit is mostly a blot or a sheet's signature: figures
    from 10 on, and those of the first pages.
    """
    pages = [page for page in raw.split("\f") if any(map(str.isalpha, page))]
    titles: Counter[str] = Counter()
    figures: dict[int, list[tuple[float, set[str]]]] = {}
    for n, page in enumerate(pages):
        lines = [line.strip() for line in page.split("\n") if line.strip()]
        for line in {*lines[:2], *lines[-2:]}:
            if len(line) <= 60:
                titles[_key([line])] += 1
                for word in line.split():
                    if (value := _figure(word)) >= 10 or 0 < value <= n <= 20:
                        figures.setdefault(value, []).append((n / len(pages), {*to_convention(page).split()}))
    return [key for key, n in titles.items() if n >= 5 and len(key) >= 5], figures, len(pages)


def _figure(word: str) -> int:
    """The value of a word that is a figure, or 0."""
    match = re.fullmatch(r"\W*(\d{1,4})\W*", word)
    return int(match[1]) if match else 0


def _key(words: list[str]) -> str:
    return "".join(filter(str.isalpha, "".join(words))).upper()


def _parts(words: list[str]) -> set[str]:
    """Letters that a cut word may have among these: each alone, and each with the next."""
    letters = ["".join(filter(str.isalpha, word)).lower() for word in words]
    return {*letters, *(a + b for a, b in itertools.pairwise(letters))}


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


def score_scans(scan: Path, truth: Path, shown: int) -> ScanScore:
    """Clean and score one scan or a folder of them, a line each."""
    scans = sorted(scan.glob("*.txt")) if scan.is_dir() else [scan]
    total = ScanScore()
    for path in tqdm(scans, unit=" scans", disable=None):
        clean = truth / path.name if scan.is_dir() else truth
        for file in (path, clean):
            if not file.is_file():
                raise BadInput(f"no such file: {file}")
        raw = path.read_text(encoding="utf-8")
        differences: list[str] = []
        try:
            result = score_scan(
                raw, clean_pages(raw).paragraphs, paragraphs_of(clean.read_text(encoding="utf-8")), differences
            )
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        tqdm.write(f"{path.stem}  {result}")
        for line in differences[:shown]:
            tqdm.write(f"    {line}")
        total += result
    if not scans:
        raise BadInput(f"no *.txt in {scan}")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="a prepared text, paragraphs separated by blank lines")
    source.add_argument("--scan", type=Path, help="a real scan's text, or a folder of them, to clean and score")
    source.add_argument("--parquet", type=Path, help="a folder of raw parquet files to clean and score")
    parser.add_argument(
        "--truth", type=Path, required=True, help="the truth: a file, or with --parquet a folder of them"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N differences of each text")
    args = parser.parse_args()
    if args.scan:
        print(f"all  {score_scans(args.scan, args.truth, args.show)}")
        return
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
