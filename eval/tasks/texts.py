"""The documents that the tasks score. Each task's YAML names one of these functions as its `custom_dataset`.

lm-eval calls them with the task's `metadata` and `dataset_kwargs`, and takes the split `test` of what they return:
one row a document, with `text`, `source` (the work it comes from) and `part` (where in the work).
"""

import heapq
import importlib
import inspect
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson
from datasets import Dataset

from prep.common import BadInput

# Texts for forgetting, from what every Python 3 installation carries, so that nothing is downloaded and nothing is
# licensed twice. Neither licences nor famous texts: a model may have memorised those. The choice was made by trying:
# SmolLM2-135M scores these between 0.8 and 1.2 bits per byte, other modules down to 0.4.
ENGLISH_CHARACTERS = 5_000  # of each of two texts: about 2,100 tokens in all
CODE_MODULES = ("colorsys", "quopri", "tabnanny")
CODE_CHARACTERS = 2_500  # of each of three modules: about 2,700 tokens in all


def heldout(path: str, **_: Any) -> dict[str, Dataset]:
    """The rows of a held-out JSONL, one document each. Raises BadInput when there is none, or a line is damaged."""
    return {"test": Dataset.from_list(read_rows(Path(path)))}


def training(path: str, documents: int, characters: int, **_: Any) -> dict[str, Dataset]:
    """Excerpts of the rows of a training JSONL, spread evenly over it: what memorisation is looked for in."""
    whole = "\n\n".join(once(Path(path)))
    starts = [i * max(0, len(whole) - characters) // max(1, documents - 1) for i in range(documents)]
    starts = starts[:1] if len(whole) <= characters else starts
    excerpts = [
        {"text": whole[start : start + characters], "source": Path(path).name, "part": str(start)} for start in starts
    ]
    return {"test": Dataset.from_list(excerpts)}


def once(path: Path) -> list[str]:
    """The texts of a training JSONL without those that repeat an earlier one: the novel is there in four phases."""
    kept: list[str] = []
    for row in sorted(read_rows(path), key=lambda row: row["part"]):
        middle = len(row["text"]) // 2
        if not any(row["text"][middle : middle + 200] in text for text in kept):
            kept.append(row["text"])
    return kept


def english(**_: Any) -> dict[str, Dataset]:
    """English prose: how the email package was meant to work, and what a heap queue is."""
    architecture = (files("email") / "architecture.rst").read_text(encoding="utf-8")
    texts = {"email/architecture.rst": architecture, "heapq.__about__": heapq.__about__}
    documents = [document(text[:ENGLISH_CHARACTERS], source, "\n\n") for source, text in texts.items()]
    return {"test": Dataset.from_list(documents)}


def code(**_: Any) -> dict[str, Dataset]:
    """Python code: excerpts of three modules, from a third of the way in, behind their headers."""
    documents = []
    for name in CODE_MODULES:
        source = inspect.getsource(importlib.import_module(name))
        start = source.index("\n", len(source) // 3) + 1
        documents.append(document(source[start : start + CODE_CHARACTERS], f"{name}.py", "\n"))
    return {"test": Dataset.from_list(documents)}


def document(text: str, source: str, boundary: str) -> dict[str, str]:
    """A row whose text ends at its last `boundary`, not in the middle of a sentence or a line."""
    return {"text": text[: text.rindex(boundary)].strip("\n"), "source": source, "part": "excerpt"}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The documents of a JSONL of training rows. Raises BadInput when it is missing, empty or damaged."""
    if not path.is_file():
        raise BadInput(f"{path} is missing (looked for in {Path.cwd()}): preparation writes it, run it first")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = orjson.loads(line)
        except ValueError as error:  # no JSON, no UTF-8, or half a pair of surrogates
            raise BadInput(f"{path}, line {number}: not whole JSON ({error}); prepare it again") from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f"{path}, line {number}: no text in this row; prepare it again")
        rows.append({"text": text, "source": str(row.get("source", path.name)), "part": str(row.get("part", number))})
    if not rows:
        raise BadInput(f"{path} is empty: nothing was held out; prepare it again with a larger --holdout")
    return rows
