"""Perplexity through lm-eval: the tasks of eval/tasks, scored once, with each token's log-probability kept.

lm-eval reads the tasks, cuts the windows and sums up. The one thing done here in its place is the forward pass, since
lm-eval's own returns one sum per window: intervals, and whatever else looks inside a document, would need a second pass.
The formulas are in eval/README.md.
"""

import contextlib
import io
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, load_yaml_config, make_disjoint_window
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eval.intervals import DRAWS, difference, interval
from eval.metrics import CONTEXT, SPAN
from eval.models import MAX_LENGTH
from prep.common import BadInput, progress, reason

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults that are wanted here, at every model

TASKS = Path(__file__).parent / "tasks"
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

        Windows go through the model longest first, so that those of one batch are nearly equal in length; padding is on
        the right, where a causal model does not look.
        """
        order = sorted(windows, key=lambda key: (-len(windows[key][0]), key))
        scored: dict[Key, np.ndarray] = {}
        total = sum(len(target) for _, target in windows.values())
        with progress(total=total, unit="tok", desc=f"{self.label}: {what}", file=self.screen) as bar:
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                inputs, targets = map(list, zip(*(windows[key] for key in batch), strict=True))
                logprobs = self.batch_logprobs(inputs, targets)
                if not np.isfinite(np.concatenate(logprobs)).all():
                    raise BadInput(
                        f"{self.label} predicts NaN: its training diverged, or float16 overflows; train it again, take another "
                        "--dtype, or leave it out with --stages"
                    )
                scored |= zip(batch, logprobs, strict=True)
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


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's task objects, with their documents read. Raises BadInput when a text is missing or damaged."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise BadInput(f"no task {', '.join(unknown)} in {TASKS}; there are: {', '.join(manager.all_tasks)}")
    tasks = manager.load_task_or_group(list(names))
    return {name: tasks[name] for name in names}


def load_benchmarks(names: Sequence[str]) -> dict[Any, Any]:
    """Tasks and groups of lm-eval's own, by name, or one of yours, by its YAML file; as `lm_eval.evaluate` takes them.

    Raises BadInput when there is no such task, or its data cannot be had.
    """
    files = [name for name in names if Path(name).is_file()]
    if len(files) < len(names):
        print("looking through lm-eval's own tasks", file=sys.stderr)  # 14,000: seconds
    manager = TaskManager(include_defaults=len(files) < len(names))
    if unknown := sorted({*names} - {*files} - {*manager.all_tasks}):
        ours = ", ".join(sorted(path.stem for path in TASKS.glob("*.yaml")))
        raise BadInput(
            f"no task {', '.join(unknown)}: neither ours ({ours}), lm-eval's (`lm_eval ls tasks`) nor a file"
        )
    try:
        yours = manager.load_task_or_group([load_yaml_config(name) for name in files])
        for name, task in yours.items():
            task.config.task = name  # lm-eval forgets it
        return yours | manager.load_task_or_group([name for name in names if name not in files])
    except Exception as error:  # datasets, the hub's client and lm-eval each raise their own
        raise BadInput(f"{', '.join(names)} cannot be loaded: {reason(error)}") from error


def benchmark(
    model: Any, tokenizer: Tokenizer, tasks: dict[Any, Any], limit: int | None, batch_size: int
) -> dict[str, dict[str, float | None]]:
    """{"hellaswag, acc": {value, stderr}, ...}, as lm-eval's own command would have it: no texts of ours, no TokenScorer."""
    if not tasks:
        return {}
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=MAX_LENGTH, backend="causal")
    found = {}
    for task, said in lm_eval.evaluate(plain, tasks, limit=limit, bootstrap_iters=DRAWS)["results"].items():
        for key, value in said.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, float):
                error = said.get(f"{metric}_stderr,{filtered}")
                name = f"{task}, {key.removesuffix(',none')}"
                found[name] = {"value": value, "stderr": error if isinstance(error, float) else None}
    return found


def score(scorer: TokenScorer, tasks: dict[str, Any], limit: int | None) -> dict[str, dict[str, Any]]:
    """Run the tasks, on the first `limit` documents of each if given; one `summary` a task."""
    if not tasks:  # lm-eval fails on none
        return {}
    with contextlib.redirect_stderr(io.StringIO()):
        results = lm_eval.evaluate(scorer, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    return {
        name: summary(
            [measured(s, scorer.logprobs[name, s["doc_id"]], scorer.tokenizer) for s in results["samples"][name]]
        )
        for name in tasks
    }


def measured(sample: dict[str, Any], logprobs: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
    """One document of lm-eval's log as the report holds it: its sums, and the same by blocks of BLOCK tokens."""
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
    """UTF-8 bytes of each successive BLOCK of tokens."""
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

AHEAD = (0, 256, 768, 1792)  # tokens of text before a chunk of BLOCK tokens; with the last they fill MAX_LENGTH


def by_position(scorer: TokenScorer, documents: list[dict[str, str]], limit: int) -> dict[str, Any] | None:
    """Bits per byte of the same chunks with each of AHEAD before them, with intervals; None when no text has MAX_LENGTH tokens.

    At most `limit` chunks, spread evenly. `change` is the last less the second: what context beyond 512 tokens gives.
    """
    tokens = [[scorer.prefix_token_id, *scorer.tok_encode(document["text"])] for document in documents]
    starts = [(text, start) for text, ids in enumerate(tokens) for start in range(AHEAD[-1], len(ids) - BLOCK, BLOCK)]
    count = min(limit, len(starts))
    if not count:
        return None
    chosen = [starts[i * len(starts) // count] for i in range(count)]
    sizes = [bytes_by_block(document["text"], scorer.tokenizer) for document in documents]
    sides = []
    for ahead in AHEAD:
        jobs = {
            (text, start): (tokens[text][start - ahead : start + BLOCK], tokens[text][start + 1 : start + BLOCK + 1])
            for text, start in chosen
        }
        scored = scorer.window_logprobs(jobs, f"after {ahead} tokens")
        side: list[dict[str, Any]] = []
        for text, start in chosen:
            nll = -float(scored[text, start].sum(dtype=np.float64))
            block = {"nll": nll, "bytes": sizes[text][start // BLOCK]}
            side.append({"source": documents[text]["source"], **block, "blocks": [block]})
        sides.append(side)
    return {
        "tokens": count * BLOCK,
        "ranges": [
            {
                "from": ahead,
                "to": ahead + BLOCK,
                "bits_per_byte": sum(s["nll"] for s in side) / np.log(2) / sum(s["bytes"] for s in side),
                "interval": interval(side)["bits_per_byte"],
            }
            for ahead, side in zip(AHEAD, sides, strict=True)
        ],
        "change": difference(sides[1], sides[-1]),
    }
