"""Text to training rows: passages of whole windows, as Axolotl will slice them, and the manifest that vouches for them.

Axolotl's `type: completion` (0.19.0, prompt_strategies/completion.py) tokenises a row's whole text, keeps the special
tokens the tokenizer adds (Llama: BOS; GPT-2's kind: none), appends EOS, truncates at 64 x sequence_len and slices at
sequence_len. `min_sample_len: <sequence_len>` then drops every slice that is not full. A row is therefore a contiguous
passage that ends with the word in which its last full window ends: what is left over is a few tokens and an EOS that
stands at no true end, and both are dropped together. Text is cut by character offsets and never decoded from tokens.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from prep.common import BadInput, atomic_write, sha256, versions

MAX_WINDOWS = 16  # a row; Axolotl truncates silently at 64 and tokenises 1,000 rows a batch in each process


class Row(NamedTuple):
    """One training row: the six fields of the JSONL line, then what Axolotl will make of the text."""

    text: str
    source: str  # identifier in the source, such as Gallica's ark
    title: str
    author: str  # "" when unknown: a column of nulls and strings is an error for the JSON loader of `datasets`
    date: str
    part: str  # where in the source the passage lies; unique within a source
    windows: int
    tail: int

    def line(self) -> str:
        """The row as one line of JSON, newline included."""
        return json.dumps(dict(zip(self._fields[:6], self[:6], strict=True)), ensure_ascii=False) + "\n"


class Passage(NamedTuple):
    """Characters `start` to `end` of a text: `windows` full windows, then `tail` tokens (EOS counted) to be dropped."""

    start: int
    end: int
    windows: int
    tail: int


class Tokens(NamedTuple):
    """A text and the characters at which each of its tokens starts and ends: two arrays of shape (tokens,).

    The special tokens the tokenizer adds are not among them.
    """

    text: str
    starts: np.ndarray
    ends: np.ndarray


class Loaded(NamedTuple):
    """A tokenizer without Transformers around it, which a worker need not import."""

    backend: Tokenizer
    eos: int
    specials: list[str]

    def save(self, path: Path) -> None:
        """One file that `read` takes."""
        record = {"backend": self.backend.to_str(), "eos": self.eos, "specials": self.specials}
        with atomic_write(path) as handle:
            json.dump(record, handle)

    @classmethod
    def read(cls, path: Path) -> "Loaded":
        record = json.loads(path.read_text(encoding="utf-8"))
        return cls(Tokenizer.from_str(record["backend"]), record["eos"], record["specials"])


def load_tokenizer(folder: str | Path) -> Loaded:
    """The tokenizer as Axolotl loads it (AutoTokenizer), from a local folder that holds a `tokenizer.json`."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise BadInput(f"no tokenizer.json in {folder}: give the folder of the base model (--tokenizer models/base)")
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise
        raise BadInput(f"the tokenizer in {folder} cannot be loaded ({error}); collect the base model again") from error
    if not isinstance(tokenizer, TokenizersBackend):
        raise BadInput(f"the tokenizer in {folder} gives no character offsets; a fast tokenizer is needed")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer in {folder} has no end-of-sequence token, which Axolotl appends to every row")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return Loaded(backend, tokenizer.eos_token_id, [token for token in tokenizer.all_special_tokens if token])


class _WordCounts(dict[str, int]):
    """How many tokens a word has inside a text, after a space.

    Each form of a word is tokenised once, or anew after a million others: they take 120 MB.
    """

    def __init__(self, tokenizer: Tokenizer, lead: str):
        super().__init__()
        self.tokenizer, self.lead = tokenizer, lead

    def __missing__(self, word: str) -> int:
        if len(self) >= 1_000_000:
            self.clear()
        count = self[word] = len(self.tokenizer.encode(self.lead + word, add_special_tokens=False))
        return count


class Cutter:
    """Cuts text into passages that Axolotl slices into exactly the stated number of windows."""

    def __init__(self, tokenizer: Loaded, sequence_len: int):
        if sequence_len < 64:
            raise BadInput(f"--sequence-len {sequence_len} is too short: a window has at least 64 tokens")
        self.sequence_len = sequence_len
        self.eos = tokenizer.eos
        self.specials = tokenizer.specials
        self._tokenizer = tokenizer.backend
        probe = self._tokenizer.encode("a").special_tokens_mask
        self.before = probe.index(0)  # special tokens ahead of the text: 1 (BOS) or 0
        # A window ends inside a word; the row runs on to the word's end, but over no more than this many characters
        # (unspaced rubbish exists), which are at most half a window even at four byte tokens a character.
        self.reach = min(40, sequence_len // 8)
        self._word_end = re.compile(rf"\S{{0,{self.reach}}}")
        self._next_word = re.compile(rf"\s*\S{{1,{self.reach}}}")
        self._around = self.count("a") - len(self._bare(["a"])[0])  # tokens of a row that are not its text's
        self._lead = self._leading_space()
        self._piece = re.compile(rf"[^ ].{{0,{min(400, 2 * sequence_len)}}}[^ ]*", re.S)
        self._tokens_of = _WordCounts(self._tokenizer, self._lead or "")

    def _bare(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts, without special ones."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _leading_space(self) -> str | None:
        """What must stand before a word for it to be tokenised by itself as it is inside a text.

        "" where the tokenizer puts a space itself (Llama), " " where it does not (GPT-2's kind); None where neither
        gives the tokens of the whole text, so that a text cannot be tokenised in pieces.
        """
        probe = "Le chat, d'une voix douce : « Où vas-tu ? »\n\n— Là-bas, dit-elle... à 10 h. 30 (peut-être) !"
        first, *words = probe.split(" ")
        [whole] = self._bare([probe])
        for lead in ("", " "):
            pieces = self._bare([first, *(lead + word for word in words)])
            if list(itertools.chain.from_iterable(pieces)) == whole:
                return lead
        return None

    def count(self, text: str) -> int:
        """Tokens Axolotl makes of a row: those of the text, the special ones the tokenizer adds, and one EOS."""
        ids = self._tokenizer.encode_batch_fast([text])[0].ids  # without offsets: a third faster
        return len(ids) + (not ids or ids[-1] != self.eos)

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Tokenise each text once, keeping offsets. Takes some 200 bytes a token: give a few megabytes at a time."""
        encoded = []
        for text, encoding in zip(texts, self._tokenizer.encode_batch(texts), strict=True):
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            offsets = offsets[np.array(encoding.special_tokens_mask) == 0]
            encoded.append(Tokens(text, offsets[:, 0], offsets[:, 1]))
        return encoded

    def word_start(self, tokens: Tokens, index: int) -> int:
        """The character at which the word nearest to token `index` starts, by distance in tokens."""
        at = int(tokens.starts[index])
        word = re.compile(r"(?<!\S)\S")
        following = word.search(tokens.text, at)
        before = max((m.start() for m in word.finditer(tokens.text, max(0, at - 200), at + 1)), default=None)
        choices = [c for c in (before, following and following.start()) if c is not None]
        return min(choices, key=lambda c: abs(int(np.searchsorted(tokens.ends, c, side="right")) - index), default=at)

    def cut(
        self, tokens: Tokens, start: int = 0, windows: int | None = None, longest: int = MAX_WINDOWS
    ) -> list[Passage]:
        """Passages of at most `longest` windows each, one after the other from character `start`, without overlap.

        `windows` limits their sum; None takes all there are. Each passage is tokenised by itself to make sure of its
        count: its first word may give other tokens there than inside the text.
        """
        passages: list[Passage] = []
        wanted = windows if windows is not None else len(tokens.ends)
        while wanted > 0:
            passage = self._next(tokens, start, min(wanted, longest))
            if passage is None:
                break
            passages.append(passage)
            wanted -= passage.windows
            start = passage.end
        return passages

    def passages(self, text: str, windows: int | None = None) -> list[Passage]:
        """What `cut` gives of a text in the project's convention, many times as fast.

        Between spaces the tokens of a text are those of its words, so that its words are counted, each form of them
        tokenised once. Passages begin and end where pieces of some 400 characters do. That costs half a piece of text
        a passage, some 60 tokens of 8,192. A tokenizer whose words do not add up is left to `cut`.
        """
        if self._lead is None or "  " in f" {text} ":
            return self.cut(self.encode([text])[0], windows=windows)
        words = text.split(" ")
        spaces = np.flatnonzero(np.frombuffer(text.encode("utf-32-le"), np.uint32) == ord(" "))
        counts = np.fromiter(map(self._tokens_of.__getitem__, words), np.int64, len(words))
        places = [match.span() for match in self._piece.finditer(text)]
        at = [0, *(1 + np.searchsorted(spaces, [end for _, end in places]))]  # words before each piece, and all
        ends = np.concatenate([[0], np.cumsum(counts)])[at]  # tokens before each piece, and all
        passages: list[Passage] = []
        wanted = windows if windows is not None else int(ends[-1])
        first = 0
        while wanted > 0 and first < len(places):
            a = places[first][0]
            # The first word of a row has no space before it, whatever it had in the text.
            word = words[at[first]]
            around = self._around + (len(self._bare([word])[0]) - self._tokens_of[word] if self._lead else 0)
            available = int(ends[-1] - ends[first]) + around
            for number in range(min(wanted, MAX_WINDOWS, (available - 1) // self.sequence_len), 0, -1):
                full = number * self.sequence_len
                last = int(np.searchsorted(ends, ends[first] + full + 1 - around))  # one token more: the EOS is dropped
                tail = int(ends[last] - ends[first]) + around - full
                if 0 < tail < self.sequence_len and last > first:
                    passages.append(Passage(a, places[last - 1][1], number, tail))
                    wanted -= number
                    first = last
                    break
            else:
                first += 1  # too little left, or a piece of rubbish that is longer than a window
        return passages

    def _next(self, tokens: Tokens, start: int, most: int) -> Passage | None:
        text, length = tokens.text, self.sequence_len
        while start < len(text) and text[start].isspace():
            start += 1
        first = int(np.searchsorted(tokens.ends, start, side="right"))
        windows = min(most, (self.before + len(tokens.ends) - first) // length)
        while windows > 0:
            last = first + windows * length - self.before - 1
            end = self._word_end.match(text, int(tokens.ends[last])).end()  # type: ignore[union-attr]
            count = self.count(text[start:end])
            while count - 1 < windows * length and (word := self._next_word.match(text, end)):
                end = word.end()
                count = self.count(text[start:end])
            tail = count - windows * length
            if 0 < tail < length:
                return Passage(start, end, windows, tail)
            windows -= 1
        return None


class _Sink:
    """Writes rows to an open file and counts what went in, so that the manifest describes these very bytes."""

    def __init__(self, path: Path, handle: IO[bytes], sequence_len: int):
        self.handle, self.hash = handle, hashlib.sha256()
        self.stats: dict[str, Any] = {"path": path.name}
        self.stats |= dict.fromkeys(("rows", "windows", "tokens", "tail_tokens", "bytes"), 0)
        self.sequence_len = sequence_len

    def write(self, rows: Iterable[Row]) -> dict[str, Any]:
        for row in rows:
            line = row.line().encode()
            self.handle.write(line)
            self.hash.update(line)
            self.stats["rows"] += 1
            self.stats["windows"] += row.windows
            self.stats["tokens"] += row.windows * self.sequence_len
            self.stats["tail_tokens"] += row.tail
            self.stats["bytes"] += len(line)
        self.handle.flush()
        return self.stats | {"sha256": self.hash.hexdigest()}


def heldout_path(out: str | Path) -> Path:
    """data/2a.jsonl -> data/2a.heldout.jsonl"""
    return Path(out).with_suffix(".heldout.jsonl")


def manifest_path(out: str | Path) -> Path:
    """data/2a.jsonl -> data/2a.manifest.json"""
    return Path(out).with_suffix(".manifest.json")


def write_prepared(
    out: str | Path,
    train: Iterable[Row],
    heldout: Iterable[Row],
    *,
    tokenizer: str | Path,
    sequence_len: int,
    source: dict[str, Any],
    arguments: dict[str, Any],
    seed: int,
    documents: dict[str, Any],
    packages: Iterable[str] = (),
) -> dict[str, Any]:
    """Write rows, held-out rows and manifest; returns the manifest.

    Everything is written under temporary names first. The renames come last, the manifest's after the others: killed in
    between, the old manifest's sha256 does not match the new rows. `tokens` counts those in full windows (special
    tokens included), `tail_tokens` those that `min_sample_len` drops.
    """
    if Path(out).suffix != ".jsonl":
        raise BadInput(f"--out {out} must end in .jsonl")
    held, manifest_file = heldout_path(out), manifest_path(out)
    # Contexts leave in reverse order: rows, held-out rows, manifest.
    with (
        atomic_write(manifest_file) as manifest_handle,
        atomic_write(held, "wb") as held_handle,
        atomic_write(out, "wb") as train_handle,
    ):
        manifest = {
            "source": source,
            "arguments": arguments,
            "seed": seed,
            "tokenizer": {"path": str(tokenizer), "sha256": sha256(Path(tokenizer) / "tokenizer.json")},
            "sequence_len": sequence_len,
            "documents": documents,
            "train": _Sink(Path(out), train_handle, sequence_len).write(train),
            "heldout": _Sink(held, held_handle, sequence_len).write(heldout),
            "versions": versions("tokenizers", "transformers", *packages),
        }
        json.dump(manifest, manifest_handle, ensure_ascii=False, indent=2)
        manifest_handle.write("\n")
        manifest_handle.flush()
    return manifest
