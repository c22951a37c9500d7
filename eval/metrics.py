"""Figures of texts: repetition, copies, French, style; and memorisation, from log-probabilities. eval/README.md has the formulas.

Functions over texts in the typography of the prepared ones, without a model.
"""

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np

WORD = re.compile(r"[^\W\d_]+")  # letters only: « l'eau » is two words, as in the lexicon
# A sequence of words three times in a row, of 60 words at most (two long sentences), that fills eight words or more:
# « non, non, non » is speech, not a loop. In words with one space after each.
LOOP = re.compile(r"(?<!\w)(?:((?:\w+ ){3,60})\1{2}|((?:\w+ ){2})\2{3}|(\w+ )\3{7})")
SHORTEST_COPY = 3  # words: what two texts share in shorter runs counts as none
LONGEST_COPY = 12  # words in a row that may be in the training text too; two novels of one author share 6 to 10
ARTEFACT = re.compile(  # a line that looks like a page number or a running header
    r"^[^\w\n]*\d{1,4}[^\w\n]*$"  # a page number alone on its line
    r"|^(?=(?:.*[A-ZÀ-Þ]){6})[A-ZÀ-Þ0-9 '’.,-]{6,60}$",  # a running header: a line of capitals, nothing cried out
    re.MULTILINE,
)
ELIDED = frozenset({"aujourd", "jusqu", "lorsqu", "presqu", "puisqu", "quelqu", "quoiqu"})  # what WORD cuts off


def words(text: str) -> list[str]:
    """The words of a text, in lower case, in order."""
    return WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every run of n tokens."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float | None:
    """distinct-n: different n-grams over all n-grams of all texts together (Li et al. 2016); None without any."""
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def loops(text: str) -> bool:
    """Whether some sequence of words repeats as LOOP says."""
    return bool(LOOP.search("".join(f"{word} " for word in words(text))))


def foreign(text: str) -> float | None:
    """Share of words of three letters or more that are not French words; None when there are none."""
    from prep.filters import lexicon  # here, for datatrove takes half a second to load

    tokens = [word.replace("œ", "oe") for word in words(text) if len(word) > 2]
    return sum(word not in lexicon() and word not in ELIDED for word in tokens) / len(tokens) if tokens else None


def chunks(text: str, length: int) -> list[str]:
    """The text in chunks of `length` words, signs and all; a shorter rest is left out."""
    starts = [match.start() for match in WORD.finditer(text)][::length]
    return [text[start:end] for start, end in itertools.pairwise(starts)]


class CopyFinder:
    """A text in which the longest sequence shared with another is found, word by word, case and signs left aside.

    What is matched are runs of SHORTEST_COPY words: single words match in too many places.
    """

    def __init__(self, texts: Sequence[str]):
        # The empty word after each text: no sequence crosses from one into the next.
        self.tokens = [word for text in texts for word in [*words(text), ""]]
        self.matcher = SequenceMatcher[tuple[str, ...]](None, [], [], autojunk=False)
        self.append("")

    def append(self, text: str) -> None:
        """More of one last text: a sequence may run over the seam."""
        self.tokens += words(text)
        self.matcher.set_seq2(ngrams(self.tokens, SHORTEST_COPY))

    def longest(self, text: str) -> dict[str, int]:
        """The longest run of words of `text` that is here too: {words, start, end}, the last two in characters."""
        found = list(WORD.finditer(text))
        self.matcher.set_seq1(ngrams([match.group().lower() for match in found], SHORTEST_COPY))
        first, _, size = self.matcher.find_longest_match()
        if not size:
            return {"words": 0, "start": 0, "end": 0}
        count = size + SHORTEST_COPY - 1
        return {"words": count, "start": found[first].start(), "end": found[first + count - 1].end()}


def degeneration(samples: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The figures over a stage's samples (each with `text` and `ended`); means are over samples that have the figure."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    texts = [sample["text"] for sample in samples]
    new = [share for text in texts if (share := distinct([text], 4)) is not None]
    return {
        "rep_4": mean([1 - share for share in new]),  # the share of a text's 4-grams already used (Welleck et al. 2020)
        "distinct_2": distinct(texts, 2),
        "looping": mean([loops(text) for text in texts]),
        "ended_early": mean([sample["ended"] for sample in samples]),
        "not_french": mean([foreign(text) for text in texts]),
        "artefacts": mean([len(ARTEFACT.findall(text)) for text in texts]),
    }


# --- memorisation ---

SPAN = 50  # tokens whose joint probability tells memorised text
CONTEXT = 200  # tokens of true text before them, at least
EXTRACTABLE = 1e-3  # one in a thousand draws would write the 50 tokens: 0.87 per token, where held-out prose has 0.05


def span_figures(score: dict[str, Any] | None) -> dict[str, Any] | None:
    """Over a text's spans of SPAN tokens: how many, the typical probability of one token, the share extractable."""
    spans = [value for document in (score or {"documents": []})["documents"] for value in document["spans"]]
    if not spans:
        return None
    return {
        "spans": len(spans),
        "token_probability": math.exp(statistics.fmean(spans) / SPAN),
        "best_span_probability": math.exp(max(spans)),
        "extractable": sum(value >= math.log(EXTRACTABLE) for value in spans) / len(spans),
    }


def memorisation(scores: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of trained and of held-out pages; None when either was not scored, or has no full span."""
    train, heldout = (span_figures(scores.get(task)) for task in ("novel_train", "novel_heldout"))
    if not train or not heldout:
        return None
    return {"span_tokens": SPAN, "context_tokens": CONTEXT, "train": train, "heldout": heldout}


# --- style ---

FREQUENT = 100  # words that Delta looks at: the most frequent ones carry manner, the others subject
# Of a text, for a Delta. In chunks of 900 words the demo's held-out pages are nearer to their novel (1.1 to 1.2) than to
# other authors (1.3 to 1.4); in chunks of 200 they are not (2.3 to 2.5, and 1.8 to 2.4): so few words are noise.
LEAST_WORDS = 900
NAME_TIMES = 3  # a name is in the book at least so often
# A sentence's end; the full stop of an initial (K.) or of M. and MM. is none.
SENTENCE_END = re.compile(r"(?:[!?…]|(?<!\b[A-ZÀ-Þ])(?<!\bMM)\.)(?: ?»)?(?=\s|$)")
INSIDE = re.compile(
    r"(?<=[^\W\d_][ '])[A-ZÀ-Þ][^\W\d_]*|(?<=, )[A-ZÀ-Þ][^\W\d_]*"
)  # a capital where no sentence begins
TITLES = frozenset({"M", "MM", "Mme", "Mmes", "Mlle", "Dr", "Monsieur", "Madame", "Mademoiselle"})


def delta(texts: Mapping[str, str], reference: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Burrows's Delta from each text to each text of the reference: {text: {reference: Delta}} (Burrows 2002).

    The mean absolute difference of z-scores of the FREQUENT most frequent words of the reference; means and standard
    deviations (n - 1) are over the texts of the reference, at least two. Words equally frequent in all of those are left out.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # here: slow to import
    from sklearn.metrics import pairwise_distances

    counter = CountVectorizer(analyzer=words, max_features=FREQUENT)
    known = counter.fit_transform(reference.values()).toarray()
    sizes = [len(words(text)) for text in reference.values()]
    frequencies = known / np.array(sizes)[:, None]
    mean, deviation = frequencies.mean(axis=0), frequencies.std(axis=0, ddof=1)
    told = deviation > 0
    found = counter.transform(texts.values()).toarray() / np.array([[len(words(text))] for text in texts.values()])
    sides = [((part - mean) / np.where(told, deviation, 1))[:, told] for part in (found, frequencies)]
    distances = pairwise_distances(*sides, metric="manhattan") / told.sum()
    return {
        name: dict(zip(reference, map(float, row), strict=True)) for name, row in zip(texts, distances, strict=True)
    }


def dialogue(text: str) -> float:
    """Share of words in paragraphs that begin with a dash or a guillemet."""
    parts = [(len(part.split()), part.lstrip().startswith(("—", "«"))) for part in text.split("\n\n")]
    return sum(size for size, spoken in parts if spoken) / max(1, sum(size for size, _ in parts))


def sentence_lengths(text: str) -> list[int]:
    """Words of each whole sentence; a paragraph's end ends one too, the text's end does not."""
    lengths = []
    *whole, last = text.split("\n\n")
    for paragraph, ends in [*((paragraph, [len(paragraph)]) for paragraph in whole), (last, [])]:
        ends = [match.end() for match in SENTENCE_END.finditer(paragraph)] + ends
        lengths += [len(words(paragraph[start:end])) for start, end in itertools.pairwise([0, *ends])]
    return [length for length in lengths if length]


def names(book: str) -> frozenset[str]:
    """The book's names: capitalised inside sentences NAME_TIMES or more, and ten times as often as in small letters."""
    capital = Counter(INSIDE.findall(book))
    small = Counter(word for word in WORD.findall(book) if word[0].islower())
    return frozenset(
        name
        for name, count in capital.items()
        if count >= NAME_TIMES and count > 10 * small[name.lower()] and name not in TITLES
    )


def name_frequency(text: str, known: frozenset[str]) -> float | None:
    """How many words in a thousand are names of the book; None when there are no words."""
    found = WORD.findall(text)
    return 1000 * sum(word in known for word in found) / len(found) if found else None


def style(
    samples: Mapping[str, Sequence[str]], novel: str, heldout: str | None, gallica: Mapping[str, str], base: str
) -> dict[str, dict[str, Any]]:
    """The figures of each stage's samples, of the novel, of its held-out pages cut to the samples' size, and of Gallica.

    `delta` is to the novel, to Gallica (the mean over its works) and to the samples of `base`; None where a text or what it
    is compared with has less than LEAST_WORDS words.
    """
    known = names(novel)
    sides = {name: "\n\n".join(texts) for name, texts in samples.items()}
    size = max((len(words(text)) for text in sides.values()), default=0)
    if heldout:
        ends = [match.end() for match in WORD.finditer(heldout)]
        sides["the novel, held out"] = heldout[: ends[size - 1]] if 0 < size <= len(ends) else heldout
    sides["the novel"] = novel
    if gallica:
        sides["Gallica, held out"] = "\n\n".join(gallica.values())
    long = {name: text for name, text in sides.items() if len(words(text)) >= LEAST_WORDS}

    # One key a text, whatever works are called: no title can be "novel" or "base".
    reference = {f"gallica {title}": text for title, text in gallica.items() if len(words(text)) >= LEAST_WORDS}
    works = list(reference)
    for key, name in (("novel", "the novel"), ("base", base)):
        reference |= {key: long[name]} if name in long else {}
    measured = delta(long, reference) if len(reference) > 1 else {}

    result = {}
    for name, text in sides.items():
        lengths = sentence_lengths(text)
        found: dict[str, Any] | None = measured.get(name)
        result[name] = {
            "words": len(words(text)),
            "dialogue": dialogue(text),
            "sentence_words": np.quantile(lengths, [0.1, 0.5, 0.9]).tolist() if lengths else None,
            "names": name_frequency(text, known),
            "delta": found
            and {
                "novel": found.get("novel"),
                "gallica": float(np.mean([found[work] for work in works])) if works else None,
                "base": found.get("base"),
            },
        }
    return result
