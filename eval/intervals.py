"""Confidence intervals for bits per byte, and for the difference of two stages on the same text.

Both are percentile bootstraps (Efron & Tibshirani 1993, chapters 13 and 16): the text's units are drawn with
replacement, each draw gives the ratio of sums, and the middle 95 % of the draws is the interval. A unit is a whole
work where there are enough of them, otherwise a block of consecutive tokens; eval/README.md says what that means.
"""

import math
from typing import Any

import numpy as np

DRAWS = 2_000
LEVEL = 0.95
ENOUGH_WORKS = 10  # below, an interval over works would rest on too few


def units(documents: list[dict[str, Any]]) -> tuple[str, np.ndarray]:
    """What is resampled: ("work" or "block", array of shape (units, 2) with nll in nats and bytes)."""
    works: dict[str, list[float]] = {}
    for document in documents:
        work = works.setdefault(document["source"], [0.0, 0.0])
        work[0] += document["nll"]
        work[1] += document["bytes"]
    if len(works) >= ENOUGH_WORKS:
        return "work", np.array([works[source] for source in sorted(works)])
    blocks = [(block["nll"], block["bytes"]) for document in documents for block in document["blocks"]]
    return "block", np.array(blocks, dtype=float)


def bits_per_byte(nll: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Ratio of sums over the last axis, in bits per byte; nll in nats."""
    return nll.sum(-1) / size.sum(-1) / math.log(2)


def draws(count: int) -> np.ndarray:
    """Indices of shape (DRAWS, count): the same draws for every stage, which is what pairs them."""
    return np.random.default_rng(0).integers(0, count, size=(DRAWS, count))


def middle(values: np.ndarray) -> list[float]:
    """The interval that holds the middle LEVEL of the values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def interval(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """95 % interval of bits per byte over the documents' units."""
    unit, table = units(documents)
    drawn = table[draws(len(table))]
    return {
        "unit": unit,
        "units": len(table),
        "bits_per_byte": middle(bits_per_byte(drawn[..., 0], drawn[..., 1])) if len(table) > 1 else None,
    }


def difference(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Bits per byte of `after` less that of `before`, with its 95 % interval; below zero is better.

    Both must be scores of one text under one tokenizer; None when the units do not match.
    """
    unit, first = units(before)
    _, second = units(after)
    if first.shape != second.shape or not np.array_equal(first[:, 1], second[:, 1]):
        return None
    change, size = second[:, 0] - first[:, 0], first[:, 1]
    index = draws(len(size))
    return {
        "unit": unit,
        "units": len(size),
        "bits_per_byte": float(bits_per_byte(change, size)),
        "interval": middle(bits_per_byte(change[index], size[index])) if len(size) > 1 else None,
    }
