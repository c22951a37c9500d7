"""Rows and manifest: windows as Axolotl's own code counts them, for both kinds of tokenizer."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from axolotl_preprocessing import axolotl_windows
from small_tokenizers import gpt2_like, save, tales
from tokenizers import Tokenizer

from prep.common import BadInput, write_text
from prep.dedup import Entry
from prep.rows import (
    CHUNK,
    MAX_WINDOWS,
    Bounds,
    Cutter,
    Row,
    Share,
    chunks,
    document_rows,
    heldout_path,
    manifest_path,
    write_prepared,
)


@pytest.fixture(scope="module")
def novel() -> str:
    """230 kB of French, far beyond the 64 windows at which Axolotl truncates a row."""
    return "\n\n".join(paragraph for tale in tales() for paragraph in tale.split("\n") if paragraph.strip())


def cut(cutter: Cutter, text: str, **options) -> tuple[list[Bounds], list[str]]:
    """The rows' bounds, and their texts."""
    found = list(cutter.cut(cutter.encode(text), **options))
    return found, [text[row.start : row.end] for row in found]


def axolotl_agrees(cutter: Cutter, tokenizer: Path, found: list[Bounds], texts: list[str]) -> int:
    """Axolotl makes of each row its full windows, then a tail, and no window with a false end; how many windows."""
    lengths, windows = axolotl_windows(texts, tokenizer, cutter.sequence_len)
    assert lengths == [length for row in found for length in [cutter.sequence_len] * row.windows + [row.tail]]
    assert len(windows) == sum(row.windows for row in found)
    assert all(cutter.eos not in window[1:] for window in windows)
    return len(windows)


@pytest.mark.parametrize("sequence_len", [64, 2048])
def test_axolotl_finds_exactly_the_stated_windows(tokenizer, novel, sequence_len):
    cutter = Cutter(tokenizer, sequence_len)
    found, texts = cut(cutter, novel)
    assert axolotl_agrees(cutter, tokenizer, found, texts) > 64 * 512 // sequence_len
    # Nothing is lost but the rest of each row's last words, and less than a row of one window more at the end.
    assert sum(row.tail for row in found) <= 12 * len(found)
    assert len(cutter.encode(novel[found[-1].start :]).ends) < (found[-1].windows + 1) * sequence_len
    assert {row.windows for row in found[:-1]} <= {MAX_WINDOWS}
    if sequence_len >= 512:  # a row ends with a word; with shorter windows, only with a short one
        assert all(novel[one.end : other.start].isspace() for one, other in itertools.pairwise(found))
    assert sum(row.windows for row in cut(cutter, novel, windows=5)[0]) == 5


def test_odd_text_is_counted_as_axolotl_counts_it(tokenizer, novel, monkeypatch):
    """Unspaced rubbish, emoji and Greek in byte tokens, newlines and spaces: counts hold, row by row."""
    monkeypatch.setattr("prep.rows.MAX_WINDOWS", 3)
    draw = random.Random(1)
    odd = ["x" * 3000, "🙂🚂" * 300, "Ἐν ἀρχῇ ἦν ὁ λόγος " * 40, "\n\n\n\n", "  ", "A.B.C." * 200, novel[5000:9000]]
    cutter = Cutter(tokenizer, 64)
    found, texts = cut(cutter, "".join(draw.choice(odd) for _ in range(80)))
    assert len(found) > 50 and axolotl_agrees(cutter, tokenizer, found, texts)


def test_words_tokenised_apart_have_the_tokens_of_the_whole_text(llama, novel, monkeypatch, tmp_path):
    """Spaces at the ends, several at once, the letter that stands for a space; words that are known, and that are not."""
    monkeypatch.setattr("prep.rows.KNOWN", 1000)
    settings = json.loads((llama / "tokenizer.json").read_text())
    settings["model"]["vocab"]["▁▁"] = len(settings["model"]["vocab"])  # Llama's has tokens of several spaces
    settings["model"]["merges"].insert(0, ["▁", "▁"])
    whole = Tokenizer.from_str(json.dumps(settings))
    cutter = Cutter(save(whole, tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), 64)
    words = novel[:40_000].split(" ")
    odd = ["", "mot ", " mot", "le  mot", "le   mot  mot", "le▁ mot", "le ▁mot", "le \n mot", "l'été 🙂 ἦν été"]
    odd.append(" ".join(words))
    for text in [*odd, *(" ".join(words[i:] + words[:i]) for i in range(0, len(words), 700)), *odd]:
        ends = [end for _, end in whole.encode(text, add_special_tokens=False).offsets]
        assert cutter.encode(text).ends.tolist() == ends


def test_a_row_whose_first_word_gives_fewer_tokens_is_lengthened_or_given_up(llama, monkeypatch):
    """After a newline ▁ is missing, at the start of a row it is there: the count of the row itself decides."""
    monkeypatch.setattr("prep.rows.MAX_WINDOWS", 1)
    cutter = Cutter(llama, 64)
    # Texts that end anywhere in a window, also just short of a full one.
    made = [cut(cutter, "\n".join(["maison"] * words), start=7) for words in range(20, 60)]
    bounds, rows = [row for found, _ in made for row in found], [text for _, texts in made for text in texts]
    assert axolotl_agrees(cutter, llama, bounds, rows) == len(bounds) > 40


def test_a_tail_never_makes_a_window_with_a_false_end(tokenizer, novel):
    """Texts of every length around a window's: EOS must not complete one."""
    cutter = Cutter(tokenizer, 64)
    ends = cutter.encode(novel).ends
    made = [cut(cutter, novel[: int(ends[last])]) for last in range(60, 132)]
    bounds, rows = [row for found, _ in made for row in found], [text for _, texts in made for text in texts]
    assert axolotl_agrees(cutter, tokenizer, bounds, rows) > 70
    assert not cut(cutter, "")[0] and not cut(cutter, "K. ouvrit la porte.")[0]


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    """What else is wrong with one: tests/test_bad_input.py."""
    with pytest.raises(BadInput, match="no end-of-sequence"):
        Cutter(save(gpt2_like(), tmp_path), 64)


# --- chunks and shares -----------------------------------------------------------------------------------------------


def test_chunks_are_equal_whole_paragraphs_and_complete():
    draw = random.Random(3)
    paragraphs = [("mot " * draw.randint(5, 200)).strip() + "." for _ in range(1500)]
    text = "\n\n".join(paragraphs)
    for splits in (1, 2, 3):
        parts = chunks(text, splits)
        assert len(parts) % splits == 0 and len(parts) >= len(text) / CHUNK
        assert "\n\n".join(parts) == text
        assert max(map(len, parts)) < 1.1 * min(map(len, parts)) <= 1.1 * CHUNK
    sentences = " ".join(["Il pleuvait encore."] * 30_000)
    assert all(part.endswith("encore.") and len(part) < 2 * CHUNK for part in chunks(sentences, 2))
    assert " ".join(chunks(sentences, 2)) == sentences
    words = chunks("mot " * 100_000 + "mot", 2)
    assert set(" ".join(words).split()) == {"mot"} and len(words) > 3
    assert "".join(chunks("x" * 300_000, 2)) == "x" * 300_000


def test_a_long_book_gives_no_more_windows_than_asked_of_it(llama, novel):
    """And all it has where more is asked, from one chunk after the other."""
    cutter = Cutter(llama, 512)
    entry = Entry(0, 0, "bpt1", "Contes", "", "1880", "contes", 0, 1.0, "")
    for most, used in ((5, 1), (60, 2), (10_000, 3)):
        made = list(document_rows(novel, entry, Share(1, 1), cutter, 1, most))
        assert len({row.part.split(" row")[0] for row in made}) == used
        assert sum(row.windows for row in made) == most or used == 3


# --- writing ---------------------------------------------------------------------------------------------------------


def some_rows(count: int, fails: bool = False):
    for i in range(count):
        yield Row(f"« Été » {i}\n\nœuvre", f"id{i}", "Titre", "", "1876-????", f"{i}", 2, 3)
    if fails:
        raise OSError(28, "No space left on device")


def write(out: Path, tokenizer: Path, train, heldout=()):
    rest: dict[str, Any] = {"source": {"path": "x"}, "arguments": {}, "seed": 1, "documents": {"read": 1}}
    return write_prepared(out, train, heldout, tokenizer=tokenizer, sequence_len=512, **rest)


def test_a_write_that_fails_leaves_the_files_before_and_the_manifest_is_renamed_last(llama, tmp_path):
    out = tmp_path / "2a.jsonl"
    write(out, llama, some_rows(5), some_rows(2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for train, heldout in ((some_rows(3, fails=True), ()), (some_rows(9), some_rows(3, fails=True))):
        with pytest.raises(OSError, match="No space"):
            write(out, llama, train, heldout)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and len(before) == 3
    # Where the manifest cannot take its place, the new rows are there and no manifest records them.
    other = tmp_path / "2b.jsonl"
    manifest_path(other).mkdir()
    with pytest.raises(OSError):
        write(other, llama, some_rows(5))
    assert other.exists() and heldout_path(other).exists()


def test_what_a_killed_write_left_goes_with_the_next_and_a_living_one_stays(tmp_path):
    script = "import sys; from prep.common import atomic_write\nwith atomic_write(sys.argv[1]) as f: f.write('half'); f.flush(); print(flush=True); input()"
    path = tmp_path / "rows [1].jsonl"
    writer = subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout and writer.stdout.readline()
    write_text(path, "whole\n")
    assert len(list(tmp_path.iterdir())) == 2 and path.read_text() == "whole\n"
    writer.kill()
    writer.communicate()
    write_text(path, "again\n")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "again\n"
