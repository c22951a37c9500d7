"""Bits per byte by position in the context: does a stage make use of what stands a thousand tokens back?

The same pieces of text are scored at each range of positions, so that only the context differs: a piece of 256 tokens at
the start of a window, one piece in, two or three pieces in, four to seven pieces in. Windows are shared between the pieces
of one text: in a long one, four tokens go through the model for each token scored, where eight or more would without.
"""

from typing import Any

import numpy as np
from tqdm import tqdm

from eval.intervals import difference, interval
from eval.scoring import BLOCK, TokenScorer, batches, bytes_by_block

# In pieces of BLOCK tokens: 0-256, 256-512, 512-1024, 1024-2048 tokens.
RANGES = ((0, 1), (1, 2), (2, 4), (4, 8))
GROUP = 4  # pieces that share a full window


def window_start(piece: int, ahead: int) -> int:
    """First piece of the window in which `piece` stands `ahead` to `2 * ahead - 1` pieces in (0: at its start).

    Such windows start at multiples of `ahead`, so that neighbouring pieces share them.
    """
    return piece - piece % ahead - ahead if ahead else piece


def windows(groups: list[int]) -> dict[int, int]:
    """Start and length, in pieces, of the windows that score these groups of GROUP pieces at every range."""
    lengths: dict[int, int] = {}
    for group in groups:
        for piece in range(group * GROUP, (group + 1) * GROUP):
            for ahead, _ in RANGES:
                start = window_start(piece, ahead)
                lengths[start] = max(lengths.get(start, 0), piece - start + 1)
    return lengths


def choose(pieces: list[int], limit: int) -> list[list[int]]:
    """Which groups of each text (of so many pieces) to score, at most `limit` pieces in all, spread evenly.

    The first group of a text has nothing before it, and is context only.
    """
    every = [(text, group) for text, count in enumerate(pieces) for group in range(1, count // GROUP)]
    wanted = min(len(every), limit // GROUP)
    taken = [every[i * len(every) // wanted] for i in range(wanted)]
    return [[group for owner, group in taken if owner == text] for text in range(len(pieces))]


def by_position(scorer: TokenScorer, documents: list[dict[str, str]], limit: int) -> dict[str, Any] | None:
    """Bits per byte of the same pieces at each range, with intervals; None when no text is long enough (2048 tokens).

    `change` is the last range less the second: what context beyond 1024 tokens gives over 256 to 512.
    """
    tokens = [scorer.tok_encode(document["text"]) for document in documents]
    chosen = choose([len(ids) // BLOCK for ids in tokens], limit)
    jobs = []
    for text, groups in enumerate(chosen):
        for start, length in windows(groups).items():
            first, last = start * BLOCK, (start + length) * BLOCK
            before = tokens[text][first - 1] if first else scorer.prefix_token_id
            jobs.append((text, start, [before, *tokens[text][first : last - 1]], tokens[text][first:last]))
    jobs.sort(key=lambda job: (-len(job[3]), job[:2]))

    scored: dict[tuple[int, int], np.ndarray] = {}
    total = sum(len(job[3]) for job in jobs)
    with tqdm(total=total, unit="tok", desc=f"{scorer.label}: by position", disable=not jobs) as bar:
        for first, end in batches([len(job[2]) for job in jobs], scorer.batch_size):
            batch = jobs[first:end]
            values = scorer.batch_logprobs([job[2] for job in batch], [job[3] for job in batch])
            for (text, start, _, target), logprobs in zip(batch, values, strict=True):
                scored[text, start] = logprobs
                bar.update(len(target))

    sides: list[list[dict[str, Any]]] = [[] for _ in RANGES]
    for text, groups in enumerate(chosen):
        sizes = bytes_by_block(documents[text]["text"], scorer.tokenizer)
        for piece in (group * GROUP + i for group in groups for i in range(GROUP)):
            for side, (ahead, _) in zip(sides, RANGES, strict=True):
                start = window_start(piece, ahead)
                place = (piece - start) * BLOCK
                nll = -float(scored[text, start][place : place + BLOCK].sum(dtype=np.float64))
                block = {"nll": nll, "bytes": sizes[piece]}
                side.append({"source": documents[text]["source"], **block, "blocks": [block]})
    if not sides[0]:
        return None
    return {
        "tokens": len(sides[0]) * BLOCK,
        "ranges": [
            {
                "from": low * BLOCK,
                "to": high * BLOCK,
                "bits_per_byte": sum(s["nll"] for s in side) / np.log(2) / sum(s["bytes"] for s in side),
                "interval": interval(side)["bits_per_byte"],
            }
            for (low, high), side in zip(RANGES, sides, strict=True)
        ],
        "change": difference(sides[1], sides[-1]),
    }
