"""Continue the novel: a stage writes on from the last pages of the book, as many words as asked.

It writes in chunks. For each, the model sees as many of the most recent paragraphs as fit into its window; with --keep
WORDS, also the first paragraphs, for the names and the voice. Several candidates are drawn together, each is cut at its last
sentence, and those with a fault are set aside: no sentence ends, short, loops, shares more than --longest-copy words in a row
with the training text or with what is already written. Of the others the one that the model finds likeliest, per token, is
kept. If all have a fault, others are drawn, three batches at most; then the one with fewest is kept, and the record says so.

Writes <out>/<stage>-<seed>-<hash>.txt, .epub, and .json, the record: model and hashes, seed, parameters, and all candidates'
scores. The hash is of everything the text depends on, so the same command finds its own record: an interrupted text continues
as it would have, and more --words prolong it.

    python eval/continuation.py --words 800
    python eval/continuation.py --stage 2a --from "K. ouvrit la porte." --words 300 --candidates 8
    python eval/continuation.py --stage outputs/export/2c/2c-Q4_K_M.gguf     # with llama.cpp, faster on a CPU
    cd demo/run && python ../../eval/continuation.py --recipes ../../recipes --words 200
"""

from prep.command import run

import argparse
import bisect
import html
import itertools
import os
import re
import sys
import tempfile
import time
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mkepub
import torch
from tqdm import tqdm

from eval import generation, metrics, models
from eval.generation import DynamicCache, Tokenizer
from eval.metrics import SENTENCE_END
from eval.models import MAX_LENGTH
from prep.common import (
    BadInput,
    atomic_write,
    digest,
    lock,
    positive,
    read_json,
    read_text,
    sha256,
    write_json,
    write_text,
)
from prep.typography import to_convention
from train.stages import load_chain

TEXT_VERSION = 1  # raise it when the same seed gives another text: a text of another version is not continued
ATTEMPTS = 3  # batches of candidates for one chunk
SHORT = 1 / 3  # of the tokens drawn: fewer left by the cut at a sentence, and their mean likelihood says little
LEAST_CONTEXT = 64  # tokens of text that a window must have room for
NOT_IN_XML = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # a token of one byte may be one of these
CHAPTER = 2_000  # words, about: a chapter ends with the paragraph that reaches them


@dataclass(frozen=True)
class Settings:
    """What, beside the model and the beginning, decides the text."""

    seed: int = 42
    candidates: int = 4
    chunk_tokens: int = 160  # drawn for each candidate, before it is cut at a sentence
    window: int = MAX_LENGTH  # tokens, the chunk included
    keep: int = 0  # words of the beginning that stay at the head of the window
    longest_copy: int = metrics.LONGEST_COPY


@dataclass(frozen=True)
class Drawn:
    """A candidate: its text as it would be appended, and what speaks for and against it."""

    text: str
    tokens: int  # those of the text
    log_probability: float  # of the model itself, natural, mean over the tokens
    copied: int | None  # longest run of words that is in the training text; None when there is none to compare with
    repeated: int  # longest run of words that is in what is already written
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """A chunk written: what was chosen, and out of what."""

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
    return text[: max((match.end() for match in SENTENCE_END.finditer(text)), default=0)]


def tidy(text: str, before: str) -> str:
    """A candidate as it is appended to `before`: blank lines between paragraphs, a space between sentences, no end."""
    text = re.sub(r" *\n\s*", "\n\n", text).rstrip()
    return f" {text}" if re.search(r"[.!?…»]$", before) and text[:1].isalpha() else text


def chapters(text: str, words: int) -> list[list[str]]:
    """The paragraphs of a text in chapters: one ends with the paragraph that reaches `words`; a short rest joins the last."""
    result: list[list[str]] = []
    size = words
    for paragraph in paragraphs(text):
        if size >= words:
            result.append([])
            size = 0
        result[-1].append(paragraph)
        size += len(paragraph.split())
    if len(result) > 1 and size < words / 4:
        rest = result.pop()
        result[-1] += rest
    return result


def head(text: str, words: int) -> str:
    """The first paragraphs of a text that make up at least `words` words, whole; empty for 0."""
    parts = paragraphs(text)
    sizes = list(itertools.accumulate(len(part.split()) for part in parts))
    return "\n\n".join(parts[: bisect.bisect_left(sizes, words) + 1]) if words else ""


def window(text: str, opening: str, room: int, tokenizer: Tokenizer) -> list[int]:
    """The tokens the model sees, BOS first, at most `room`: all of the text, or the opening and its last paragraphs.

    A last paragraph that does not fit alone is seen from one of its words on. Raises BadInput when the opening leaves no room.
    """

    def fits(part: str) -> bool:
        return len(generation.encode(tokenizer, part)) <= room

    # Nothing further back can fit: a token is seldom longer than 16 characters, and a text may be a whole book.
    recent = text[-16 * room :]
    if recent == text and fits(text):
        return generation.encode(tokenizer, text)
    before = f"{opening}\n\n" if opening else ""
    used = len(generation.encode(tokenizer, before))
    if room - used < LEAST_CONTEXT:
        raise BadInput(
            f"the opening has {used} tokens, and only {room} fit before a chunk: lower --keep or --chunk-tokens"
        )
    starts = [0, *(match.end() for match in re.finditer(r"\n\n", recent))]
    if not fits(before + recent[starts[-1] :]):
        starts += [match.end() for match in re.finditer(r" +", recent) if match.end() > starts[-1]]
    # Longer text, more tokens: the first start that fits is found by halving.
    first = bisect.bisect_left(starts, True, key=lambda start: fits(before + recent[start:]))
    if first == len(starts):
        raise BadInput(f"the last word of the text has more than the {room} tokens that fit before a chunk")
    return generation.encode(tokenizer, before + recent[starts[first] :])


# --- writing ----------------------------------------------------------------------------------------------------------


def read(model: Any, ids: list[int]) -> DynamicCache:
    """What the model keeps of a window but its last token: once through, for all candidates of a chunk."""
    with torch.inference_mode():
        inputs = torch.tensor([ids[:-1]], device=model.device)
        return model(input_ids=inputs, use_cache=True, logits_to_keep=1).past_key_values


def judged(
    sample: generation.Sample,
    before: str,
    ids: list[int],
    tokenizer: Tokenizer,
    trained_on: metrics.CopyFinder | None,
    written: metrics.CopyFinder,
    settings: Settings,
) -> Drawn:
    """Cut a candidate at its last sentence, score what is left, and note the rules it breaks."""

    def decoded(count: int) -> int:
        return len(str(tokenizer.decode(ids + sample.tokens[:count], skip_special_tokens=True)))

    faults = []
    kept = cut(sample.text)
    if not kept.strip():
        faults.append("no sentence ends")
        kept = sample.text[: sample.text.rfind(" ")] if " " in sample.text.strip() else sample.text
    counts = range(1, len(sample.tokens) + 1)
    tokens = min(bisect.bisect_left(counts, decoded(0) + len(kept), key=decoded) + 1, len(sample.tokens))
    if tokens < SHORT * len(sample.tokens):
        faults.append("short")
    if metrics.loops(kept):
        faults.append("loops")
    copied = trained_on.longest(kept)["words"] if trained_on else None
    if copied and copied > settings.longest_copy:
        faults.append("copies")
    repeated = written.longest(kept)["words"]
    if repeated > settings.longest_copy:
        faults.append("repeats what is written")
    likelihood = sum(sample.log_probabilities[:tokens]) / tokens
    return Drawn(tidy(kept, before), tokens, likelihood, copied, repeated, tuple(faults))


def best(candidates: list[Drawn]) -> Drawn:
    """The candidate that breaks fewest rules; of those, the one with the highest mean log-probability per token."""
    return min(candidates, key=lambda drawn: (not drawn.text.strip(), len(drawn.faults), -drawn.log_probability))


def chunks(
    model: Any,
    tokenizer: Tokenizer,
    beginning: str,
    settings: Settings,
    trained_on: metrics.CopyFinder | None = None,
    written: Sequence[str] = (),
) -> Iterator[Chunk]:
    """Chunks that continue `beginning`, without end: take as many as wanted.

    `written` are those that follow it already. A chunk depends only on the text before it, the settings and its number, so
    an interrupted text continues as it would have. Raises BadInput when the window is too small or too large, or when
    nothing can be written.

        for chunk in itertools.islice(chunks(model, tokenizer, "K. ouvrit la porte.", Settings()), 3):
            print(chunk.chosen.text, end="")
    """
    room = settings.window - settings.chunk_tokens
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", settings.window)
    if settings.window > limit or room < LEAST_CONTEXT:
        raise BadInput(
            f"a window of {settings.window} tokens, {settings.chunk_tokens} of them for the chunk, does not do: the model "
            f"has {limit} positions, and needs {LEAST_CONTEXT} tokens of context; change --window or --chunk-tokens"
        )
    # The penalty counts the chunk only: over a window of 2,000 tokens it would weigh on every common word.
    decoding = generation.decoding(settings.chunk_tokens)
    opening = head(beginning, settings.keep)
    text = beginning.rstrip() + "".join(written)
    already = metrics.CopyFinder([])
    already.append(text)
    for number in itertools.count(len(written)):
        ids = window(text, opening, room, tokenizer)
        seen = read(model, ids)
        every: list[Drawn] = []
        seeds: list[int] = []
        for attempt in range(ATTEMPTS):
            seed = settings.seed + 1_000_003 * (ATTEMPTS * number + attempt)  # a seed of its own for every batch
            samples = generation.draw(model, tokenizer, ids, settings.candidates, seed, decoding, True, seen)
            every += [judged(sample, text, ids, tokenizer, trained_on, already, settings) for sample in samples]
            seeds += [seed] * len(samples)
            chosen = best(every)
            if not chosen.faults:
                break
        if not chosen.text.strip():
            raise BadInput(f"the model writes nothing after {text[-60:]!r}; begin elsewhere, or with another --seed")
        record = [
            {"log_probability": drawn.log_probability, "words": len(drawn.text.split()), "faults": drawn.faults}
            for drawn in every
        ]
        yield Chunk(chosen, attempt + 1, seeds[every.index(chosen)], len(ids), record)
        text += chosen.text
        already.append(chosen.text)


# --- files ------------------------------------------------------------------------------------------------------------


def write_epub(path: Path, title: str, note: str, text: str, words: int = CHAPTER) -> None:
    """The text as an EPUB 3: chapters with numbers, the note on a page of its own at the end."""
    book = mkepub.Book(title, lang="fr")
    book.uuid = uuid.uuid5(uuid.NAMESPACE_URL, text)  # the same book for the same text
    book.set_stylesheet("p { margin: 0; text-indent: 1.2em; text-align: justify } h1 { text-align: center }")

    def page(name: str, parts: list[str], language: str) -> None:
        body = "".join(f"<p>{html.escape(NOT_IN_XML.sub('', part))}</p>" for part in parts)
        book.add_page(name, f'<section lang="{language}" xml:lang="{language}"><h1>{name}</h1>{body}</section>')

    for number, parts in enumerate(chapters(text, words), 1):
        page(str(number), parts, "fr")
    page("How this was written", [note], "en")
    with tempfile.TemporaryDirectory() as folder, atomic_write(path, "wb") as file:
        book.save(Path(folder) / "book.epub")
        # mkepub writes the time, and its files in the folder's order: the same text has to be the same bytes.
        with (
            zipfile.ZipFile(Path(folder) / "book.epub") as made,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as epub,
        ):
            for name in sorted(made.namelist(), key=lambda name: (name != "mimetype", name)):
                content = re.sub(rb"\d{4}-\d\d-\d\dT[\d:]+Z", b"2000-01-01T00:00:00Z", made.read(name))
                stored = zipfile.ZIP_STORED if name == "mimetype" else None
                epub.writestr(zipfile.ZipInfo(name), content, stored)


def beginning_of(source: str | None, book: Path) -> tuple[str, str]:
    """The text to continue, and its name: the book, a file, or the words themselves, in the typographic convention.

    Raises BadInput when the file is missing, empty or no UTF-8 text.
    """
    if re.search("[\ud800-\udfff]", source or ""):  # in place of each byte that is no UTF-8
        raise BadInput("--from is not UTF-8: rename the file, or set the terminal to UTF-8")
    path = book if source is None else Path(source)
    is_file = os.path.isfile(path)  # false, too, of words that are too long for a name
    text, name = source or "", "words given"
    if is_file:
        text, name = read_text(path), str(path)
    elif source is None:
        raise BadInput(f"{path} is missing: prepare the book (make prep-c), or name a text to continue: --from")
    elif re.fullmatch(r"\S+\.\w{1,5}|.+\.[a-z]{2,5}", source):
        raise BadInput(f"{path} is missing (looked from {Path.cwd()}): name a text file")
    elif os.path.isdir(path):
        raise BadInput(f"{path} is a folder: name a text file")
    if not text.strip():
        raise BadInput(f"{path if is_file else '--from'} is empty: there is nothing to continue")
    return "\n\n".join(paragraphs(to_convention(text))), name


def read_chunks(path: Path, inputs: str) -> tuple[list[Chunk], float]:
    """The chunks of the same text begun before, and the seconds they took. Raises BadInput when they are damaged."""

    def pick(record: dict[str, Any]) -> tuple[str, list[Chunk], float]:
        chunks = [Chunk(**chunk | {"chosen": Drawn(**chunk["chosen"])}) for chunk in record["chunks"]]
        return record["inputs"], chunks, record["seconds"]

    if not path.is_file():
        return [], 0.0
    again = "remove it, or begin again with --fresh"
    known, chunks, seconds = read_json(path, again, pick)
    if known != inputs or not all(chunk.chosen.text for chunk in chunks):
        raise BadInput(f"{path} is not of this text; {again}")
    return chunks, seconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--stage", help="who writes: base, 2a, ..., or an exported .gguf file (default: the last that is trained)")
    option("--from", dest="source", metavar="FILE|WORDS", help="continue this (default: the prepared book)")
    option("--words", type=positive, default=800, help="how many, at least (default 800)")
    for name, kind, text in (
        ("candidates", positive, "drawn a chunk"),
        ("chunk_tokens", positive, "of a candidate"),
        ("window", positive, "tokens the model sees"),
        ("keep", int, "words of the beginning, kept in the window"),
        ("longest_copy", positive, "words in a row that may be shared"),
    ):
        default = getattr(Settings, name)
        option(
            f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=f"{text} (default {default})"
        )
    option("--out", type=Path, default=Path("outputs/continuation"), help="folder of what is written")
    option("--fresh", action="store_true", help="begin again, whatever has been written")
    args = models.parse(parser)
    if args.keep < 0:
        parser.error("--keep must not be below 0")
    return args


def main() -> None:
    args = parse()
    started = time.perf_counter()
    warnings.filterwarnings("ignore")
    chain = load_chain(args.recipes, args.curriculum)
    row = models.writer(chain, args.stage)
    args.device = "cpu" if row.form == models.GGUF else args.device
    last = [stage for stage in chain if not stage.config.get("rl")][-1]  # pairs are not the book
    book = last.datasets[0].with_suffix(".txt")  # beside its rows
    beginning, source = beginning_of(args.source, book)
    trained_on = metrics.CopyFinder([read_text(book)]) if book.is_file() else None
    if trained_on is None:
        print(f"{book} is missing: copies are not looked for", file=sys.stderr)
    settings = Settings(args.seed, args.candidates, args.chunk_tokens, args.window, args.keep, args.longest_copy)

    hashes = {str(path): sha256(path) for path in models.files_of(row)}
    where = models.environment(args.device, args.dtype, *(["cyllama"] if row.form == models.GGUF else []))
    about = {
        "stage": row.name,
        "weights": hashes,
        "beginning": {"source": source, "words": len(beginning.split()), "sha256": digest(beginning)},
        "not_copied_from": {"path": str(book), "sha256": sha256(book)} if trained_on else None,
        "settings": asdict(settings),
        "decoding": generation.decoding(args.chunk_tokens),
        "environment": where,
        "version": TEXT_VERSION,
    }
    # Neither the commit nor the number of threads: the first says nothing of the text, the second very little.
    decisive = {"weights": sorted(hashes.values()), "environment": [args.device, args.dtype, where["versions"]]}
    inputs = digest(about | decisive)
    target = args.out / f"{row.name}-{args.seed}-{inputs[:8]}.json"
    lock(target)
    done, seconds = ([], 0.0) if args.fresh else read_chunks(target, inputs)

    def text() -> str:
        return "".join(chunk.chosen.text for chunk in done)

    def words() -> int:
        return len(text().split())

    def write() -> dict[str, Any]:
        content = text().strip() + "\n"
        write_text(target.with_suffix(".txt"), content)
        record = {
            "format": 1,
            "inputs": inputs,
            **about,
            "words": words(),
            "sha256": digest(content),
            "chunks_with_faults": sum(bool(chunk.chosen.faults) for chunk in done),
            "seconds": round(seconds + time.perf_counter() - started, 1),
            "chunks": [asdict(chunk) for chunk in done],
        }
        write_json(target, record)
        return record

    print(f"[{source}] ... {beginning[-300:].partition(' ')[2] or beginning}{text()}", flush=True)
    if words() < args.words:
        _, model, tokenizer = next(models.loaded([row], args.device, models.DTYPES[args.dtype]))
        tokens, room = len(generation.encode(tokenizer, beginning)), args.window - args.chunk_tokens
        if args.source and tokens > room:
            print(f"{source} has {tokens} tokens, {room} fit: the model sees its last pages only", file=sys.stderr)
        written = [chunk.chosen.text for chunk in done]
        with tqdm(total=args.words, initial=words(), unit="word", desc=row.name, disable=None) as bar:
            for chunk in chunks(model, tokenizer, beginning, settings, trained_on, written):
                bar.clear()
                print(chunk.chosen.text.lstrip(" "), flush=True)
                done.append(chunk)
                write()  # after each, so that an interrupted run continues where it was
                bar.update(words() - bar.n)
                if words() >= args.words:
                    break
    record = write()
    note = (
        f"Written by a language model, stage {row.name} of a chain of recipes, seed {args.seed}, going on from {source}. "
        f"{len(done)} chunks, each the best of {args.candidates} or more. Record: {target.name}."
    )
    write_epub(target.with_suffix(".epub"), "La suite", note, text().strip() + "\n")
    drawn = sum(len(chunk.candidates) for chunk in done) * args.chunk_tokens
    spent = seconds + time.perf_counter() - started
    print(
        f"\n{words()} words in {len(done)} chunks, {record['chunks_with_faults']} of which break a rule: "
        f"{target.with_suffix('')}.txt, .epub, .json\n{spent:.0f} s, {drawn / spent:.0f} tokens/s drawn, "
        f"{words() / spent:.1f} words/s kept"
    )


if __name__ == "__main__":
    run(main)
