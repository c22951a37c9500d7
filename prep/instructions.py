"""Articles, or conversations, as training rows: for a model that first reads a language, and then learns to answer in it.

    python prep/instructions.py --source demo/corpus/articles.jsonl --tokenizer models/instruct --out data/3a.jsonl
    python prep/instructions.py --source demo/corpus/instructions.jsonl --tokenizer models/instruct --out data/3b.jsonl
    python prep/instructions.py --source wikimedia/wikipedia --subset 20231101.ko --holdout 0.001 \\
        --revision b04c8d1ceb2f5cd4588862100d08de323dccfbaa --template '### 제목: {title}\\n\\n{text}' ...

A record with `title` and `text` is an article; its row is the template filled in. One with `conversations`, a list of
{from, value}, is a conversation; its row keeps the list, for Axolotl, and has as `text` what the tokenizer's chat
template makes of it. Records are held out by the hash of their title or first question, else of their id or text, and
near-duplicates of what is held out, or of an earlier record, are dropped. Writes what prep/castle.py writes, and counts
what it rejects. Texts stay on the disk; a record takes one or two kilobytes of memory, for its MinHash signature.
"""

from prep.command import run

import argparse
import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from jinja2 import TemplateError

from prep.common import BadInput, digest, positive, progress, reason, source_files
from prep.dedup import COPY, held_out
from prep.rows import SPECIAL, Row, holdout_share, jsonl_path, keep_sources, load_tokenizer, read_row, write_prepared

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# How an answer that declines begins, in English, French and Korean; --refusal adds to them.
REFUSALS = (
    r"(as|i am|i'm) an ai\b|i('m| am) sorry, (but )?i (can|am un)|i can('|no)t (help|assist)"
    r"|en tant qu['’](ia\b|intelligence)|(je suis )?désolée?, (mais )?je ne (peux|suis)|인공지능 (언어 )?모델|죄송(합니다|하지만)"
)
LONGEST = 64  # windows: Axolotl's completion cuts a row there, and says nothing
# Two texts have a bucket in common, and the later one is dropped, in 97 cases of 100 if 0.7 of their sequences of five
# words are the same, in 47 if half are, in 1 if a fifth is.
BUCKETS = MinhashConfig(n_grams=5, num_buckets=20, hashes_per_bucket=5)
MINHASH = MinhashDedupSignature(".", BUCKETS, WhitespaceTokenizer())


def load(source: str, subset: str | None, revision: str | None) -> Any:
    """A local JSON, JSONL or parquet file, or a data set of the hub, read from the disk as it is needed. Raises BadInput."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    kind = "parquet" if source.endswith(".parquet") else "json"
    try:
        if Path(source).is_file():
            return datasets.load_dataset(kind, data_files=source, split="train")
        return datasets.load_dataset(source, subset, revision=revision, split="train")
    except Exception as error:  # Arrow, datasets and the hub's client each raise their own
        said = reason(error.__cause__ or error)
        raise BadInput(f"{source} is no readable file, nor a data set of the hub: {said}") from error


def bucket_hashes(text: str) -> set[int]:
    """A number for each bucket of a text's MinHash signature. Its words are found here, in any script, by letters alone."""
    words, length = re.findall(r"\w+", text.casefold()), BUCKETS.n_grams
    sequences = {" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}
    hashes = np.array([[xxhash.xxh64_intdigest(sequence.encode())] for sequence in sequences], np.uint64)
    return {hash((number, *bucket)) for number, bucket in enumerate(MINHASH.get_signature(hashes))}


class Preparation:
    """Turns records into rows."""

    def __init__(self, tokenizer: Any, sequence_len: int, template: str, refusals: list[str]):
        self.tokenizer, self.sequence_len, self.template = tokenizer, sequence_len, template.replace("\\n", "\n")
        self.refusal = re.compile("|".join([REFUSALS, *refusals]), re.IGNORECASE)

    def row(self, record: dict[str, Any], number: int, part: str) -> Row | str:
        """The row of a record, or why there is none."""
        made = self.conversation(record) if record.get("conversations") is not None else self.article(record)
        if isinstance(made, str):
            return made
        title, text, tokens, turns = made
        source = str(number if record.get("id") is None else record["id"])
        return Row(text, source, title, "", "", part, *divmod(tokens, self.sequence_len), turns)

    def article(self, record: dict[str, Any]) -> tuple[str, str, int, tuple] | str:
        """Title, text, tokens and no turns, or why there is no row."""
        title, text = (str(record.get(key) or "").strip() for key in ("title", "text"))
        if not text:
            return "empty article"
        if any(token in title + text for token in self.tokenizer.all_special_tokens):
            return SPECIAL
        filled = self.template.replace("{title}", title).replace("{text}", text)
        tokens = len(self.tokenizer(filled).input_ids) + 1  # EOS
        if tokens > LONGEST * self.sequence_len:
            return f"longer than {LONGEST} windows"
        return title, filled, tokens, ()

    def conversation(self, record: dict[str, Any]) -> tuple[str, str, int, tuple] | str:
        """First question, text, tokens and turns, or why there is no row."""
        turns = turns_of(record)
        messages: list[Any] = [{"role": ROLES.get(turn["from"]), "content": turn["value"]} for turn in turns]
        if any(message["role"] is None for message in messages):
            return "role that is neither human, gpt nor system"
        said = messages[1:] if messages and messages[0]["role"] == "system" else messages
        if len(said) < 2:
            return "fewer than two turns"
        if [message["role"] for message in said] != ["user", "assistant"] * (len(said) // 2):
            return "turns out of order"
        if not all(message["content"].strip() for message in said):
            return "empty turn"
        if any(self.refusal.match(message["content"].strip()) for message in said[1::2]):
            return "refusal"
        if any(token in turn["value"] for turn in turns for token in self.tokenizer.all_special_tokens):
            return SPECIAL
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError:  # which some raise for a system turn
            return "refused by the chat template"
        tokens = len(self.tokenizer(text, add_special_tokens=False).input_ids)
        if tokens > self.sequence_len:
            return "longer than the window"
        return said[0]["content"][:80], text.removeprefix(self.tokenizer.bos_token or ""), tokens, turns


def pattern(text: str) -> str:
    """An argparse type: a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def turns_of(record: dict[str, Any]) -> tuple[dict[str, str], ...]:
    """The turns of a conversation, "" for what one lacks."""
    given = (turn if isinstance(turn, dict) else {} for turn in record.get("conversations") or [])
    return tuple({name: str(turn.get(name) or "") for name in ("from", "value")} for turn in given)


def key(record: dict[str, Any]) -> str:
    """What a record is about: its title, or its first question; else its id or its text. The same on one side only."""
    questions = [turn["value"] for turn in turns_of(record) if turn["from"] != "system"]
    named = record.get("title") or (questions or [""])[0] or record.get("id")
    about = "" if named is None else str(named).strip().casefold()
    return about or digest(str(record.get("text")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--source", required=True, help="a JSON, JSONL or parquet file, a folder of them, or a data set of the hub")
    option("--subset", help="of a data set of the hub, such as 20231101.ko")
    option("--revision", help="its commit")
    option("--tokenizer", type=Path, required=True, help="folder of the base model")
    option("--sequence-len", type=positive, default=2048, help="tokens a window (the recipe's sequence_len)")
    option("--template", default="{title}\\n\\n{text}", help="what an article's row is, in its language")
    option(
        "--refusal",
        action="append",
        default=[],
        type=pattern,
        metavar="REGEX",
        help="how answers begin that are left out",
    )
    option("--holdout", type=holdout_share, default=0.1, help="share held out, by title or first question; 0: none")
    option("--seed", type=int, default=42, help="of the shuffle")
    option("--out", type=jsonl_path, required=True, help="the rows, such as data/3a.jsonl")
    args = parser.parse_args()
    source = Path(args.source)
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    keep_sources(files, args.out)
    tokenizer = load_tokenizer(args.tokenizer)
    data = load(args.source, args.subset, args.revision)
    if "conversations" in data.column_names and not tokenizer.chat_template:
        raise BadInput(f"{args.tokenizer} has no chat template: collect an instruct model, without --eos-token")
    keys = [key(record) for record in data]
    held = held_out(keys, args.holdout)
    preparation = Preparation(tokenizer, args.sequence_len, args.template, args.refusal)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rejected: Counter[str] = Counter()
    offsets: dict[str, list[int]] = {"train": [], "heldout": []}
    seen: set[int] = set()
    with tempfile.TemporaryFile(dir=args.out.parent) as made:
        # The held-out records first: of two near-duplicates they stay.
        for i in progress(sorted(range(len(data)), key=lambda i: keys[i] not in held)):
            row = preparation.row(data[i], i + 1, "heldout" if keys[i] in held else "train")
            if isinstance(row, Row):
                # Without the chat template, whose words are in every conversation.
                hashes = bucket_hashes(" ".join(turn["value"] for turn in row.conversations) or row.text)
                if seen.isdisjoint(hashes):
                    seen |= hashes
                    offsets[row.part].append(made.tell())
                    made.write(json.dumps(row).encode() + b"\n")
                    continue
                row = COPY
            rejected[row] += 1
        train, heldout = offsets.values()
        why = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common()) or "none"
        if not train:
            raise BadInput(f"{args.source}: of {len(data):,} records none is left to train on; rejected: {why}")
        random.Random(args.seed).shuffle(train)
        local = source.exists()
        manifest = write_prepared(
            args.out,
            (read_row(made, offset) for offset in train),
            (read_row(made, offset) for offset in heldout),
            tokenizer=args.tokenizer,
            sequence_len=args.sequence_len,
            source={
                "path": args.source if local else None,
                "repo": None if local else args.source,
                "revision": args.revision,
                "files": source_files(files) if local else [],
            },
            arguments={name: getattr(args, name) for name in ("subset", "template", "refusal", "holdout")},
            seed=args.seed,
            documents={
                "read": len(data),
                "kept": len(train + heldout),
                "heldout": len(heldout),
                "rejected": dict(rejected),
            },
            packages=["datasets", "datatrove", "xxhash"],
        )
    print(f"{args.source}: {len(data):,} records; rejected: {why}")
    print(f"{args.out}: {manifest['train']['rows']:,} rows to train on, {len(heldout):,} held out")


if __name__ == "__main__":
    run(main)
