"""The novel goes on: a stage writes on from the last pages of the book, as many words as asked.

It writes passage by passage. For each, the model sees a window of the text so far: the most recent paragraphs, whole,
as many as fit; with --keep WORDS, before them the first paragraphs of what it started from, for the names and the voice
that the window has left behind. Several candidates are drawn together and each is cut at its last sentence. Those that
break a rule are put aside: no sentence ends in it, it is short, it loops, or it shares more than --longest-copy words in
a row with the training text or with what is already written. Of the others, the one that the model itself finds most
likely, a token on average, is kept. If all break a rule, others are drawn, at most three times; then the one that breaks
fewest is kept, and the record says so.

Writes <out>/<stage>-<seed>-<hash>.txt, .epub, and .json, the record: model and hashes, seed, parameters, and of every
passage all candidates' scores. The hash is that of everything the text depends on, so the same command finds its own
record: interrupted, it goes on where it was, to the same text; with more --words, it prolongs it.
The text stands on the screen passage by passage, as soon as each is chosen.

    python eval/continuation.py --words 800
    python eval/continuation.py --stage 2a --from "K. ouvrit la porte." --words 300 --candidates 8
    cd demo/run && python ../../eval/continuation.py --recipes ../../recipes --words 200
"""

import argparse
import bisect
import copy
import html
import json
import os
import re
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything read is a local file
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import mkepub
import torch
from tqdm import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from eval import evaluation, generation, metrics, models
from eval.metrics import SENTENCE_END
from eval.scoring import MAX_LENGTH
from prep.common import BadInput, atomic_write, digest, run, sha256
from prep.typography import to_convention
from train.stages import Stage, load_chain

TEXT_VERSION = 1  # raise it when the same seed gives another text: a text of another version is not continued
ATTEMPTS = 3  # batches of candidates for one passage
SHORT = 1 / 3  # of the tokens drawn: fewer left by the cut at a sentence, and their mean likelihood says little
LEAST_CONTEXT = 64  # tokens of text that a window must have room for
CHAPTER = 2_000  # words, about: a chapter ends with the paragraph that reaches them


@dataclass(frozen=True)
class Settings:
    """What, beside the model and the beginning, decides the text."""

    seed: int = 42
    candidates: int = 4
    passage_tokens: int = 160  # drawn for each candidate, before it is cut at a sentence
    window: int = MAX_LENGTH  # tokens, the passage included
    keep: int = 0  # words of the beginning that stay at the head of the window
    longest_copy: int = 12  # words in a row; two novels of one author share 6 to 10


@dataclass(frozen=True)
class Drawn:
    """A candidate: its text as it would be appended, and what speaks for and against it."""

    text: str
    tokens: int  # those of the text
    log_probability: (
        float  # natural, a token, mean; of the model itself, whatever temperature and top-p it was drawn at
    )
    copied: int | None  # longest run of words that stands in the training text; None when there is none to compare with
    repeated: int  # longest run of words that stands in what is already written
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """A passage written: what was chosen, and out of what."""

    chosen: Drawn
    attempts: int  # batches drawn
    seed: int  # of the batch that the chosen one is of
    context_tokens: int  # what the model saw before it, BOS included
    candidates: list[dict[str, Any]]  # of all batches: log_probability, words, faults


# --- text -------------------------------------------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, in order, without blank ones."""
    return [part.strip() for part in re.split(r"\n\s*", text) if part.strip()]


def cut(text: str) -> str:
    """The text up to the end of its last sentence; empty when none ends."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def tidy(text: str, before: str) -> str:
    """A candidate as it is appended to `before`: blank lines between paragraphs, a space between sentences, no end."""
    text = re.sub(r" *\n\s*", "\n\n", text).rstrip()
    return f" {text}" if re.search(r"[.!?…»]$", before) and text[:1].isalpha() else text


def head(text: str, words: int) -> str:
    """The first paragraphs of a text that make up at least `words` words, whole; empty for 0."""
    taken: list[str] = []
    for paragraph in paragraphs(text):
        if sum(len(part.split()) for part in taken) >= words:
            break
        taken.append(paragraph)
    return "\n\n".join(taken)


def window(text: str, opening: str, room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens the model sees, BOS first, at most `room`: all of the text, or the opening and its last paragraphs.

    A last paragraph that does not fit alone is seen from one of its words on. Raises BadInput when the opening leaves no room.
    """

    def encode(part: str) -> list[int]:
        return [tokenizer.bos_token_id, *tokenizer.encode(part, add_special_tokens=False)]

    # Nothing further back can fit: a token is seldom longer than 16 characters, and a text may be a whole book.
    recent = text if len(text) <= 16 * room else text[-16 * room :]
    if recent is text and len(ids := encode(text)) <= room:
        return ids
    before = f"{opening}\n\n" if opening else ""
    if room - len(encode(before)) < LEAST_CONTEXT:
        raise BadInput(
            f"the opening has {len(encode(before))} tokens, and only {room} fit before a passage: lower --keep or --passage-tokens"
        )
    starts = [0, *(match.end() for match in re.finditer(r"\n\n", recent))]
    if len(encode(before + recent[starts[-1] :])) > room:
        starts += [match.end() for match in re.finditer(r" +", recent) if match.end() > starts[-1]]
    # Longer text, more tokens: the first start that fits is found by halving.
    first = bisect.bisect_left(starts, True, key=lambda start: len(encode(before + recent[start:])) <= room)
    if first == len(starts):
        raise BadInput(f"the last word of the text has more than the {room} tokens that fit before a passage")
    return encode(before + recent[starts[first] :])


# --- writing ----------------------------------------------------------------------------------------------------------


def read(model: Any, ids: list[int]) -> DynamicCache | None:
    """What the model keeps of a window but its last token: once through, for all candidates of a passage."""
    if len(ids) < 2:
        return None
    with torch.inference_mode():
        inputs = torch.tensor([ids[:-1]], device=model.device)
        return model(input_ids=inputs, use_cache=True, logits_to_keep=1).past_key_values


def draw(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    seen: DynamicCache | None,
    seed: int,
    settings: Settings,
) -> list[tuple[str, list[int], list[float]]]:
    """Candidates for one passage after `ids`, which `read` has `seen`, drawn together: text, its token ids, each one's
    natural log-probability.

    Temperature and top-p are those of the report's samples; the repetition penalty counts the passage only, since over a
    window of 2,000 tokens it would weigh on every common word. The end of the text is never drawn: the novel goes on.
    """
    parameters = generation.decoding(settings.passage_tokens)
    penalty = parameters.pop("repetition_penalty")
    config = GenerationConfig(
        do_sample=True,
        min_new_tokens=settings.passage_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
        **parameters,
    )
    model.generation_config = config
    inputs = torch.tensor([ids], device=model.device)
    torch.manual_seed(seed)
    with torch.inference_mode():
        cache = copy.deepcopy(seen)  # writing makes it grow
        if cache is not None:
            cache.batch_repeat_interleave(settings.candidates)
        inputs = inputs.expand(settings.candidates, -1)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=cache,
            generation_config=config,
            logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty, len(ids))]),
        )
        written = output.sequences[:, len(ids) :]
        chances = torch.stack(
            [
                logits.float().log_softmax(-1).gather(1, written[:, i : i + 1])[:, 0]
                for i, logits in enumerate(output.logits)
            ],
            dim=1,
        )
    before = len(str(tokenizer.decode(ids, skip_special_tokens=True)))
    results = []
    for sequence, logprobs in zip(written.tolist(), chances.tolist(), strict=True):
        # Decoded together with the window, since some tokenizers drop a space at the start of a text.
        text = str(tokenizer.decode(ids + sequence, skip_special_tokens=True))[before:]
        results.append((text, sequence, logprobs))
    return results


def judged(
    text: str,
    sequence: list[int],
    logprobs: list[float],
    before: str,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    trained_on: metrics.CopyFinder | None,
    written: metrics.CopyFinder,
    settings: Settings,
) -> Drawn:
    """Cut a candidate at its last sentence, score what is left, and note the rules it breaks."""
    faults = []
    kept = cut(text)
    if not kept.strip():
        faults.append("no sentence ends")
        kept = text[: text.rfind(" ")] if " " in text.strip() else text
    start = len(str(tokenizer.decode(ids, skip_special_tokens=True)))
    tokens = bisect.bisect_left(
        range(1, len(sequence) + 1),
        len(kept),
        key=lambda count: len(str(tokenizer.decode(ids + sequence[:count], skip_special_tokens=True))) - start,
    )
    tokens = min(tokens + 1, len(sequence))
    if tokens < SHORT * len(sequence):
        faults.append("short")
    if metrics.loops(kept):
        faults.append("loops")
    copied = trained_on.longest(kept)["words"] if trained_on else None
    if copied and copied > settings.longest_copy:
        faults.append("copies")
    repeated = written.longest(kept)["words"]
    if repeated > settings.longest_copy:
        faults.append("repeats what is written")
    likelihood = sum(logprobs[:tokens]) / tokens
    return Drawn(tidy(kept, before), tokens, likelihood, copied, repeated, tuple(faults))


def best(candidates: list[Drawn]) -> Drawn:
    """The candidate that breaks fewest rules; of those, the likeliest to the model, a token."""
    return min(candidates, key=lambda drawn: (not drawn.text.strip(), len(drawn.faults), -drawn.log_probability))


def passages(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    beginning: str,
    settings: Settings,
    trained_on: metrics.CopyFinder | None = None,
    written: Sequence[str] = (),
) -> Iterator[Passage]:
    """Passages that go on from `beginning`, without end: take as many as wanted.

    `written` are those that follow it already. A passage depends on the text before it, the settings and its number
    alone, so what follows is what would have followed in one go. The text so far is
    `beginning.rstrip() + "".join(passage texts)`. Raises BadInput when the window does not do, or nothing can be written.

        for passage in itertools.islice(passages(model, tokenizer, "K. ouvrit la porte.", Settings()), 3):
            print(passage.chosen.text, end="")
    """
    room = settings.window - settings.passage_tokens
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", settings.window)
    if settings.window > limit or room < LEAST_CONTEXT:
        raise BadInput(
            f"a window of {settings.window} tokens, {settings.passage_tokens} of them for the passage, does not do: the "
            f"model has {limit} positions, and {LEAST_CONTEXT} tokens of context are the least; change --window or "
            "--passage-tokens"
        )
    opening = head(beginning, settings.keep)
    text = beginning.rstrip() + "".join(written)
    already = metrics.CopyFinder([])
    already.append(text)
    number = len(written)
    while True:
        ids = window(text, opening, room, tokenizer)
        seen = read(model, ids)
        every: list[tuple[int, Drawn]] = []
        for attempt in range(ATTEMPTS):
            seed = settings.seed + 1_000_003 * (ATTEMPTS * number + attempt)  # a seed of its own for every batch
            every += [
                (seed, judged(*drawn, text, ids, tokenizer, trained_on, already, settings))
                for drawn in draw(model, tokenizer, ids, seen, seed, settings)
            ]
            chosen = best([drawn for _, drawn in every])
            if not chosen.faults:
                break
        if not chosen.text.strip():
            raise BadInput(f"the model writes nothing after {text[-60:]!r}; begin elsewhere, or with another --seed")
        yield Passage(
            chosen,
            attempt + 1,
            next(seed for seed, drawn in every if drawn is chosen),
            len(ids),
            [
                {"log_probability": drawn.log_probability, "words": len(drawn.text.split()), "faults": drawn.faults}
                for _, drawn in every
            ],
        )
        text += chosen.text
        already.append(chosen.text)
        number += 1


# --- files ------------------------------------------------------------------------------------------------------------


def chapters(text: str, words: int) -> list[list[str]]:
    """The paragraphs of a text in chapters: one ends with the paragraph that reaches `words`; a short rest joins the last."""
    result: list[list[str]] = [[]]
    for paragraph in paragraphs(text):
        if sum(len(part.split()) for part in result[-1]) >= words:
            result.append([])
        result[-1].append(paragraph)
    if len(result) > 1 and sum(len(part.split()) for part in result[-1]) < words / 4:
        rest = result.pop()
        result[-1] += rest
    return result


def write_epub(path: Path, title: str, note: str, text: str, words: int = CHAPTER) -> None:
    """The text as an EPUB 3: chapters with numbers, the note on a page of its own at the end."""
    book = mkepub.Book(title, lang="fr")
    book.uuid = uuid.uuid5(uuid.NAMESPACE_URL, text)  # the same book for the same text
    book.set_stylesheet("p { margin: 0; text-indent: 1.2em; text-align: justify } h1 { text-align: center }")

    def page(name: str, parts: list[str], language: str) -> None:
        body = "".join(f"<p>{html.escape(part)}</p>" for part in parts)
        book.add_page(name, f'<section lang="{language}" xml:lang="{language}"><h1>{name}</h1>{body}</section>')

    for number, parts in enumerate(chapters(text, words), 1):
        page(str(number), parts, "fr")
    page("How this was written", [note], "en")
    with tempfile.TemporaryDirectory() as folder:
        book.save(Path(folder) / "book.epub")
        content = (Path(folder) / "book.epub").read_bytes()
    with atomic_write(path, "wb") as file:
        file.write(content)


def beginning_of(source: str | None, book: Path) -> tuple[str, str]:
    """What to go on from, and its name: the book, a file, or the words themselves, in the typographic convention.

    Raises BadInput when the file is missing, empty or no UTF-8 text.
    """
    path = book if source is None else Path(source)
    is_file = len(str(path)) < 255 and path.is_file()
    if source is not None and not is_file and not re.fullmatch(r"\S+\.\w{1,5}", source):
        if not source.strip():
            raise BadInput("--from is empty: give a file, or a sentence")
        return "\n\n".join(paragraphs(to_convention(source))), "words given"
    if not is_file:
        what = (
            "prepare the book (make prep-c), or say what to go on from: --from"
            if source is None
            else "name a text file"
        )
        raise BadInput(f"{path} is missing (looked from {Path.cwd()}): {what}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise BadInput(f"{path} is empty: there is nothing to go on from")
    return "\n\n".join(paragraphs(to_convention(text))), str(path)


def book_of(chain: list[Stage]) -> Path:
    """The prepared book: beside the rows of the chain's last stage, as text."""
    return chain[-1].datasets[0].with_suffix(".txt")


def read_record(path: Path, inputs: str) -> dict[str, Any] | None:
    """The record of the same text begun before; None when there is none. Raises BadInput when it is damaged."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = record["inputs"] == inputs and all(passage["chosen"]["text"] for passage in record["passages"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error!r}); remove it, or begin anew with --fresh") from error
    if not whole:
        raise BadInput(f"{path} is of another text; remove it, or begin anew with --fresh")
    return record


def parse() -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="folder of the chain's YAML")
    parser.add_argument("--stage", help="who writes: base, 2a, ... (default: the chain's last)")
    parser.add_argument(
        "--from", dest="source", metavar="FILE|WORDS", help="go on from this (default: the prepared book)"
    )
    parser.add_argument("--words", type=int, default=800, help="how many, at least (default 800)")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--candidates", type=int, default=default.candidates, help="drawn a passage (default 4)")
    parser.add_argument(
        "--passage-tokens", type=int, default=default.passage_tokens, help="of a candidate (default 160)"
    )
    parser.add_argument("--window", type=int, default=default.window, help="tokens the model sees (default 2048)")
    parser.add_argument(
        "--keep",
        type=int,
        default=default.keep,
        metavar="WORDS",
        help="of the beginning, kept in the window (default 0)",
    )
    parser.add_argument(
        "--longest-copy", type=int, default=default.longest_copy, help="words in a row that may be shared (default 12)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/continuation"), help="folder of what is written")
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--dtype", choices=models.DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever has been written")
    args = parser.parse_args()
    for name in ("words", "candidates", "passage_tokens", "window", "longest_copy"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.keep < 0 or args.seed < 0:
        parser.error("--keep and --seed must not be below 0")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def main() -> None:
    args = parse()
    started = time.perf_counter()
    warnings.filterwarnings("ignore")
    chain = load_chain(args.recipes)
    rows = models.candidates(chain)
    row = models.present(rows, [args.stage or chain[-1].name])[0]
    book = book_of(chain)
    beginning, source = beginning_of(args.source, book)
    trained_on = metrics.CopyFinder([book.read_text(encoding="utf-8")]) if book.is_file() else None
    if trained_on is None:
        print(f"{book} is missing: copies are not looked for", file=sys.stderr)
    settings = Settings(args.seed, args.candidates, args.passage_tokens, args.window, args.keep, args.longest_copy)

    hashes = {str(path): sha256(path) for path in evaluation.files_of(row)}
    where = evaluation.environment(args.device, args.dtype)
    about = {
        "stage": row.name,
        "weights": hashes,
        "beginning": {"source": source, "words": len(beginning.split()), "sha256": digest(beginning)},
        "not_copied_from": {"path": str(book), "sha256": sha256(book)} if trained_on else None,
        "settings": asdict(settings),
        "decoding": generation.decoding(args.passage_tokens),
        "environment": where,
        "version": TEXT_VERSION,
    }
    # Neither the commit nor the number of threads: the first says nothing of the text, the second very little.
    decisive = {
        **about,
        "weights": sorted(hashes.values()),
        "environment": [args.device, args.dtype, where["versions"]],
    }
    inputs = digest(decisive)
    target = args.out / f"{row.name}-{args.seed}-{inputs[:8]}.json"
    record = None if args.fresh else read_record(target, inputs)
    done: list[dict[str, Any]] = record["passages"] if record else []
    seconds = record["seconds"] if record else 0.0

    def written() -> list[str]:
        return [passage["chosen"]["text"] for passage in done]

    def words() -> int:
        return len("".join(written()).split())

    def faulty() -> int:
        return sum(bool(passage["chosen"]["faults"]) for passage in done)

    def write() -> str:
        text = "".join(written()).strip() + "\n"
        result = {
            "format": 1,
            "inputs": inputs,
            **about,
            "words": words(),
            "sha256": digest(text),
            "passages_with_faults": faulty(),
            "seconds": round(seconds + time.perf_counter() - started, 1),
            "passages": done,
        }
        with atomic_write(target) as file:
            json.dump(result, file, ensure_ascii=False, indent=1)
            file.write("\n")
        with atomic_write(target.with_suffix(".txt")) as file:
            file.write(text)
        return text

    print(f"[{source}] ... {beginning[-300:].partition(' ')[2] or beginning}", end="", flush=True)
    print("".join(written()), end="", flush=True)
    if words() < args.words:
        _, model, tokenizer = next(models.loaded([row], args.device, models.DTYPES[args.dtype]))
        tokens, room = len(tokenizer.encode(beginning, add_special_tokens=False)) + 1, args.window - args.passage_tokens
        if args.source and tokens > room:
            print(f"\n{source} has {tokens} tokens, {room} fit: the model sees its last pages only", file=sys.stderr)
        with tqdm(
            total=args.words, initial=words(), unit="word", desc=row.name, disable=not sys.stderr.isatty()
        ) as bar:
            for passage in passages(model, tokenizer, beginning, settings, trained_on, written()):
                print(passage.chosen.text, end="", flush=True)
                done.append(asdict(passage))
                write()  # after each, so that an interrupted run goes on where it was
                bar.update(words() - bar.n)
                if words() >= args.words:
                    break
    text = write()
    note = (
        f"Written by a language model, stage {row.name} of a chain of recipes, seed {args.seed}, going on from {source}. "
        f"{len(done)} passages, each the best of {args.candidates} or more. Record: {target.name}."
    )
    write_epub(target.with_suffix(".epub"), "La suite", note, text)
    drawn = sum(len(passage["candidates"]) for passage in done) * args.passage_tokens
    spent = seconds + time.perf_counter() - started
    print(
        f"\n\n{words()} words in {len(done)} passages, {faulty()} of which break a rule: {target.with_suffix('')}.txt, .epub, "
        f".json\n{spent:.0f} s, {drawn / spent:.0f} tokens drawn a second, {words() / spent:.1f} words kept"
    )


if __name__ == "__main__":
    run(main)
