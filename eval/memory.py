"""Does the model continue the novel, or recite it?

Two looks: how probable the true next words of trained pages are to the model (nothing is generated), and the longest
passage of a free continuation that stands word by word in the training text. Pages held out are the control for the
first; what the author's own held-out pages share with the others is the control for the second.

The first is the measure of Cooper et al. 2025 (arXiv 2505.12546): the probability that a model, given the text before,
would write the next 50 tokens exactly, out of one forward pass. They give 50 tokens of text before; here it is all that
the window holds, 200 at least, which finds more. The threshold on that probability is ours.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

SPAN = 50  # tokens whose joint probability tells memorised text
CONTEXT = 200  # tokens of true text before them, at least
EXTRACTABLE = 1e-3  # one in a thousand draws would write the 50 tokens: 0.87 a token, where held-out prose has 0.05


def span_figures(documents: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Over a text's spans of SPAN tokens: how many, the typical probability of one token, the share extractable."""
    spans = [value for document in documents for value in document["spans"]]
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
    sides = {}
    for side, task in (("train", "novel_train"), ("heldout", "novel_heldout")):
        figures = span_figures(scores[task]["documents"]) if scores.get(task) else None
        if figures is None:
            return None
        sides[side] = figures
    return {"span_tokens": SPAN, "context_tokens": CONTEXT, **sides}
