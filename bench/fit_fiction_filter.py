"""Fit the classifier that tells prose fiction from other books, and measure it, on labelled texts of public repositories.

    python bench/fit_fiction_filter.py CLONES [--write]     CLONES/OWNER/NAME: git clones (also bare) of fiction_sample.csv's

fiction_sample.csv names the texts, their labels and kinds. Each is set as lines of a page, with headers, page numbers, cut words
and speakers as printers have them, or as one line a paragraph, and gets recognition errors, all drawn from a seed of its own.
Measured in ten-fold cross-validation, an author's texts in one fold; the limit of a fold is chosen on the others. A kind
of book counts as much as any other (below 15 texts, less), and fiction as in the library: one book in fifteen. Intervals
(95 %) resample authors. The best of 18 settings is taken, and the report says what comes of choosing it without the fold
that it is measured on. --write replaces prep/fiction.json and reports/fiction_filter.md.
"""

from prep.command import run

import argparse
import csv
import itertools
import json
import random
import re
import subprocess
import textwrap
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from lxml import etree
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from eval.tables import markdown
from prep.common import ROOT, BadInput, write_text
from prep.filters import _WORD, features, log_odds, samples
from prep.front_matter import drop_edition

SHARE = 0.067  # of prose fiction in the library: 19,240 of 289,000 books have its shelfmark
RECALL = 0.91  # the limit keeps so much of the other folds' fiction
# Fiction is told from groups of kinds rather than from all others at once: what sets it apart from verse does not from memoirs.
GROUPINGS = (
    "novel tale, criticism dictionary law philosophy science, history letters memoirs newspaper travel, dialogue play, verse, "
    "pamphlet sermon",
    "novel tale, criticism philosophy science, dictionary law, history letters memoirs travel, newspaper, dialogue play, verse, "
    "pamphlet sermon",
    "novel tale, criticism, dictionary, law, philosophy, science, history, letters, memoirs, newspaper, travel, dialogue, play, "
    "verse, pamphlet, sermon",
)
# Of the groups, the number of most frequent words, and the inverse of the penalty, the best is taken.
SETTINGS = list(itertools.product(GROUPINGS, (600, 1200), (0.003, 0.01, 0.03)))
TITLE_WORDS = 5  # the last features: yes or no, not scaled
LONGEST = 250_000  # characters set; of a longer text every n-th stretch

VERSE, SPEAKER, PROSE = range(3)
Parts = list[tuple[int, str]]
# What a machine reads for a letter.
MISREAD = "ec éé,è,e èé,e êè,e ce,o oc,0 nu,ii i1,l un l1,i rv tl ao sf ft hb,li bh mni,rn dcl"
_CONFUSED = {word[0]: word[1:].split(",") for word in MISREAD.split()}


# --- the texts as pages -----------------------------------------------------------------------------------------------


def block(text: str) -> Parts:
    """A block's lines as verse, where they look so, and otherwise as one paragraph between lines in capitals."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    capital = sum(not line[0].isalpha() or line[0].isupper() for line in lines)
    if len(lines) > 1 and max(map(len, lines)) < 64 and capital > 0.7 * len(lines):
        return [(VERSE, line) for line in lines]
    parts: Parts = []
    for line in lines:
        if line.isupper() and len(line) < 40:
            parts.append((VERSE, line))
        elif parts and parts[-1][0] == PROSE:
            parts[-1] = (PROSE, f"{parts[-1][1]} {line}")
        else:
            parts.append((PROSE, line))
    return parts


def tei(data: bytes) -> Parts:
    root = etree.fromstring(data, etree.XMLParser(recover=True, huge_tree=True, remove_comments=True))
    text = next(root.iter("{*}text"), root)
    etree.strip_elements(text, *(f"{{*}}{tag}" for tag in ("note", "figure", "castList", "fw")), with_tail=False)
    parts: Parts = []
    for node in text.iter("{*}l", "{*}speaker", "{*}p", "{*}head", "{*}stage", "{*}ab", "{*}item"):
        if next(node.iterdescendants("{*}l", "{*}p", "{*}item"), None) is not None:
            continue
        content = "".join(node.itertext())
        kind = {"l": VERSE, "speaker": SPEAKER}.get(etree.QName(node).localname, PROSE)
        parts += block(content) if kind == PROSE else [(kind, " ".join(content.split()))] if content.strip() else []
    return parts


def plain(data: bytes, name: str) -> Parts:
    text = data.decode("latin-1" if name.endswith("-8.txt") else "utf-8", errors="replace").replace("\r\n", "\n")
    if name[0].isdigit():  # Project Gutenberg's: blocks between blank lines; the others have a paragraph a line
        text = "\n".join(drop_edition(text.split("\n"), Counter()))
        return [part for lines in re.split(r"\n[ \t]*\n", text) for part in block(lines)]
    return [(PROSE, line.strip()) for line in text.split("\n") if line.strip()]


def stretch(parts: Parts) -> Parts:
    size = sum(len(text) for _, text in parts)
    every, at = size // LONGEST + 1, 0
    kept: Parts = []
    for part in parts:
        if at // 20_000 % every == 0:
            kept.append(part)
        at += len(part[1])
    return kept


def pages(parts: Parts, draw: random.Random) -> str:
    """The text as a printer would set it and a machine read it."""
    width, height, dash = draw.randint(36, 64), draw.randint(24, 42), draw.choice("—–-")
    broken, inline = draw.random() < 0.75, draw.random() < 0.5  # lines of a page; speakers in the line of their speech
    title = draw.choice(["", "", " ".join(parts[len(parts) // 2][1].split()[:4]).upper()])
    lines: list[str] = []
    speaker = ""
    for kind, text in parts:
        text = re.sub(r"^(?:[—–-]|--) ?", f"{dash} ", re.sub(r"[_*=]", "", text)).replace("--", dash).replace("’", "'")
        if kind == SPEAKER:
            text = text.strip(" .,:").upper() + draw.choice(".,.")
            speaker = f"{text} {dash} " if inline else ""
            lines += [] if inline else [text]
            continue
        text, speaker = speaker + text, ""
        lines += textwrap.wrap(text, width, break_on_hyphens=False) if broken and kind == PROSE else [text]
    if broken:
        for i in range(len(lines) - 1):
            line, after = lines[i], lines[i + 1]
            word = after.split(" ", 1)[0]
            if len(line) > width - 8 and len(word) > 6 and word.isalpha() and word.islower() and draw.random() < 0.25:
                cut = draw.randint(2, len(word) - 3)
                lines[i], lines[i + 1] = f"{line} {word[:cut]}-", after[cut:]
        for number, at in enumerate(range(0, len(lines), height)):
            lines.insert(at + number, f"{title if draw.random() < 0.7 else ''} {number + 1}".strip())
    errors = 10 ** draw.uniform(-3.3, -1.4)  # a letter in 2,000 to one in 25
    return "".join(
        draw.choice(_CONFUSED[c]) if c in _CONFUSED and draw.random() < errors else c for c in "\n".join(lines)
    )


def read(clones: Path, row: dict[str, str]) -> str:
    """The sample of a text that the classifier sees; empty where there is less than the shortest book."""
    command = ["git", "-C", str(clones / row["repository"]), "show", f"{row['commit']}:{row['path']}"]
    try:
        data = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadInput(f"no {row['path']} in {clones / row['repository']}: clone that repository") from error
    parts = tei(data) if row["path"].endswith((".xml", ".tei")) else plain(data, Path(row["path"]).name)
    seed = zlib.crc32(f"{row['repository']}/{row['path']}".encode())
    text = pages(stretch(parts), random.Random(seed)) if parts else ""
    return "\n".join(samples(text)) if len(text) >= 4000 else ""


# --- the classifier ---------------------------------------------------------------------------------------------------


def surname(author: str) -> str:
    last = (author.split(",")[0].split() or [author])[-1]
    return "".join(filter(str.isalpha, unicodedata.normalize("NFD", last.lower())))


def fit(table: np.ndarray, groups: np.ndarray, weights: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights [groups, features] and biases [groups]."""
    mean, scale = table.mean(0), table.std(0) + 1e-6
    mean[-TITLE_WORDS:], scale[-TITLE_WORDS:] = 0, 0.5
    model = LogisticRegression(C=penalty, max_iter=3000).fit((table - mean) / scale, groups, sample_weight=weights)
    return model.coef_ / scale, model.intercept_ - model.coef_ @ (mean / scale)


def rates(taken: np.ndarray, fiction: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Recall, the share of other books taken for fiction, by kind and in all, and the precision expected in the library."""
    others = sorted(set(kinds[~fiction]))
    by_kind = {kind: float(taken[kinds == kind].mean()) for kind in others}
    counts = [min(15, int((kinds == kind).sum())) for kind in others]
    recall, false = float(taken[fiction].mean()), float(np.average(list(by_kind.values()), weights=counts))
    precision = SHARE * recall / (SHARE * recall + (1 - SHARE) * false)
    return {"precision": precision, "recall": recall, "false": false, **by_kind}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path)
    parser.add_argument("--write", action="store_true", help="replace prep/fiction.json and the report")
    args = parser.parse_args()
    with (ROOT / "bench/fiction_sample.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = [read(args.clones, row) for row in rows]
    rows, texts = [row for row, text in zip(rows, texts, strict=True) if text], [text for text in texts if text]
    fiction = np.array([row["label"] == "fiction" for row in rows])
    kinds = np.array([row["kind"] for row in rows])
    authors = np.array([surname(row["author"]) for row in rows])
    frequent: Counter[str] = Counter()
    for text in texts:
        frequent.update(word for word, n in Counter(_WORD.findall(text.lower())).items() if n >= 2)
    words = [word for word, _ in frequent.most_common(max(n for _, n, _ in SETTINGS))]
    table = np.array([features(text, row["title"], words) for text, row in zip(texts, rows, strict=True)])
    weights = np.ones(len(rows))
    for kind in set(kinds[~fiction]):
        weights[kinds == kind] = min(1.0, (kinds == kind).sum() / 15) / (kinds == kind).sum()
    weights[fiction] = weights[~fiction].sum() / fiction.sum()
    weights /= weights.mean()

    fold = np.zeros(len(rows), int)
    for number, (_, these) in enumerate(GroupKFold(10, shuffle=True, random_state=0).split(table, fiction, authors)):
        fold[these] = number

    def prepared(groups: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The table with n words, and each text's group."""
        numbers = {kind: i for i, group in enumerate(groups.split(", ")) for kind in group.split()}
        return np.delete(table, np.s_[n : len(words)], axis=1), np.array([numbers[kind] for kind in kinds])

    def measured(groups: str, n: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Each text's score by what was fitted to the other folds, and whether it is above their limit."""
        scores = np.zeros(len(rows))
        x, y = prepared(groups, n)
        for number in range(10):
            here = fold == number
            coefficients, bias = fit(x[~here], y[~here], weights[~here], penalty)
            scores[here] = log_odds(x[here] @ coefficients.T + bias)
        limits = np.array([np.quantile(scores[fiction & (fold != number)], 1 - RECALL) for number in range(10)])
        return scores, scores >= limits[fold]

    tried = [measured(*setting) for setting in SETTINGS]

    def best(of: np.ndarray) -> int:
        return int(np.argmax([rates(taken[of], fiction[of], kinds[of])["precision"] for _, taken in tried]))

    chosen = best(fold >= 0)
    scores, taken = tried[chosen]
    elsewhere = np.choose(fold, [tried[best(fold != number)][1] for number in range(10)])
    nested = rates(elsewhere, fiction, kinds)

    found = rates(taken, fiction, kinds)
    groups = [np.flatnonzero(authors == author) for author in sorted(set(authors))]

    def resampled(drawn: np.ndarray) -> tuple[float, float, float]:
        at = np.concatenate([groups[int(i)] for i in drawn])
        figures = rates(taken[at], fiction[at], kinds[at])
        return figures["precision"], figures["recall"], figures["false"]

    whole = (np.arange(len(groups)),)
    drawn = bootstrap(whole, resampled, vectorized=False, n_resamples=999, method="percentile", rng=0)
    low, high = drawn.confidence_interval
    names = {
        "precision": f"precision expected where {SHARE:.1%} is fiction",
        "recall": "recall",
        "false": "other books taken for fiction",
    }
    figures = [
        [name, f"{found[key]:.3f}", f"{low[i]:.3f} to {high[i]:.3f}"] for i, (key, name) in enumerate(names.items())
    ]
    counts = [[kind, f"{(kinds == kind).sum()}", f"{taken[kinds == kind].sum()}"] for kind in sorted(set(kinds))]
    wrong = [f"{rows[i]['title'] or rows[i]['path']} ({kinds[i]})" for i in np.flatnonzero(taken & ~fiction)]
    report = f"""# The fiction filter

Made by `python bench/fit_fiction_filter.py CLONES --write`: {fiction.sum()} works of prose fiction and {(~fiction).sum()} other books by \
{len(groups)} authors, cross-validated by author; other kinds weigh alike. {len(SETTINGS)} settings were tried on the same \
texts; chosen without the fold that it is measured on, the best gives a precision of {nested["precision"]:.3f} and a recall of {nested["recall"]:.3f}.

{markdown((["", "", "95 %"], figures))}

{markdown((["kind", "texts", "taken for fiction"], counts))}

Wrongly taken: {"; ".join(wrong) or "none"}.
"""
    print(report)
    if args.write:
        groups_of, n, penalty = SETTINGS[chosen]
        coefficients, bias = fit(*prepared(groups_of, n), weights, penalty)
        made = {"words": words[:n], "weights": coefficients.round(3).tolist(), "bias": bias.round(3).tolist()}
        made["limit"] = round(float(np.quantile(scores[fiction], 1 - RECALL)), 2)
        write_text(ROOT / "prep/fiction.json", json.dumps(made, ensure_ascii=False) + "\n")
        write_text(ROOT / "bench/reports/fiction_filter.md", report)


if __name__ == "__main__":
    run(main)
