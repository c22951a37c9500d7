"""Continuations: what each stage writes after the same prompts, with the same seeds and decoding."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.generation.streamers import BaseStreamer

from eval.models import MAX_LENGTH
from prep.common import BadInput, read_text, read_yaml


def load_prompts(path: Path) -> list[dict[str, str]]:
    """The prompts of a YAML file, as {name, text}. An entry gives its `text`, or `tail_of` a file and how many `words`.

    A question is {name, question}, and `answer` where there is one (eval/questions.py).

    Raises BadInput when the file, or one it names, is missing, empty or no UTF-8 text, when an entry says something else, or
    when two have one name.
    """
    if not path.is_file():
        raise BadInput(f"no prompt file {path} (looked from {Path.cwd()})")
    entries = read_yaml(path)
    if not entries or not isinstance(entries, list):
        raise BadInput(f"{path} holds no prompts: a list of {{name, text}} is expected")
    prompts: list[dict[str, str]] = []
    for entry in entries:
        given = dict(entry) if isinstance(entry, dict) else {}
        if isinstance(given.get("words"), int) and "tail_of" in given:
            source = Path(str(given["tail_of"]))
            if not source.is_file():
                raise BadInput(
                    f"prompt {given.get('name')}: {source} is missing (looked from {Path.cwd()}); prepare it"
                )
            given["text"] = tail(read_text(source), given["words"])
        wanted = ("name", "question", "answer") if "question" in given else ("name", "text")
        prompt = {key: given[key] for key in wanted if key in given}
        texts = [value for value in prompt.values() if isinstance(value, str) and value.strip()]
        if not {"name", wanted[1]} <= set(prompt) or len(texts) < len(prompt):
            raise BadInput(
                f"{path}: a prompt has a name and a text, a question (and an answer), or tail_of and words, numbers in quotes; "
                f"this one has not: {entry}"
            )
        if prompt["name"] in {other["name"] for other in prompts}:  # a sample has no more than the name of its prompt
            raise BadInput(f"{path}: two prompts have the name {prompt['name']}")
        prompts.append(prompt)
    return prompts


def tail(text: str, words: int) -> str:
    """The last paragraphs of a text that make up at least `words` words, whole, or those last words of a longer one."""
    paragraphs = text.strip().split("\n\n")
    taken: list[str] = []
    while paragraphs and sum(len(paragraph.split()) for paragraph in taken) < words:
        taken.insert(0, paragraphs.pop())
    result = "\n\n".join(taken)
    if len(result.split()) > 2 * words:  # one long paragraph: cut it at a word
        result = " ".join(result.split(" ")[-words:])
    return result


DECODING: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 0,  # none: Transformers' own default of 50 would cut in unasked
    "repetition_penalty": 1.1,
}


def decoding(max_new_tokens: int) -> dict[str, Any]:
    """The decoding parameters, as they go into the report and into `generate`."""
    return DECODING | {"max_new_tokens": max_new_tokens}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, after BOS."""
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def fitting(tokenizer: Tokenizer, prompt: str, new: int) -> list[int]:
    """The tokens of a prompt. Raises BadInput when there is no room in the context for `new` more."""
    ids = encode(tokenizer, prompt)
    if len(ids) + new > MAX_LENGTH:
        raise BadInput(
            f"the prompt {prompt[:40]!r} has {len(ids)} tokens; with {new} new ones that is more "
            f"than the {MAX_LENGTH} the models were trained on: shorten it, or lower --max-new-tokens"
        )
    return ids


def generate(model: Any, tokenizer: Tokenizer, settings: dict[str, Any], **inputs: Any) -> Any:
    """Transformers' `generate` under these settings alone: the model's own would fill every setting that is not given."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GenerationConfig(pad_token_id=tokenizer.eos_token_id, return_dict_in_generate=True, **ends, **settings)
    model.generation_config = config
    with torch.inference_mode():
        return model.generate(generation_config=config, **inputs)


@dataclass(frozen=True)
class Sample:
    """What was drawn after some tokens."""

    text: str
    tokens: list[int]  # without the EOS that ends them
    ended: bool  # by the model itself
    log_probabilities: list[float]  # natural, of each token, whatever temperature and top-p; none unless asked for


def draw(
    model: Any,
    tokenizer: Tokenizer,
    ids: list[int],
    count: int,
    seed: int,
    parameters: dict[str, Any],
    open_ended: bool = False,
    seen: DynamicCache | None = None,
    streamer: BaseStreamer | None = None,
) -> list[Sample]:
    """`count` samples of what follows `ids`, drawn together from one seed.

    One batch is one prompt, so nothing is padded: the repetition penalty would count padding as text already written.
    `open_ended`: EOS is never drawn, the repetition penalty does not count `ids`, and log-probabilities are kept. `seen` is
    what the model has computed of `ids[:-1]`, a batch of one. A `streamer` gets each token of a single sample.
    """
    settings = parameters | {"do_sample": True, "output_logits": open_ended}
    settings["min_new_tokens"] = settings["max_new_tokens"] if open_ended else None
    ignored = len(ids) if open_ended else 0
    penalty = RepetitionPenaltyLogitsProcessor(settings.pop("repetition_penalty"), prompt_ignore_length=ignored)
    inputs = torch.tensor([ids], device=model.device).expand(count, -1)
    cache = copy.deepcopy(seen)  # writing makes it grow
    if cache is not None:
        cache.batch_repeat_interleave(count)
    torch.manual_seed(seed)
    output = generate(
        model,
        tokenizer,
        settings,
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        past_key_values=cache,
        logits_processor=LogitsProcessorList([penalty]),
        streamer=streamer,
    )
    drawn = output.sequences[:, len(ids) :]
    chances = [
        logits.float().log_softmax(-1).gather(1, drawn[:, i : i + 1])[:, 0].tolist()
        for i, logits in enumerate(output.logits or ())
    ]
    before = len(str(tokenizer.decode(ids, skip_special_tokens=True)))
    samples = []
    for row, sequence in enumerate(drawn.tolist()):
        ended = tokenizer.eos_token_id in sequence
        tokens = sequence[: sequence.index(tokenizer.eos_token_id)] if ended else sequence
        # Decoded together with the prompt, since some tokenizers drop a space at the start of a text.
        text = str(tokenizer.decode(ids + tokens, skip_special_tokens=True))[before:]
        samples.append(Sample(text, tokens, ended, [step[row] for step in chances]))
    return samples


def continuations(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    seed: int,
    parameters: dict[str, Any],
    streamer: BaseStreamer | None = None,
) -> list[dict[str, Any]]:
    """`count` continuations of one prompt as {text, tokens, ended}. Raises BadInput when they exceed the context."""
    ids = fitting(tokenizer, prompt, parameters["max_new_tokens"])
    samples = draw(model, tokenizer, ids, count, seed, parameters, streamer=streamer)
    return [{"text": sample.text, "tokens": len(sample.tokens), "ended": sample.ended} for sample in samples]
