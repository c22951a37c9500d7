"""Scores cleaned text against clean truth: character errors, paragraphs found, page numbers and headers left.

    python bench/score_cleaning.py --text data/2c.txt --truth truth.txt
    python bench/score_cleaning.py --parquet data/raw/gallica --truth truth/ --show 20
    python bench/score_cleaning.py --scan scans/ --truth truth/ --show 20

--parquet cleans and scores every book of a folder of sources, also page tables, that has a truth/<its identifier>.txt. A
truth has one paragraph a block, between blank lines. Both sides are brought to the typographic convention. A boundary is
found if it is before the same word of the truth (words aligned by the fewest edits).

--scan cleans and scores real scans (a file or a folder of them, form feeds between pages) against another edition's text
of the same name. Recognition errors do not count: only cut words wrongly joined or kept (of those that the truth has;
compounds apart), page numbers and headers left within the work, words left before and after it, noise (figures, capitals
that are no words, other lines without a word, blots inside paragraphs, words split in two), and the truth's words lost by the
rule against noise: those that are found when the scan is cleaned without it.
"""

from prep.command import run

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

from prep.common import BadInput
from prep.debris import SHORT_WORDS
from prep.filters import lexicon
from prep.formats import read_book
from prep.front_matter import letters_of
from prep.page_layout import clean_pages, without_marks
from prep.readers import read_books, source_paths
from prep.typography import to_convention

Score = Counter[str]  # sums, so that the scores of several books add up
NOISE = ("figures", "capitals", "other", "inside", "split words")


def f1(score: Score) -> float:
    """Of the boundaries between paragraphs."""
    return 2 * score["right boundaries"] / max(1, score["found boundaries"] + score["true boundaries"])


def described(score: Score) -> str:
    """The line of a text."""
    right = score["right boundaries"]
    return (
        f"CER {score['errors'] / max(1, score['characters']):.3%}  "
        f"paragraphs P {right / max(1, score['found boundaries']):.2%} R {right / max(1, score['true boundaries']):.2%} "
        f"F1 {f1(score):.2%}  hyphens {score['hyphen']}  numbers {score['number']}  headers {score['header']}"
    )


def described_scan(score: Score) -> str:
    """The line of a scan."""
    pages, text = max(1, score["pages"]), max(1, score["length"])
    return (
        f"{score['pages']} pages  line ends right {1 - score['cut'] / max(1, score['cuts']):.2%} of {score['cuts']}, "
        f"compounds {1 - score['compound'] / max(1, score['compounds']):.2%} of {score['compounds']}  "
        f"per 100 pages: numbers {100 * score['number'] / pages:.2f} headers {100 * score['header'] / pages:.2f}  "
        f"words before {score['before']} after {score['after']}  legal {score['legal']}  "
        f"noise lines per 100,000 characters: {', '.join(f'{kind} {1e5 * score[kind] / text:.2f}' for kind in NOISE)}  "
        f"words lost {score['lost'] / max(1, score['words']):.4%}"
    )


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs of a text whose paragraphs are blocks, in the convention; ELTeC's calls and `_italics_` are not text."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")))
    text = without_marks("\n".join(filter(None, blocks)), Counter())
    return [line for line in to_convention(text).split("\n") if line]


def score(found: list[str], truth: list[str], differences: list[str] | None = None) -> Score:
    """Compares two lists of paragraphs; descriptions of what differs are appended to `differences`.

    `characters` are the truth's; paragraph ends count as spaces. `hyphen`: words that differ only in hyphens or spaces;
    `number`, `header`: places with more words with a digit, or in capitals, than the truth has.
    """
    differences = [] if differences is None else differences
    text, clean = " ".join(found), " ".join(truth)
    words, clean_words = text.split(), clean.split()
    starts, clean_starts = _starts(found), _starts(truth)
    aligned = [0] * (len(words) + 1)  # found word -> truth word
    result = Score()
    for op in Levenshtein.opcodes(words, clean_words, score_hint=len(clean_words) // 20):
        for j in range(op.src_start, op.src_end):
            aligned[j] = min(op.dest_start + j - op.src_start, max(op.dest_start, op.dest_end - 1))
        if op.tag != "equal":
            extra, wanted = words[op.src_start : op.src_end], clean_words[op.dest_start : op.dest_end]
            alike = bool(wanted) and "".join(extra).replace("-", "") == "".join(wanted).replace("-", "")
            number = not alike and _with_digits(extra) > _with_digits(wanted)
            header = not alike and _in_capitals(extra) > _in_capitals(wanted)
            kinds = [k for k, yes in (("hyphen", alike), ("number", number), ("header", header)) if yes]
            result.update(kinds)
            context = " ".join(clean_words[max(0, op.dest_start - 4) : op.dest_start])
            differences.append(f"{(kinds or ['text'])[0]}: {context} [{' '.join(extra)} -> {' '.join(wanted)}]")
    right: set[int] = set()
    for j in sorted(starts):
        if (i := aligned[j]) in clean_starts - right:
            right.add(i)
        else:
            differences.append(f"boundary too many: {_around(words, j)}")
    differences += [f"boundary missing: {_around(clean_words, i)}" for i in sorted(clean_starts - right)]
    result["characters"] = len(clean)
    result["errors"] = Levenshtein.distance(text, clean, score_hint=len(clean) // 100)
    boundaries = {"true": clean_starts, "found": starts, "right": right}
    return result + Score({f"{name} boundaries": len(places) for name, places in boundaries.items()})


def _starts(paragraphs: list[str]) -> set[int]:
    """The words with which paragraphs begin, but for the first."""
    ends = list(itertools.accumulate(len(p.split()) for p in paragraphs))
    return {*ends} - {*ends[-1:]}


def _with_digits(words: list[str]) -> int:
    return sum(any(map(str.isdigit, word)) for word in words)


def _in_capitals(words: list[str]) -> int:
    return sum(len(word) >= 3 and word.isupper() for word in words)


def _around(words: list[str], at: int) -> str:
    return f"{' '.join(words[max(0, at - 8) : at])} ¶ {' '.join(words[at : at + 8])}"


# --- real scans -------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_NUMERAL = re.compile(r"\W*[IVXLC]+\W*")
_SENTENCE_MARK = re.compile(r"^[—«]|[.?!…,;:»]$")  # an unknown word may be a name: a reply, the end of a paragraph
_CUT = re.compile(r"([^\W\d_]+)-\s*\n(?:.{0,45}\n){0,4}?\s*([^\W\d_]+)")


def score_scan(name: str, raw: str, found: list[str], truth: list[str], differences: list[str]) -> Score:
    """Compares a cleaned scan with another edition's text; `raw` is the scan, for its cut words and page edges.

    `cuts` are cut words, read rightly, that the truth writes without a hyphen, `compounds` those with one, `cut` and
    `compound` the wrong ones of them; `before` and `after` are words around the truth's, `legal` words "gallica".
    """
    words, clean = " ".join(found).split(), " ".join(truth).split()
    opcodes = Levenshtein.opcodes(words, clean, score_hint=len(clean) // 20)
    same = [op for op in opcodes if op.tag == "equal" and op.src_end - op.src_start >= 5]
    if not same:
        raise BadInput(f"{name}: the scan and the truth have nothing in common: give the truth of this work")
    begins, ends = same[0].src_start, same[-1].src_end
    forms: dict[str, set[bool]] = {}  # letters of the truth's words -> whether written with a hyphen
    for part in _WORD.findall(" ".join(clean)):
        forms.setdefault(part.replace("-", "").lower(), set()).add("-" in part)
    halves = [(head.lower(), tail.lower()) for head, tail in _CUT.findall(raw)]
    cuts = Counter(head + tail for head, tail in halves)
    midline = set(_WORD.findall(raw.lower()))
    known = lexicon() | set(_WORD.findall(" ".join(clean).lower()))
    result = Score(kind for paragraph in found if (kind := noise(paragraph, known)))
    limits = {0, *itertools.accumulate(len(paragraph.split()) for paragraph in found)}
    titles, figures, pages = _page_edges(raw)

    def hyphen_wrong(extra: list[str], joined: str, right: str) -> bool:
        """Whether a cut word was joined or kept wrongly; what the scan has in mid-line is the edition's own."""
        parts = _WORD.findall(joined)
        if {f"{a} {b}" for a, b in halves} & {f"{a} {b}" for a, b in itertools.pairwise(parts)}:
            return True
        letters = [letters_of(word) for word in extra]
        own = all(word in midline or word in right.split() for word in parts)
        cut = cuts.keys() & {*letters, *(a + b for a, b in itertools.pairwise(letters))}
        return joined.count("-") != right.count("-") and not own and bool(cut)

    def number_left(a: int, b: int, extra: list[str], wanted: list[str]) -> bool:
        """Whether a figure of a page's edge is left near the words of that page; six words more are a picture."""
        around = {word for word in words[max(0, a - 8) : a] + words[b : b + 8] if len(word) > 5}
        return len(extra) <= len(wanted) + 6 and any(
            abs(a / len(words) - place) < 0.03 and (not around or around & on_page)
            for word in extra
            if word not in wanted
            for place, on_page in figures.get(_figure(word), [])
        )

    def header_left(extra: list[str], wanted: list[str]) -> bool:
        more, less = letters_of("".join(extra)), letters_of("".join(wanted))
        return (
            len(extra) <= len(wanted) + 12
            and any(fuzz.partial_ratio(key, more) >= 85 for key in titles if len(key) <= len(more))
            and not any(fuzz.partial_ratio(key, less) >= 85 for key in titles if len(key) <= len(less))
        )

    for equal, run_ in itertools.groupby(opcodes, key=lambda op: op.tag == "equal"):
        ops = list(run_)
        a, b, c, d = ops[0].src_start, ops[-1].src_end, ops[0].dest_start, ops[-1].dest_end
        if equal or a < begins or b > ends:
            continue
        extra, wanted = words[a:b], clean[c:d]
        joined, right = " ".join(extra).lower(), " ".join(wanted).lower()
        here = []
        if re.sub("[- ]", "", joined) == re.sub("[- ]", "", right):
            if hyphen_wrong(extra, joined, right):
                here = ["compound" if "-" in right else "cut"]
            elif len(extra) > len(wanted) and "-" not in right and re.fullmatch(r"[^\W\d_]+ [^\W\d_]+\W*", joined):
                here = ["split words"]
        elif len(extra) > len(wanted):
            here = ["number"] * number_left(a, b, extra, wanted) + ["header"] * header_left(extra, wanted)
            here += ["inside"] * bool(not wanted and not {a, b} <= limits and noise(" ".join(extra), known))
        result.update(here)
        if here:
            context = " ".join(clean[max(0, c - 4) : c])
            differences.append(f"{' '.join(here)}: {context} [{' '.join(extra)} -> {' '.join(wanted)}]")
    differences += [f"before: {' '.join(words[:begins])}", f"after: {' '.join(words[ends:])}"]
    of_forms = Counter({key: n for key, n in cuts.items() if len(forms.get(key, ())) == 1})
    result["compounds"] = sum(n for key, n in of_forms.items() if True in forms[key])
    result["cuts"] = of_forms.total() - result["compounds"]
    legal = sum("gallica" in word.lower() for word in words)
    with_noise = " ".join(clean_pages(raw, keep_debris=True).paragraphs).split()
    lost = sorted(_equal(Levenshtein.opcodes(with_noise, clean, score_hint=len(clean) // 20)) - _equal(opcodes))
    differences += [f"lost: {' '.join(clean[max(0, i - 3) : i])} [{clean[i]}]" for i in lost]
    return result + Score(
        pages=pages, before=begins, after=len(words) - ends, legal=legal, length=sum(map(len, found)), lost=len(lost),
        words=len(clean),
    )  # fmt: skip


def _equal(opcodes: Iterable[Any]) -> set[int]:
    """The truth's words that the text has, too."""
    return {i for op in opcodes if op.tag == "equal" for i in range(op.dest_start, op.dest_end)}


def noise(text: str, known: Set[str]) -> str | None:
    """The kind of noise that a line is: figures without a word, capitals or other letters of which most are in no known word."""
    words = [word for part in _WORD.findall(text) for word in part.split("-")]
    if _NUMERAL.fullmatch(text):
        return None
    if not any(len(word) >= 2 for word in words):
        return "figures" if any(map(str.isdigit, text)) else None if _SENTENCE_MARK.search(text) else "other"
    good = sum(len(word) for word in words if word.lower() in known and (len(word) > 2 or word.lower() in SHORT_WORDS))
    if 2 * good >= sum(map(len, words)):
        return None
    return "capitals" if text.upper() == text else None if _SENTENCE_MARK.search(text) else "other"


def _page_edges(raw: str) -> tuple[list[str], dict[int, list[tuple[float, set[str]]]], int]:
    """Of the first and last two lines of pages: titles that recur, and figures, each with the place (0 to 1) and the
    words of its pages; and the number of pages. A lone digit is mostly a blot or a sheet's number, but for the first pages.
    """
    pages = [page for page in raw.split("\f") if any(map(str.isalpha, page))]
    titles: Counter[str] = Counter()
    figures: dict[int, list[tuple[float, set[str]]]] = {}
    for n, page in enumerate(pages):
        lines = [line.strip() for line in page.split("\n") if line.strip()]
        for line in {*lines[:2], *lines[-2:]}:
            if len(line) <= 60:
                titles[letters_of(line)] += 1
                for word in line.split():
                    if (value := _figure(word)) >= 10 or 0 < value <= n <= 20:
                        figures.setdefault(value, []).append((n / len(pages), {*to_convention(page).split()}))
    return [key for key, n in titles.items() if n >= 5 and len(key) >= 5], figures, len(pages)


def _figure(word: str) -> int:
    """The value of a word that is a figure, or 0."""
    return int(match[1]) if (match := re.fullmatch(r"\W*(\d{1,4})\W*", word)) else 0


# --- the command ------------------------------------------------------------------------------------------------------


def documents(path: Path, truth: Path) -> Iterator[tuple[str, str, str]]:
    """(identifier, text, truth) of a book, or of every book in a folder of sources that has a truth."""
    for book in itertools.chain.from_iterable(map(read_books, source_paths(path) if path.is_dir() else [path])):
        clean = truth / f"{book.id}.txt" if truth.is_dir() else truth
        if clean.is_file():
            if said := book.metadata.get("not read"):
                raise BadInput(said)
            yield book.id, book.text, read_book(clean).whole()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="a prepared text, paragraphs separated by blank lines")
    source.add_argument("--scan", type=Path, help="a real scan's text, or a folder of them, to clean and score")
    source.add_argument("--parquet", type=Path, help="a folder of sources, as of prep/gallica.py, to clean and score")
    parser.add_argument("--truth", type=Path, required=True, help="a file, or a folder of them")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N differences of each text")
    args = parser.parse_args()
    given = args.parquet or args.scan or args.text
    show = described_scan if args.scan else described
    total = Score()
    for name, raw, truth in documents(given, args.truth):
        differences: list[str] = []
        found = paragraphs_of(raw) if args.text else clean_pages(raw).paragraphs
        clean = paragraphs_of(truth)
        result = score_scan(name, raw, found, clean, differences) if args.scan else score(found, clean, differences)
        print(f"{name}  {show(result)}", *(f"    {line}" for line in differences[: args.show]), sep="\n", flush=True)
        total += result
    if not total:
        raise BadInput(f"no text of {given} has a truth in {args.truth}")
    print(f"all  {show(total)}")


if __name__ == "__main__":
    run(main)
