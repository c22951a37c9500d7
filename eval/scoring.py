"""Perplexity through lm-eval: the tasks of eval/tasks, scored once, with each token's log-probability kept.

lm-eval reads the tasks, cuts the windows and sums up. The one thing done here in its place is the forward pass, since
lm-eval's own returns a sum a window: intervals, and whatever else looks inside a document, would need a second pass.
The formulas are in eval/README.md.
"""

import contextlib
import io
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eval.intervals import difference, interval
from eval.metrics import CONTEXT, SPAN
from prep.common import BadInput, progress

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults that are wanted here, at every model

TASKS = Path(__file__).parent / "tasks"
MAX_LENGTH = 2048  # the same windows for every stage and base, whatever a model's config allows
FILL = 0.9  # of a batch, at least, is text
BLOCK = 256  # tokens: a bootstrap unit long enough that neighbours hardly depend on each other

Key = tuple[int, int]  # text, and window in it
Window = tuple[list[int], list[int]]  # input tokens, and the target tokens that end one later


class TokenScorer(HFLM):
    """lm-eval's Hugging Face model, keeping log p(token | window so far) of every token it scores.

    `add_bos_token=False`, because lm-eval puts the BOS in front of the first window itself: a tokenizer that adds its
    own would have the model predict a BOS after a BOS, and be charged for it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, batch_size: int, label: str):
        settings: dict[str, Any] = {"max_length": MAX_LENGTH, "add_bos_token": False, "backend": "causal"}
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **settings)
        self.label = label  # of the progress bar
        self.screen = sys.stderr  # where the bar goes: lm-eval's own, one a task for no time at all, are left out
        self.logprobs: dict[tuple[str, int], np.ndarray] = {}  # (task, document) -> float32 of shape (tokens,)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each request's text, in nats."""
        windows = {}
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for number, pair in enumerate(get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)):
                context, target = make_disjoint_window(pair)
                windows[index, number] = (context + target[:-1], target)
        scored = self.window_logprobs(windows, "scoring")
        answers = []
        for index, request in enumerate(requests):
            logprobs = np.concatenate([scored[key] for key in sorted(scored) if key[0] == index])
            self.logprobs[request.task_name, request.doc_id] = logprobs
            answers.append(float(logprobs.sum(dtype=np.float64)))
        return answers

    def window_logprobs(self, windows: dict[Key, Window], what: str) -> dict[Key, np.ndarray]:
        """Log-probabilities of each window's target, under a progress bar.

        Windows go through the model longest first, so that those of one batch are nearly equal in length (see `batches`);
        padding is on the right, where a causal model does not look.
        """
        order = sorted(windows, key=lambda key: (-len(windows[key][0]), key))
        scored: dict[Key, np.ndarray] = {}
        total = sum(len(target) for _, target in windows.values())
        with progress(
            total=total, unit="tok", desc=f"{self.label}: {what}", file=self.screen, disable=not order
        ) as bar:
            for first, end in batches([len(windows[key][0]) for key in order], self.batch_size):
                inputs, targets = map(list, zip(*(windows[key] for key in order[first:end]), strict=True))
                scored |= zip(order[first:end], self.batch_logprobs(inputs, targets), strict=True)
                bar.update(sum(map(len, targets)))
        return scored

    def batch_logprobs(self, inputs: list[list[int]], targets: list[list[int]]) -> list[np.ndarray]:
        """Natural log-probabilities of `targets`, the tokens after the last len(target) of each input."""
        padded = pad_sequence([torch.tensor(tokens) for tokens in inputs], batch_first=True)
        logits = self._model_call(padded.to(self.device))
        result = []
        for row, (tokens, target) in enumerate(zip(inputs, targets, strict=True)):
            wanted = torch.tensor(target, device=self.device)
            seen = logits[row, len(tokens) - len(target) : len(tokens)].float()
            result.append(-torch.nn.functional.cross_entropy(seen, wanted, reduction="none").cpu().numpy())
        return result


def batches(lengths: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """First and end of the runs of windows that go through the model together, `lengths` falling: at most `size`, and none
    shorter than FILL of the longest, so that less than 1 - FILL of a batch is padding."""
    first = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or end - first == size or lengths[end] < FILL * lengths[first]:
            yield first, end
            first = end


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's task objects, with their documents read. Raises BadInput when a text is missing or damaged."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise BadInput(f"no task {', '.join(unknown)} in {TASKS}; there are: {', '.join(manager.all_tasks)}")
    tasks = get_task_dict(list(names), manager)
    return {name: tasks[name] for name in names}


def score(scorer: TokenScorer, tasks: dict[str, Any], limit: int | None) -> dict[str, dict[str, Any]]:
    """Run the tasks, on the first `limit` documents of each if given; one `summary` a task."""
    with contextlib.redirect_stderr(io.StringIO()):
        results = lm_eval.evaluate(scorer, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    return {
        name: summary(
            [measured(s, scorer.logprobs[name, s["doc_id"]], scorer.tokenizer) for s in results["samples"][name]]
        )
        for name in tasks
    }


def measured(sample: dict[str, Any], logprobs: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
    """One document of lm-eval's log as it stands in the report: its sums, and the same by blocks of BLOCK tokens."""
    loglikelihood, size = sample["bits_per_byte"]
    _, words = sample["word_perplexity"]
    block_bytes = bytes_by_block(sample["doc"]["text"], tokenizer)
    block_nll = [-float(logprobs[i : i + BLOCK].sum(dtype=np.float64)) for i in range(0, len(logprobs), BLOCK)]
    return {
        "source": sample["doc"]["source"],
        "part": sample["doc"]["part"],
        "nll": -loglikelihood,
        "tokens": len(logprobs),
        "bytes": size,
        "words": words,
        "spans": [round(value, 3) for value in span_logprobs(logprobs)],
        "blocks": [{"nll": round(nll, 4), "bytes": size} for nll, size in zip(block_nll, block_bytes, strict=True)],
    }


def span_logprobs(logprobs: np.ndarray) -> list[float]:
    """Natural log-probability of each run of SPAN tokens that has CONTEXT tokens or more before it in its window."""
    starts = range(CONTEXT, MAX_LENGTH - SPAN + 1, SPAN)
    places = [window + start for window in range(0, len(logprobs), MAX_LENGTH) for start in starts]
    return [float(logprobs[i : i + SPAN].sum(dtype=np.float64)) for i in places if i + SPAN <= len(logprobs)]


def bytes_by_block(text: str, tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes that each successive BLOCK of tokens stands for."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = [offsets[min(i + BLOCK, len(offsets)) - 1][1] for i in range(0, len(offsets), BLOCK)]
    return [len(text[start:end].encode()) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def summary(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over documents (nll in nats), the figures that follow from them with their interval, and the documents."""
    sums = {key: sum(document[key] for document in documents) for key in ("nll", "tokens", "bytes", "words")}
    return {**sums, **figures(**sums), "documents": documents, "interval": interval(documents)}


def figures(nll: float, tokens: int, bytes: int, words: int) -> dict[str, float | None]:
    """The total negative log-likelihood (nats) in the units people read; None where exp overflows.

    bits_per_byte = nll / ln 2 / bytes; x_perplexity = exp(nll / x).
    """

    def exp(value: float) -> float | None:
        return math.exp(value) if value < 700 else None

    return {
        "bits_per_byte": nll / math.log(2) / bytes,
        "byte_perplexity": exp(nll / bytes),
        "word_perplexity": exp(nll / words),
        "token_perplexity": exp(nll / tokens),
    }


# --- by position ---

# In pieces of BLOCK tokens: 0-256, 256-512, 512-1024, 1024-2048 tokens.
RANGES = ((0, 1), (1, 2), (2, 4), (4, 8))
GROUP = 4  # pieces that share a full window


def window_start(piece: int, ahead: int) -> int:
    """First piece of the window in which `piece` has `ahead` to `2 * ahead - 1` pieces before it (0: none).

    Such windows start at multiples of `ahead`, so that neighbouring pieces share them.
    """
    return piece - piece % ahead - ahead if ahead else piece


def windows(pieces: list[int]) -> dict[int, int]:
    """{start: end}, in pieces, of the windows that score these pieces at every range."""
    ends: dict[int, int] = {}
    for piece in pieces:
        for ahead, _ in RANGES:
            start = window_start(piece, ahead)
            ends[start] = max(ends.get(start, 0), piece + 1)
    return ends


def choose(counts: list[int], limit: int) -> list[list[int]]:
    """Which pieces of each text (of so many) to score, in groups of GROUP, at most `limit` in all, spread evenly.

    The first group of a text has nothing before it, and is context only.
    """
    groups = [(text, group) for text, count in enumerate(counts) for group in range(1, count // GROUP)]
    wanted = min(len(groups), limit // GROUP)
    chosen: list[list[int]] = [[] for _ in counts]
    for i in range(wanted):
        text, group = groups[i * len(groups) // wanted]
        chosen[text] += range(group * GROUP, (group + 1) * GROUP)
    return chosen


def by_position(scorer: TokenScorer, documents: list[dict[str, str]], limit: int) -> dict[str, Any] | None:
    """Bits per byte of the same pieces at each range, with intervals; None when no text is long enough (2048 tokens).

    `change` is the last range less the second: what context beyond 1024 tokens gives over 256 to 512.
    """
    tokens = [scorer.tok_encode(document["text"]) for document in documents]
    chosen = choose([len(ids) // BLOCK for ids in tokens], limit)
    jobs = {}
    for text, pieces in enumerate(chosen):
        ids = [scorer.prefix_token_id, *tokens[text]]
        for start, end in windows(pieces).items():
            first, last = start * BLOCK, end * BLOCK
            jobs[text, start] = (ids[first:last], ids[first + 1 : last + 1])
    scored = scorer.window_logprobs(jobs, "by position")

    sides: list[list[dict[str, Any]]] = [[] for _ in RANGES]
    for text, pieces in enumerate(chosen):
        sizes = bytes_by_block(documents[text]["text"], scorer.tokenizer)
        for piece in pieces:
            for side, (ahead, _) in zip(sides, RANGES, strict=True):
                start = window_start(piece, ahead)
                logprobs = scored[text, start][(piece - start) * BLOCK :][:BLOCK]
                block = {"nll": -float(logprobs.sum(dtype=np.float64)), "bytes": sizes[piece]}
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
