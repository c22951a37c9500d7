"""Pairs for preference training: after lines of the novel's training text, what its author wrote and what a stage wrote.

    python prep/pairs.py --stage outputs/export/2c/2c-Q8_0.gguf --out data/2d.jsonl

The stage writes once after each place, or --candidates times: then the draw that most loops, repeats itself, invents words
or ends no sentence is taken. Both sides are raw text, cut in mid-text at as many words. Killed, the same command continues.
On a CPU an exported GGUF writes several times faster than the stage it was made from.
"""

from prep.command import run

import argparse
import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

from eval import generation, metrics, models
from eval.reading import TOKENS_A_WORD
from eval.tasks.texts import once
from prep.common import BadInput, hashed, lock, positive, progress, read_json, sha256, versions, write_json, write_text
from prep.rows import jsonl_path, keep_sources, manifest_path
from train.stages import load_chain


def places(text: str, before: int, words: int) -> list[tuple[str, str]]:
    """The text in pairs of `before` words and the `words` that follow them, one after the other."""
    found, size = text.split(" "), before + words
    starts = range(0, len(found) - size + 1, size)
    return [(" ".join(found[i : i + before]), side(found[i + before : i + size])) for i in starts]


def side(words: list[str]) -> str:
    """Words as they follow a prompt: TRL refuses a prompt whose last word a side continues."""
    return f" {' '.join(words)}"


def failing(text: str) -> float:
    """How much a draw loops, repeats itself, invents words or breaks off, by what the report says of samples."""
    found = metrics.degeneration([{"text": text, "ended": not metrics.SENTENCE_END.search(text)}])
    return sum(found[key] or 0.0 for key in ("looping", "rep_4", "not_french", "ended_early"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--stage", default="2c", help="who writes: a stage, or an exported .gguf file (default: 2c)")
    option("--rows", type=Path, default=Path("data/2c.jsonl"), help="training rows of the novel (default: %(default)s)")
    option("--out", type=jsonl_path, default=Path("data/2d.jsonl"), help="default: %(default)s")
    option("--pairs", type=positive, default=512, help="at most (default %(default)s)")
    option("--prompt-words", type=positive, default=200, help="before each (default %(default)s)")
    option("--words", type=positive, default=100, help="of each side (default %(default)s)")
    option("--candidates", type=positive, default=1, help="draws of which the worst is taken (default: the one draw)")
    args = models.parse(parser)
    warnings.filterwarnings("ignore")
    keep_sources([args.rows], args.out)
    lock(args.out)
    found = [place for text in once(args.rows) for place in places(text, args.prompt_words, args.words)]
    if not found:
        words = args.prompt_words + args.words
        raise BadInput(f"no row of {args.rows} has {words} words: lower --prompt-words or --words")
    random.Random(args.seed).shuffle(found)
    found = found[: args.pairs]
    row = models.writer(load_chain(args.recipes, args.curriculum), args.stage)
    device = "cpu" if row.form == models.GGUF else args.device
    decoding = generation.decoding(TOKENS_A_WORD * args.words)
    tokenizer = read_json(manifest_path(args.rows), "prepare the novel again", lambda said: said["tokenizer"])
    about: dict[str, Any] = {
        "source": {"path": str(args.rows), "sha256": sha256(args.rows)},
        "stage": {"name": row.name, "files": {str(path): hashed(path) for path in models.files_of(row)}},
        "arguments": {key: getattr(args, key) for key in ("pairs", "prompt_words", "words", "candidates", "dtype")},
        "seed": args.seed,
        "tokenizer": tokenizer,  # the gate wants to know; no token is cut here
        "decoding": decoding,
        "versions": versions("torch", "transformers", "peft", "cyllama"),
    }
    part = args.out.with_suffix(".part.json")
    begun = read_json(part, f"remove {part}", dict) if part.is_file() else {}
    pairs = begun["pairs"] if begun.get("about") == about else []
    for _, model, tokens in models.loaded([row], device, models.DTYPES[args.dtype]):
        for number, (prompt, chosen) in enumerate(
            progress(found[len(pairs) :], desc=row.name, unit="pair"), len(pairs)
        ):
            ids, seed = generation.encode(tokens, prompt), args.seed + number
            drawn = generation.draw(model, tokens, ids, args.candidates, seed, decoding, open_ended=True)
            sides = [side(sample.text.lstrip().split(" ")[: args.words]) for sample in drawn]
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": max(sides, key=failing)})
            write_json(part, {"about": about, "pairs": pairs})
    write_text(args.out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    made = {"train": {"rows": len(pairs), "sha256": sha256(args.out)}, "heldout": {"sha256": None}}
    write_json(manifest_path(args.out), about | made)
    part.unlink()
    print(f"{len(pairs)} pairs: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
