"""Rows and manifest: windows as Axolotl's own code counts them, for both kinds of tokenizer."""

import hashlib
import itertools
import json
import random
from pathlib import Path

import pytest
from axolotl_preprocessing import axolotl_windows
from small_tokenizers import gpt2_like, save, save_gpt2_like, save_llama_like, tales

from prep.common import BadInput
from prep.drawing import Cutting, Pool
from prep.rows import MAX_WINDOWS, Cutter, Passage, Row, heldout_path, load_tokenizer, manifest_path, write_prepared


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer") / request.param
    return save_llama_like(place) if request.param == "llama" else save_gpt2_like(place)


@pytest.fixture(scope="module")
def novel() -> str:
    """230 kB of French, far beyond the 64 windows at which Axolotl truncates a row."""
    return "\n\n".join(paragraph for tale in tales() for paragraph in tale.split("\n") if paragraph.strip())


def slices(passages: list[Passage], sequence_len: int) -> list[int]:
    """The slices that passages say Axolotl will make: full windows, then a tail."""
    return [length for p in passages for length in [sequence_len] * p.windows + [p.tail]]


@pytest.mark.parametrize("sequence_len", [64, 512, 2048])
def test_axolotl_finds_exactly_the_stated_windows(folder, novel, sequence_len):
    cutter = Cutter(load_tokenizer(folder), sequence_len)
    passages = cutter.cut(cutter.encode([novel])[0])
    texts = [novel[p.start : p.end] for p in passages]
    lengths, windows = axolotl_windows(texts, folder, sequence_len)
    assert sum(p.windows for p in passages) == len(windows) > 64 * 512 // sequence_len
    assert {len(window) for window in windows} == {sequence_len}
    assert lengths == slices(passages, sequence_len)
    assert all(cutter.eos not in window[1:] for window in windows)
    # Nothing is wasted: what is not in a window is the last words' rest, and one window's worth at the end.
    assert sum(p.tail for p in passages) <= 12 * len(passages)
    assert len(cutter.encode([novel[passages[-1].start :]])[0].ends) < (passages[-1].windows + 1) * sequence_len


def test_a_novel_in_one_row_would_lose_its_end(folder, novel):
    """The reason for short rows; fails the day Axolotl no longer truncates."""
    assert len(axolotl_windows([novel], folder, 512)[1]) == 64
    cutter = Cutter(load_tokenizer(folder), 512)
    assert sum(p.windows for p in cutter.cut(cutter.encode([novel])[0])) > 100


def test_passages_follow_one_another_and_stay_within_bounds(folder, novel):
    cutter = Cutter(load_tokenizer(folder), 512)
    tokens = cutter.encode([novel])[0]
    passages = cutter.cut(tokens)
    assert passages[0].start == 0
    assert {p.windows for p in passages[:-1]} == {MAX_WINDOWS} and passages[-1].windows <= MAX_WINDOWS
    for before, after in itertools.pairwise(passages):
        assert novel[before.end : after.start].isspace()
    assert sum(p.windows for p in cutter.cut(tokens, windows=21)) == 21
    assert [p.windows for p in cutter.cut(tokens, windows=21, longest=8)] == [8, 8, 5]
    start = cutter.cut(tokens, novel.index("\n\n", 10_000))[0].start
    assert novel[start - 2 : start] == "\n\n"


def test_odd_text_is_counted_as_axolotl_counts_it(folder, novel):
    """Unspaced rubbish, emoji and Greek in byte tokens, runs of newlines: counts hold, row by row."""
    draw = random.Random(1)
    odd = ["x" * 3000, "🙂🚂" * 300, "Ἐν ἀρχῇ ἦν ὁ λόγος " * 40, "\n\n\n\n", "  ", "A.B.C." * 200, novel[5000:9000]]
    text = "".join(draw.choice(odd) for _ in range(80))
    cutter = Cutter(load_tokenizer(folder), 64)
    passages = cutter.cut(cutter.encode([text])[0], longest=3)
    assert len(passages) > 50
    lengths, _ = axolotl_windows([text[p.start : p.end] for p in passages], folder, 64)
    assert lengths == slices(passages, 64)


def test_a_row_whose_first_word_gives_fewer_tokens_is_lengthened_or_given_up(tmp_path):
    """After a newline ▁ is missing, at the start of a row it is there: the count of the row itself decides."""
    folder = save_llama_like(tmp_path)
    cutter = Cutter(load_tokenizer(folder), 64)
    rows, passages = [], []
    for words in range(20, 60):  # texts that end anywhere in a window, also just short of a full one
        text = "\n".join(["maison"] * words)
        found = cutter.cut(cutter.encode([text])[0], start=7, longest=1)
        passages += found
        rows += [text[p.start : p.end] for p in found]
    lengths, windows = axolotl_windows(rows, folder, 64)
    assert len(windows) == len(passages) > 40
    assert lengths == slices(passages, 64)
    assert all(cutter.eos not in window for window in windows)


def test_too_short_a_text_gives_no_passage(folder):
    cutter = Cutter(load_tokenizer(folder), 64)
    assert [cutter.cut(tokens) for tokens in cutter.encode(["", "K. ouvrit la porte."])] == [[], []]


def test_a_tail_never_makes_a_window_with_a_false_end(folder, novel):
    """Texts of every length around a window's: EOS must not complete one."""
    cutter = Cutter(load_tokenizer(folder), 64)
    tokens = cutter.encode([novel])[0]
    rows = []
    for last in range(60, 132):
        text = novel[: int(tokens.ends[last])]
        rows += [text[p.start : p.end] for p in cutter.cut(cutter.encode([text])[0])]
    _, windows = axolotl_windows(rows, folder, 64)
    assert len(windows) > 70
    assert all(cutter.eos not in window[1:] for window in windows)


def test_word_start_is_the_nearest(folder, novel):
    cutter = Cutter(load_tokenizer(folder), 64)
    tokens = cutter.encode([novel])[0]
    for index in range(300, 2000, 37):
        start = cutter.word_start(tokens, index)
        assert not novel[start].isspace() and novel[start - 1].isspace()
        assert abs(len(cutter.encode([novel[:start]])[0].ends) - index) <= 4


def test_tokenizers_that_cannot_serve(tmp_path):
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "nothing")
    broken = save_gpt2_like(tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_tokenizer(broken)
    with pytest.raises(BadInput, match="no end-of-sequence"):
        load_tokenizer(save(gpt2_like(), tmp_path / "endless"))
    with pytest.raises(BadInput, match="too short"):
        Cutter(load_tokenizer(save_gpt2_like(tmp_path / "good")), 32)


# --- writing ---------------------------------------------------------------------------------------------------------


def some_rows(count: int, windows: int = 2):
    for i in range(count):
        yield Row(f"« Été » {i}\n\nœuvre", f"id{i}", "Titre", "", "1876-????", f"{i}", windows, 3)


def write(out: Path, tokenizer: Path, train, heldout=()):
    return write_prepared(
        out,
        train,
        heldout,
        tokenizer=tokenizer,
        sequence_len=512,
        source={"path": "x"},
        arguments={},
        seed=1,
        documents={"read": 1},
    )


def contents(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in (out, heldout_path(out), manifest_path(out))]


def test_the_manifest_describes_the_files(folder, tmp_path):
    out = tmp_path / "data" / "2a.jsonl"
    manifest = write(out, folder, some_rows(5), some_rows(2))
    assert json.loads(manifest_path(out).read_text()) == manifest
    for part, path in (("train", out), ("heldout", tmp_path / "data" / "2a.heldout.jsonl")):
        data = path.read_bytes()
        said = manifest[part]
        assert (said["path"], said["bytes"]) == (path.name, len(data))
        assert said["sha256"] == hashlib.sha256(data).hexdigest()
        assert said["rows"] == data.count(b"\n")
        assert (said["windows"], said["tokens"]) == (2 * said["rows"], 1024 * said["rows"])
        assert said["tail_tokens"] == 3 * said["rows"]
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    first = json.loads(out.read_text().splitlines()[0])
    assert list(first) == ["text", "source", "title", "author", "date", "part"]
    assert first["text"] == "« Été » 0\n\nœuvre"


def test_the_same_rows_give_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "2a.jsonl", folder, some_rows(5), some_rows(2))
    assert contents(tmp_path / "a" / "2a.jsonl") == contents(tmp_path / "b" / "2a.jsonl")


def test_a_write_that_fails_leaves_the_files_before(folder, tmp_path):
    out = tmp_path / "2a.jsonl"
    write(out, folder, some_rows(5), some_rows(2))
    before = contents(out)

    def failing():
        yield from some_rows(3)
        raise OSError(28, "No space left on device")

    for train, heldout in ((failing(), ()), (some_rows(9), failing())):
        with pytest.raises(OSError, match="No space"):
            write(out, folder, train, heldout)
        assert contents(out) == before
        assert len(list(tmp_path.iterdir())) == 3


def test_a_manifest_is_renamed_last(folder, tmp_path):
    """Where the manifest cannot take its place, the new rows are there and no manifest vouches for them."""
    out = tmp_path / "2a.jsonl"
    manifest_path(out).mkdir()
    with pytest.raises(OSError):
        write(out, folder, some_rows(5))
    assert out.exists() and heldout_path(out).exists()
    with pytest.raises(BadInput, match=r"\.jsonl"):
        write(tmp_path / "2a.txt", folder, some_rows(1))


def test_a_row_that_cannot_be_shortened_is_an_error(tmp_path):
    """A word of more than a window: the windows it lies in are taken together or not at all."""
    cutter = Cutter(load_tokenizer(save_llama_like(tmp_path / "tokenizer")), 64)
    prose = tales()[0].partition("\n\n")[2]
    text = f"{prose[:400]} {'qwzx' * 100}"
    [whole] = cutter.passages(text)
    assert whole.windows > 2
    row = Row(text[: whole.end], "ark", "", "", "", "1", whole.windows, whole.tail)
    (tmp_path / "00000.rows").write_text(json.dumps(row) + "\n")
    pool = Pool([Cutting(0.5, "work", 9, [(0, 0, whole.windows)])])
    drawn: dict[int, Row | None] = {}
    for windows in range(1, whole.windows + 1):
        try:
            [drawn[windows]] = pool.draw([windows], tmp_path, cutter, 42)
        except BadInput as error:
            assert f"cannot be cut to {windows} of its {whole.windows} windows" in str(error)
            drawn[windows] = None
    assert drawn[whole.windows] == row and drawn[whole.windows - 1] is None
    shortened = drawn[1]
    assert shortened and shortened.windows == 1 and text.startswith(shortened.text)
    assert cutter.count(shortened.text) == 64 + shortened.tail
