"""Confidence intervals for bits per byte, and for the difference of two stages on the same text.

Both are scipy's percentile bootstrap (Efron & Tibshirani 1993, chapters 13 and 16) of a ratio of sums. A unit is a whole
work where there are enough of them, otherwise a block of consecutive tokens; eval/README.md says what that means.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

DRAWS = 2_000
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


def ratio(amount: np.ndarray, size: np.ndarray, axis: int = -1) -> np.ndarray:
    """Of the sums."""
    return amount.sum(axis) / size.sum(axis)


def percentiles(amount: np.ndarray, size: np.ndarray) -> list[float] | None:
    """The 95 % interval of that ratio over units that are drawn together; None for a single one.

    One seed, so the same draws for every stage.
    """
    if len(size) < 2:
        return None
    settings = {"paired": True, "vectorized": True, "n_resamples": DRAWS, "method": "percentile"}
    result = bootstrap((amount, size), ratio, rng=np.random.default_rng(0), **settings)
    return [float(limit) for limit in result.confidence_interval]


def interval(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """95 % interval of bits per byte over the documents' units."""
    unit, table = units(documents)
    return {"unit": unit, "units": len(table), "bits_per_byte": percentiles(table[:, 0] / math.log(2), table[:, 1])}


def difference(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Bits per byte of `after` less that of `before`, with its 95 % interval; below zero is better.

    Both must be scores of one text under one tokenizer; None when the units do not match.
    """
    (unit, first), (_, second) = units(before), units(after)
    if not np.array_equal(first[:, 1], second[:, 1]):
        return None
    change, size = (second[:, 0] - first[:, 0]) / math.log(2), first[:, 1]
    bits = float(ratio(change, size))
    return {"unit": unit, "units": len(size), "bits_per_byte": bits, "interval": percentiles(change, size)}


def difference_of_means(
    before: Sequence[float | None], after: Sequence[float | None]
) -> tuple[float, list[float]] | None:
    """Mean after less mean before, with the paired 95 % interval over what is known of both; None below two."""
    known = [pair for pair in zip(before, after, strict=True) if None not in pair]
    change = np.diff(np.array(known, dtype=float).reshape(-1, 2)).ravel()
    interval = percentiles(change, np.ones_like(change))
    return (float(change.mean()), interval) if interval else None
