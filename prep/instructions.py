"""Articles, or conversations, as training rows: for a model that first reads a language, and then learns to answer in it.

    python prep/instructions.py --source demo/corpus/articles.jsonl --tokenizer models/instruct --out data/3a.jsonl
    python prep/instructions.py --source demo/corpus/instructions.jsonl --tokenizer models/instruct --out data/3b.jsonl
    python prep/instructions.py --source wikimedia/wikipedia --subset 20231101.ko --holdout 0.001 \\
        --revision b04c8d1ceb2f5cd4588862100d08de323dccfbaa --template '### 제목: {title}\\n\\n{text}' ...

A record with `title` and `text` is an article; its row is the template filled in. One with `conversations`, a list of
{from, value}, is a conversation; its row keeps the list, for Axolotl, and has as `text` what the tokenizer's chat
template makes of it. Records are held out by the hash of their title or first question, and near-duplicates of what is
held out, or of an earlier record, are dropped. Writes what prep/castle.py writes, and counts what it rejects.
"""

import argparse
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from prep.common import BadInput, positive, reason, run, source_files
from prep.dedup import held_out
from prep.rows import SPECIAL, Row, holdout_share, jsonl_path, load_tokenizer, write_prepared

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# How an answer that declines begins, in English, French and Korean; --refusal adds to them.
REFUSALS = (
    r"(as|i am|i'm) an ai\b|i('m| am) sorry, (but )?i (can|am un)|i can('|no)t (help|assist)"
    r"|en tant qu['’](ia\b|intelligence)|(je suis )?désolée?, (mais )?je ne (peux|suis)|인공지능 (언어 )?모델|죄송(합니다|하지만)"
)
WORDS, SKETCH, SAME = 5, 32, 0.5  # a sketch: the 32 smallest hashes of sequences of 5 words; half of it shared: a copy
LONGEST = 64  # windows: Axolotl's completion cuts a row there, and says nothing


def records(source: str, subset: str | None, revision: str | None) -> Iterator[dict[str, Any]]:
    """The records of a local JSON, JSONL or parquet file, or of a data set of the hub. Raises BadInput."""
    import datasets

    path = Path(source)
    kind = "parquet" if path.suffix == ".parquet" else "json"
    try:
        if path.is_file():
            yield from datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        else:
            yield from datasets.load_dataset(source, subset, revision=revision, split="train", streaming=True)
    except Exception as error:  # Arrow, datasets and the hub's client each raise their own
        raise BadInput(f"{source} is no readable file, nor a data set of the hub: {reason(error)}") from error


def sketch(text: str) -> list[int]:
    """The smallest hashes of a text's sequences of words: texts share as much of their sketches as of their sequences."""
    words = re.findall(r"\w+", text.casefold())
    starts = range(max(1, len(words) - WORDS + 1))
    return sorted({xxhash.xxh64_intdigest(" ".join(words[i : i + WORDS]).encode()) for i in starts})[:SKETCH]


class Preparation:
    """Turns records into rows, and counts those that it rejects, by reason."""

    def __init__(self, tokenizer: Any, sequence_len: int, template: str, refusals: list[str]):
        self.tokenizer, self.sequence_len, self.template = tokenizer, sequence_len, template.replace("\\n", "\n")
        self.refusal = re.compile("|".join([REFUSALS, *refusals]), re.IGNORECASE)
        self.rejected: Counter[str] = Counter()
        self.seen: dict[int, list[int]] = defaultdict(list)  # a hash of a sketch: the rows that have it
        self.number = 0

    def rows(self, chosen: list[dict[str, Any]], part: str) -> list[Row]:
        """The rows of the records that are kept."""
        made = []
        for record in chosen:
            row = self.conversation(record) if "conversations" in record else self.article(record)
            # Without the template, whose words are in every row.
            if isinstance(row, Row) and self.is_copy(" ".join(turn["value"] for turn in row.conversations) or row.text):
                row = "near-duplicate"
            if isinstance(row, Row):
                made.append(row._replace(part=part))
            else:
                self.rejected[row] += 1
        return made

    def article(self, record: dict[str, Any]) -> Row | str:
        """The row of an article, or why there is none."""
        title, text = (str(record.get(key) or "").strip() for key in ("title", "text"))
        if not text:
            return "empty article"
        filled = self.template.replace("{title}", title).replace("{text}", text)
        tokens = len(self.tokenizer(filled).input_ids) + 1  # EOS
        if tokens > LONGEST * self.sequence_len:
            return f"longer than {LONGEST} windows"
        return self.row(filled, record, title, tokens)

    def conversation(self, record: dict[str, Any]) -> Row | str:
        """The row of a conversation, or why there is none."""
        turns = [turn if isinstance(turn, dict) else {} for turn in record["conversations"] or []]
        messages: list[Any] = [
            {"role": ROLES.get(turn.get("from") or ""), "content": turn.get("value") or ""} for turn in turns
        ]
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
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        tokens = len(self.tokenizer(text, add_special_tokens=False).input_ids)
        if tokens > self.sequence_len:
            return "longer than the window"
        row = self.row(text.removeprefix(self.tokenizer.bos_token or ""), record, said[0]["content"][:80], tokens)
        return row._replace(conversations=tuple({"from": t["from"], "value": t["value"]} for t in turns))

    def row(self, text: str, record: dict[str, Any], title: str, tokens: int) -> Row:
        self.number += 1
        return Row(text, str(record.get("id", self.number)), title, "", "", "", *divmod(tokens, self.sequence_len))

    def is_copy(self, text: str) -> bool:
        """Does it share half of its sketch with an earlier row? Otherwise it is remembered."""
        found = sketch(text)
        shared = Counter(row for value in found for row in self.seen.get(value, ()))
        if max(shared.values(), default=0) >= SAME * len(found):
            return True
        for value in found:
            self.seen[value].append(self.number)
        return False


def key(record: dict[str, Any]) -> str:
    """What a record is about: its title, or its first question. The same on one side only."""
    turns = record.get("conversations") or [{}]
    questions = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") != "system"]
    return str(record.get("title") or (questions or [""])[0] or record.get("id", "")).strip().casefold()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--source", required=True, help="a JSON, JSONL or parquet file, or a data set of the hub")
    option("--subset", help="of a data set of the hub, such as 20231101.ko")
    option("--revision", help="its commit")
    option("--tokenizer", type=Path, required=True, help="folder of the base model")
    option("--sequence-len", type=positive, default=2048, help="tokens a window (the recipe's sequence_len)")
    option("--template", default="{title}\\n\\n{text}", help="what an article's row is, in its language")
    option("--refusal", action="append", default=[], metavar="REGEX", help="how answers begin that are left out")
    option("--holdout", type=holdout_share, default=0.1, help="share held out, by title or first question; 0: none")
    option("--seed", type=int, default=42, help="of the shuffle")
    option("--out", type=jsonl_path, required=True, help="the rows, such as data/3a.jsonl")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    read = list(records(args.source, args.subset, args.revision))
    if any("conversations" in record for record in read) and not tokenizer.chat_template:
        raise BadInput(f"{args.tokenizer} has no chat template: collect an instruct model, without --eos-token")
    keys = [key(record) for record in read]
    held = held_out(keys, args.holdout)
    preparation = Preparation(tokenizer, args.sequence_len, args.template, args.refusal)
    sides: list[list[dict[str, Any]]] = [[], []]
    for record, name in zip(read, keys, strict=True):
        sides[name not in held].append(record)
    heldout, train = (preparation.rows(side, part) for side, part in zip(sides, ("heldout", "train"), strict=True))
    rejected = ", ".join(f"{count:,} {why}" for why, count in preparation.rejected.most_common()) or "none"
    if not train:
        raise BadInput(f"{args.source}: of {len(read):,} records none is left to train on; rejected: {rejected}")
    random.Random(args.seed).shuffle(train)
    local = Path(args.source).is_file()
    manifest = write_prepared(
        args.out,
        train,
        heldout,
        tokenizer=args.tokenizer,
        sequence_len=args.sequence_len,
        source={
            "path": args.source if local else None,
            "repo": None if local else args.source,
            "revision": args.revision,
            "files": source_files([Path(args.source)]) if local else [],
        },
        arguments={"subset": args.subset, "template": args.template, "refusal": args.refusal, "holdout": args.holdout},
        seed=args.seed,
        documents={
            "read": len(read),
            "kept": len(train) + len(heldout),
            "heldout": len(heldout),
            "rejected": dict(preparation.rejected),
        },
        packages=["datasets", "xxhash"],
    )
    print(f"{args.source}: {len(read):,} records; rejected: {rejected}")
    print(f"{args.out}: {manifest['train']['rows']:,} rows to train on, {len(heldout):,} held out")


if __name__ == "__main__":
    run(main)
