"""A question test: each stage answers in its own chat template, greedily; what can be judged without a judge is counted.

- name: capitale                                  # an entry of the file of --prompts
  question: "Quelle est la capitale de l'Italie ?"
  answer: "Rome"                                  # where there is a short exact one
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import py3langid

from eval.generation import Tokenizer, generate
from prep.common import BadInput

LETTERS = 20  # the identifier guesses below


def language(text: str) -> str | None:
    """The language of a text by py3langid; None for one too short to tell."""
    return py3langid.classify(text)[0] if sum(map(str.isalpha, text)) >= LETTERS else None


def has(text: str, answer: str) -> bool:
    """Does a text have the reference as whole words, or as a number of its own, whatever its accents and case?"""

    def plain(said: str) -> str:
        letters = unicodedata.normalize("NFD", said.casefold())
        return "".join(letter for letter in letters if not unicodedata.combining(letter))

    return bool(re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(plain(answer))}(?!\w|[.,]\d)", plain(text)))


def need_template(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises BadInput when the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise BadInput(f"{folder} has no chat template: questions are for an instruct model (prep/collect.py keeps it)")


def ask(
    model: Any, tokenizer: Tokenizer, questions: Sequence[dict[str, str]], max_new_tokens: int
) -> list[dict[str, Any]]:
    """The answers, judged: {question, text, tokens, ended, right, own_language, template}; null where it cannot be told.

    All questions are one batch, filled up on the left.
    """
    if not questions:
        return []
    turns = [[{"role": "user", "content": each["question"]}] for each in questions]
    bare, asked = (
        [str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=more)) for turn in turns]
        for more in (False, True)
    )
    opening = asked[0].removeprefix(bare[0]).strip()  # of the model's turn
    tokenizer.padding_side = "left"
    inputs = tokenizer(asked, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    end = tokenizer.eos_token_id
    sequences = generate(model, tokenizer, {"do_sample": False, "max_new_tokens": max_new_tokens}, **inputs).sequences
    known = Counter(filter(None, (language(each["question"]) for each in questions)))
    wanted = known.most_common(1)[0][0] if known else None
    answers = []
    for each, sequence in zip(questions, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        ended = end in sequence
        tokens = sequence[: sequence.index(end)] if ended else sequence
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        found = language(text)
        answers.append(
            {
                "question": each["name"],
                "text": text,
                "tokens": len(tokens),
                "ended": ended,
                "right": has(text, each["answer"]) if "answer" in each else None,
                "own_language": found == wanted if found else None,
                "template": bool(set(tokens) & set(tokenizer.all_special_ids)) or bool(opening and opening in text),
            }
        )
    return answers
