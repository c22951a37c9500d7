"""Continuations: what each stage writes after the same prompts, with the same seeds and decoding."""

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from eval.scoring import MAX_LENGTH
from prep.common import BadInput


def load_prompts(path: Path) -> list[dict[str, str]]:
    """The prompts of a YAML file, as {name, text}. An entry gives its `text`, or `tail_of` a file and how many `words`.

    Raises BadInput when the file, or one it names, is missing or empty, or when an entry says neither.
    """
    if not path.is_file():
        raise BadInput(f"no prompt file {path} (looked from {Path.cwd()})")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not valid YAML: {error}") from error
    prompts = []
    for entry in entries if isinstance(entries, list) else []:
        if "tail_of" in entry:
            source = Path(entry["tail_of"])
            if not source.is_file():
                raise BadInput(f"prompt {entry['name']}: {source} is missing (looked from {Path.cwd()}); prepare it")
            text = tail(source.read_text(encoding="utf-8"), entry["words"])
        else:
            text = entry.get("text", "")
        if not text.strip() or not entry.get("name"):
            raise BadInput(
                f"{path}: every prompt has a name and a text (or tail_of and words); this one lacks it: {entry}"
            )
        prompts.append({"name": entry["name"], "text": text})
    if not prompts:
        raise BadInput(f"{path} holds no prompts: a list of {{name, text}} is expected")
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


def decoding(max_new_tokens: int) -> dict[str, Any]:
    """The decoding parameters, as they go into the report and into `generate`."""
    return {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 0,  # none: Transformers' own default of 50 would cut in unasked
        "repetition_penalty": 1.1,
        "max_new_tokens": max_new_tokens,
    }


def continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    count: int,
    seed: int,
    parameters: dict[str, Any],
    streamer: BaseStreamer | None = None,
) -> list[dict[str, Any]]:
    """`count` continuations of one prompt by a model, drawn together from one seed, as {text, tokens, ended}.

    One batch is one prompt, so nothing is padded: the repetition penalty would count padding as text already written.
    `ended` says that the model closed the text itself. A `streamer` is handed each token of a single continuation as it
    is drawn. Raises BadInput when prompt and continuation exceed the context.
    """
    ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    if len(ids) + parameters["max_new_tokens"] > MAX_LENGTH:
        raise BadInput(
            f"the prompt {prompt[:40]!r} has {len(ids)} tokens; with {parameters['max_new_tokens']} new ones that is more "
            f"than the {MAX_LENGTH} the models were trained on: shorten it, or lower --max-new-tokens"
        )
    # The model's own generation settings fill whatever is left unsaid, so they are replaced, not only overridden.
    settings = GenerationConfig(
        do_sample=True,
        num_return_sequences=count,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **parameters,
    )
    model.generation_config = settings
    torch.manual_seed(seed)
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=settings, streamer=streamer
        )
    written = str(tokenizer.decode(ids, skip_special_tokens=True))
    results = []
    for sequence in output[:, len(ids) :].tolist():
        ended = tokenizer.eos_token_id in sequence
        if ended:
            sequence = sequence[: sequence.index(tokenizer.eos_token_id)]
        # Decoded together with the prompt, since some tokenizers drop a space at the start of a text.
        text = str(tokenizer.decode(ids + sequence, skip_special_tokens=True))[len(written) :]
        results.append({"text": text, "tokens": len(sequence), "ended": ended})
    return results
