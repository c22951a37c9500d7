"""Gallica's rows: exact windows, whole works held out, disjoint shares, even spread, and what bad input gives."""

import gzip
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axolotl_preprocessing import axolotl_windows
from small_tokenizers import save_gpt2_like, save_llama_like, tales

import prep.drawing
from prep import corpus
from prep.common import BadInput, sha256
from prep.dedup import Entry
from prep.drawing import SEGMENT, Share, level, rows_of, segments, shares_of
from prep.executor import alone
from prep.gallica import main
from prep.rows import MAX_WINDOWS, Cutter, heldout_path, load_tokenizer, manifest_path
from prep.works import HeldOut, work_of

SCRIPT = Path(__file__).parent.parent / "prep" / "gallica.py"
CORPUS = os.environ.get("CORPUS_DIR")
needs_corpus = pytest.mark.skipif(not CORPUS, reason="CORPUS_DIR is not set: no real books to read")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama_like(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return save_gpt2_like(tmp_path_factory.mktemp("gpt2"))


def books() -> list[dict]:
    """The demo's tales as books: 15 of them, 15 kB each, one without author."""
    records = []
    for number, tale in enumerate(tales(), 1):
        head, _, text = tale.partition("\n\n")
        fields = dict(line.split(" : ", 1) for line in head.split("\n"))
        records.append(
            {
                "file_id": f"bpt{number:02d}",
                "title": fields["Titre"],
                "author": fields["Auteur"] if number != 3 else None,
                "date": fields["Date"] if number != 4 else "1876-????",
                "character_count": len(text),
                "complete_text": text,
            }
        )
    return records


def library(folder: Path, records: list[dict], files: int = 3) -> Path:
    """Write books into a few parquet files, dealt out like cards."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        pq.write_table(pa.Table.from_pylist(records[i::files], SCHEMA), folder / f"gallica_mono_{i + 1}.parquet")
    return folder


TEXTS = ("file_id", "title", "author", "date", "complete_text")
SCHEMA = pa.schema([(name, pa.string()) for name in TEXTS] + [("character_count", pa.int64())])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return library(tmp_path_factory.mktemp("source"), books())


def prepare(source: Path, tokenizer: Path, out: Path, **options) -> dict:
    """Run the script's main and return its manifest. Defaults: 512 tokens, everything, a fifth held out."""
    given = {"sequence_len": 512, "windows": "all", "holdout": 0.2, "workers": 1} | options
    argv = ["--source", str(source), "--tokenizer", str(tokenizer), "--out", str(out)]
    main(argv + [str(word) for key, value in given.items() for word in ("--" + key.replace("_", "-"), value)])
    return json.loads(manifest_path(out).read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def snippets(row: dict) -> set[str]:
    """Stretches of 80 characters, one beginning at every word: two passages that overlap have some in common."""
    text = row["text"]
    return {text[m.start() : m.start() + 80] for m in re.finditer(r"(?<!\S)\S", text[:-80])}


def all_snippets(path: Path) -> set[str]:
    return set().union(*map(snippets, rows(path)))


# --- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("sequence_len", [512, 2048])
def test_axolotl_finds_exactly_the_windows_asked_for(source, kind, sequence_len, tmp_path, request):
    tokenizer = request.getfixturevalue(kind)
    most = prepare(source, tokenizer, tmp_path / "all.jsonl", sequence_len=sequence_len)["train"]["windows"]
    assert most >= 10
    for wanted in (1, 9, most):
        out = tmp_path / f"{wanted}.jsonl"
        manifest = prepare(source, tokenizer, out, sequence_len=sequence_len, windows=wanted)
        assert manifest["train"]["windows"] == wanted
        for path, part in ((out, "train"), (heldout_path(out), "heldout")):
            lengths, windows = axolotl_windows([row["text"] for row in rows(path)], tokenizer, sequence_len)
            assert len(windows) == manifest[part]["windows"] > 0
            assert sum(lengths) == manifest[part]["tokens"] + manifest[part]["tail_tokens"]
            assert len(rows(path)) == manifest[part]["rows"]
            assert sha256(path) == manifest[part]["sha256"]


def test_too_small_a_corpus_says_how_much_it_has(source, llama, tmp_path):
    most = prepare(source, llama, tmp_path / "all.jsonl")["train"]["windows"]
    with pytest.raises(BadInput, match=f"gives {most} windows of 512 tokens to share 1/2"):
        prepare(source, llama, tmp_path / "2a.jsonl", windows=most + 1)
    with pytest.raises(BadInput, match="gives 0 windows of 16384 tokens"):
        prepare(source, llama, tmp_path / "2a.jsonl", sequence_len=16384)
    assert not list(tmp_path.glob("*2a*"))


def test_the_shares_have_no_passage_in_common(source, llama, gpt2, tmp_path):
    """Whatever else differs between the two runs."""
    a = prepare(source, llama, tmp_path / "2a.jsonl", split="1/2", seed=1)
    b = prepare(source, gpt2, tmp_path / "2b.jsonl", split="2/2", seed=2, sequence_len=2048)
    assert a["documents"]["used"] == b["documents"]["used"] == a["documents"]["kept"]
    first, second = all_snippets(tmp_path / "2a.jsonl"), all_snippets(tmp_path / "2b.jsonl")
    assert min(len(first), len(second)) > 5000
    assert not first & second
    prepare(source, llama, tmp_path / "again.jsonl", split="1/2", seed=3)
    assert first & all_snippets(tmp_path / "again.jsonl")


def test_no_passage_stands_twice(source, llama, tmp_path):
    prepare(source, llama, tmp_path / "2a.jsonl", split="1/1", sequence_len=64)
    found = rows(tmp_path / "2a.jsonl")
    assert len({(row["source"], row["part"]) for row in found}) == len(found) > 20
    for one, other in itertools.combinations(found, 2):
        assert not snippets(one) & snippets(other)


def test_no_held_out_text_is_trained_on(source, llama, gpt2, tmp_path):
    """Not in either file, with other seeds and lengths."""
    a = prepare(source, llama, tmp_path / "2a.jsonl", split="1/2", seed=1, heldout_windows=9)
    b = prepare(source, gpt2, tmp_path / "2b.jsonl", split="2/2", seed=2, sequence_len=2048)
    held, trained = set(), set()
    for stem in ("2a", "2b"):
        held |= {row["source"] for row in rows(tmp_path / f"{stem}.heldout.jsonl")}
        trained |= {row["source"] for row in rows(tmp_path / f"{stem}.jsonl")}
    assert len(held) == a["documents"]["heldout"] == b["documents"]["heldout"] == 4
    assert not held & trained
    texts = [record["complete_text"] for record in books() if record["file_id"] in held]
    plain = " ".join(" ".join(texts).replace("’", "'").split())
    for stem in ("2a", "2b"):
        for row in rows(tmp_path / f"{stem}.jsonl"):
            assert not any(piece in plain for piece in re.findall(r"[\w' ,-]{40,}", row["text"]))
        for row in rows(tmp_path / f"{stem}.heldout.jsonl"):
            assert any(piece in plain for piece in re.findall(r"[\w' ,-]{40,}", row["text"]))
    # As few as asked for, from as many books as there are.
    assert a["heldout"]["windows"] == 9
    assert len({row["source"] for row in rows(tmp_path / "2a.heldout.jsonl")}) == 4


def test_without_held_out_books_their_file_is_empty(source, llama, tmp_path):
    manifest = prepare(source, llama, tmp_path / "2a.jsonl", holdout=0)
    assert manifest["documents"]["used"] == 15
    assert manifest["heldout"]["rows"] == 0 and (tmp_path / "2a.heldout.jsonl").read_bytes() == b""


def test_same_seed_same_bytes_however_the_books_lie(source, llama, tmp_path):
    records = books()
    random.Random(5).shuffle(records)
    elsewhere = library(tmp_path / "shuffled", records, files=2)
    for name, folder, seed in (("a", source, 1), ("b", source, 1), ("c", elsewhere, 1), ("d", source, 2)):
        prepare(folder, llama, tmp_path / name / "2a.jsonl", windows=30, seed=seed)
    a, b, c, d = ((tmp_path / name / "2a.jsonl") for name in "abcd")
    assert a.read_bytes() == b.read_bytes() == c.read_bytes() != d.read_bytes()
    assert manifest_path(a).read_bytes() == manifest_path(b).read_bytes()
    assert heldout_path(a).read_bytes() == heldout_path(c).read_bytes()
    assert [{row["source"] for row in rows(heldout_path(path))} for path in (a, d)] == [
        {"bpt01", "bpt03", "bpt10", "bpt11"}
    ] * 2


def test_windows_are_drawn_evenly(source, llama, tmp_path):
    manifest = prepare(source, llama, tmp_path / "2a.jsonl", windows=25)
    assert manifest["documents"]["used"] == manifest["documents"]["kept"] == 11
    counts: Counter[str] = Counter()
    for row in rows(tmp_path / "2a.jsonl"):
        counts[row["source"]] += len(axolotl_windows([row["text"]], llama, 512)[1])
    assert sorted(counts.values()) == [2] * 8 + [3] * 3
    few = prepare(source, llama, tmp_path / "few.jsonl", windows=5)
    assert few["documents"]["used"] == 5


def test_lengths_that_promise_too_much_cost_a_second_cutting_only(llama, tmp_path, capsys, monkeypatch):
    records = books()
    for record in records[4:10]:
        record["complete_text"] = record["complete_text"][:5000]
    source = library(tmp_path / "source", records)
    prepare(source, llama, tmp_path / "a.jsonl", windows=25)
    assert "cutting again" not in capsys.readouterr().out
    monkeypatch.setattr(prep.drawing, "CHARACTERS_A_TOKEN", 0.5)
    assert prepare(source, llama, tmp_path / "b.jsonl", windows=25)["train"]["windows"] == 25
    assert "cutting again" in capsys.readouterr().out
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    with pytest.raises(BadInput, match="collect more"):
        prepare(source, llama, tmp_path / "c.jsonl", windows=400)


# --- the parts -------------------------------------------------------------------------------------------------------


def test_segments_are_equal_whole_paragraphs_and_complete():
    draw = random.Random(3)
    paragraphs = [("mot " * draw.randint(5, 200)).strip() + "." for _ in range(1500)]
    text = "\n\n".join(paragraphs)
    for splits in (1, 2, 3):
        cut = segments(text, splits)
        assert len(cut) % splits == 0 and len(cut) >= len(text) / SEGMENT
        assert "\n\n".join(cut) == text
        assert max(map(len, cut)) < 1.1 * min(map(len, cut)) <= 1.1 * SEGMENT
    halves = segments("\n\n".join(paragraphs[:20]), 2)
    assert len(halves) == 2 and "\n\n".join(halves) == "\n\n".join(paragraphs[:20])


def test_a_book_without_paragraphs_is_cut_at_sentences_or_words():
    sentences = " ".join(["Il pleuvait encore."] * 30_000)
    assert all(part.endswith("encore.") and len(part) < 2 * SEGMENT for part in segments(sentences, 2))
    assert " ".join(segments(sentences, 2)) == sentences
    words = segments("mot " * 100_000 + "mot", 2)
    assert set(" ".join(words).split()) == {"mot"} and len(words) > 3
    assert "".join(segments("x" * 300_000, 2)) == "x" * 300_000


def test_every_share_takes_its_own_segments_and_begins_by_the_work():
    text = "\n\n".join("mot " * 100 for _ in range(3000))
    cut = segments(text, 2)
    starts = set()
    for work in map(str, range(20)):
        taken = [{name: piece for name, piece in Share(k, 2).segments(text, work, "id", 7)} for k in (1, 2)]
        assert len(taken[0]) == len(taken[1]) == len(cut) / 2
        names = sorted(name.split("segment ")[1] for part in taken for name in part)
        assert names == [f"{i + 1:03d}/{len(cut):03d}" for i in range(len(cut))]
        starts.add(min(taken[0]))
    assert len(starts) == 2
    orders = {tuple(name for name, _ in Share(1, 2).segments(text, "work", "id", seed)) for seed in range(5)}
    assert len(orders) > 1


def test_a_long_book_gives_no_more_windows_than_asked_of_it(llama):
    """And all it has where more is asked, from one segment after the other."""
    cutter = Cutter(load_tokenizer(llama), 512)
    book = Entry(0, 0, "bpt1", "Contes", "", "1880", "contes", 0, 1.0, "")
    text = " ".join("\n\n".join(tale.replace("\n", "\n\n") for tale in tales()).split(" "))
    named = Share(1, 1).segments(text, "contes", book.source, 1)
    assert len(named) == 3
    for most, segments_used in ((5, 1), (60, 2), (10_000, 3)):
        made = list(rows_of(book, list(named), cutter, most))
        assert len({row.part.split(" passage")[0] for row in made}) == segments_used
        assert sum(row.windows for row in made) == most or segments_used == 3
        assert max(row.windows for row in made) == min(most, MAX_WINDOWS)


@pytest.mark.parametrize(
    "titles",
    [
        ("Une Vie", "Une vie : l'humble vérité", "UNE VIE (nouvelle édition)", "Une vie, roman"),
        ("Le château de Pinon I", "Le château de Pinon. II", "Chateau de Pinon (Le). Tome 2"),
        ("Les Misérables. Tome 1, Fantine", "les miserables / Victor Hugo", "Les misérables. T. V"),
        ("La Sœur du Soleil (L'Usurpateur)", "La soeur du soleil"),
        ("Du côté de chez Swann", "DU COTE DE CHEZ SWANN"),
        ("[Sans titre]", "(Sans titre)"),
    ],
)
def test_editions_are_one_work(titles):
    assert len({work_of(title, f"id{i}") for i, title in enumerate(titles)}) == 1


def test_other_works_are_other_works():
    titles = ["Une Vie", "Bel-Ami", "813 (Huit-Cent-Treize)", "93", "[Sans titre]", "Monsieur Lecoq", "L'amie", "I"]
    assert len({work_of(title, "id") for title in titles}) == len(titles)
    assert work_of("", "bpt1") != work_of("", "bpt2")
    assert work_of("???", "bpt1") == "bpt1"


def test_a_share_of_all_works_is_held_out_and_never_none():
    works = [f"oeuvre {i}" for i in range(20_000)]
    held_out = HeldOut(0.01, works)
    assert 150 < sum(map(held_out, works)) < 250
    # A smaller corpus, a larger share: the same works stay on their side.
    assert all(HeldOut(0.02, works[:9])(work) for work in works if held_out(work))
    few = works[:5]
    assert sum(map(HeldOut(1e-9, few), few)) == 1
    assert not any(map(HeldOut(0, few), few))


def test_shares_are_as_even_as_lengths_allow():
    draw = np.random.default_rng(1)
    for _ in range(200):
        available = draw.integers(0, 12, size=draw.integers(1, 9)).tolist()
        order = draw.random(len(available)).tolist()
        wanted = int(draw.integers(0, sum(available) + 1))
        taken = shares_of(available, order, wanted)
        assert sum(taken) == wanted
        assert all(0 <= t <= a for t, a in zip(taken, available, strict=True))
        # Whoever could give more gives at most one less than the one who gives most.
        assert all(t >= max(taken) - 1 for t, a in zip(taken, available, strict=True) if t < a)
    assert shares_of([5, 5, 5], [0.3, 0.1, 0.2], 4) == [1, 2, 1]
    assert level(np.array([1, 2]), 4) is None


# --- what a dump also holds ------------------------------------------------------------------------------------------


def test_unusable_books_are_counted_by_reason_and_odd_fields_do_no_harm(llama, tmp_path):
    good = books()
    odd: list[dict] = [
        {"file_id": "tiny", "title": "Une Vie", "complete_text": "Illisible."},
        {"file_id": "null", "title": "Rien", "complete_text": None},
        {"file_id": "blank", "title": "Blanc", "complete_text": " \n \n"},
        {"file_id": None, "title": "Sans numéro", "complete_text": good[0]["complete_text"]},
        {"file_id": "bpt02", "title": "Le Ver", "complete_text": good[1]["complete_text"]},
    ]
    good[7]["complete_text"] += "</s>"
    good[4] |= {"title": None, "author": None, "date": None, "character_count": -1}
    good[5] |= {"title": "Un\ntitre " * 2000, "date": "18--?", "character_count": 10**17}
    folder = library(tmp_path / "source", good + odd)
    manifest = prepare(folder, llama, tmp_path / "2a.jsonl")
    documents = manifest["documents"]
    assert documents["rejected"] == {
        "identifier seen before": 1,
        "no identifier": 1,
        "no text": 2,
        "special token in text": 1,
        "too short": 1,
    }
    assert documents["read"] == 20
    assert documents["read"] == documents["kept"] + documents["heldout"] + sum(documents["rejected"].values())
    found = {row["source"]: row for row in rows(tmp_path / "2a.jsonl") + rows(tmp_path / "2a.heldout.jsonl")}
    assert len(found) == 14
    assert [found["bpt05"][field] for field in ("title", "author", "date")] == ["", "", ""]
    assert found["bpt03"]["author"] == "" and found["bpt04"]["date"] == "1876-????"
    assert len(found["bpt06"]["title"]) == 300 and "\n" not in found["bpt06"]["title"]


def test_a_text_that_is_no_utf8_is_rejected(llama, tmp_path):
    records = books()
    texts = [record["complete_text"].encode() for record in records]
    texts[0] = b"\xff\xfe" + texts[0]
    columns = {name: pa.array([record[name] for record in records]) for name in SCHEMA.names if name != "complete_text"}
    columns["complete_text"] = pa.array(texts, pa.binary()).view(pa.string())
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "source" / "a.parquet")
    assert prepare(tmp_path / "source", llama, tmp_path / "2a.jsonl")["documents"]["rejected"] == {"no text": 1}


def test_only_text_and_identifier_are_needed(llama, tmp_path):
    table = pa.Table.from_pylist(books(), SCHEMA).select(["complete_text", "file_id"])
    (tmp_path / "source").mkdir()
    pq.write_table(table, tmp_path / "source" / "a.parquet")
    assert prepare(tmp_path / "source", llama, tmp_path / "2a.jsonl", windows=9)["train"]["windows"] == 9


# --- bad input -------------------------------------------------------------------------------------------------------


def damaged(folder: Path, how: str) -> Path:
    path = library(folder, books(), files=1) / "gallica_mono_1.parquet"
    table, data = pq.read_table(path), path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "no parquet":
        path.write_text("<html>404</html>")
    elif how == "rotten":  # a whole footer, and a hole in the pages
        path.write_bytes(data[:20_000] + b"\0" * 20_000 + data[40_000:])
    elif how == "no text column":
        pq.write_table(table.drop_columns(["complete_text"]), path)
    elif how == "no identifier column":
        pq.write_table(table.drop_columns(["file_id"]), path)
    elif how == "numbers for text":
        pq.write_table(
            table.drop_columns(["complete_text"]).append_column("complete_text", table["character_count"]), path
        )
    elif how == "empty":
        path.unlink()
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", r"no file of books in .*source.*: collect"),
        ("truncated", r"gallica_mono_1\.parquet is no whole parquet"),
        ("no parquet", r"gallica_mono_1\.parquet is no whole parquet"),
        ("rotten", r"gallica_mono_1\.parquet is damaged"),
        ("no text column", "no column complete_text"),
        ("no identifier column", "no column file_id"),
        ("numbers for text", "column complete_text is int64, not text"),
    ],
)
def test_a_bad_source_is_one_clear_error(how, message, llama, tmp_path):
    folder = damaged(tmp_path / "source", how)
    with pytest.raises(BadInput, match=message):
        prepare(folder, llama, tmp_path / "data" / "2a.jsonl")
    assert not list((tmp_path / "data").glob("2a*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "at least 1"),
        ({"heldout_windows": 0}, "at least 1"),
        ({"holdout": 0.9}, "between 0 and 0.5"),
        ({"sequence_len": 8}, "too short"),
        ({"holdout": 0.07, "sequence_len": 16384}, "0 windows"),
    ],
)
def test_bad_arguments(options, message, source, llama, tmp_path):
    with pytest.raises(BadInput, match=message):
        prepare(source, llama, tmp_path / "2a.jsonl", **options)


@pytest.mark.parametrize("options", [{"split": "3/2"}, {"split": "0/2"}, {"split": "x"}, {"windows": "many"}])
def test_arguments_that_cannot_be_read(options, source, llama, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare(source, llama, tmp_path / "2a.jsonl", **options)
    assert stop.value.code == 2 and "invalid" in capsys.readouterr().err


def test_missing_tokenizer_and_wrong_name(source, llama, tmp_path):
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        prepare(source, tmp_path / "nowhere", tmp_path / "2a.jsonl")
    with pytest.raises(BadInput, match=r"must end in \.jsonl"):
        prepare(source, llama, tmp_path / "2a.json")


def command(source: Path, tokenizer: Path, out: Path, *more: str) -> list[str]:
    given = ["--source", source, "--tokenizer", tokenizer, "--out", out, "--sequence-len", 512, "--windows", 30]
    return [sys.executable, str(SCRIPT), *map(str, given), *more]


def prepared(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("limit", [5_000, 150_000])
def test_a_full_disk_leaves_what_was_there(limit, source, llama, tmp_path):
    """A limit on the size of files stands in for the disk's end: in the corpus, in its cut rows, in the rows."""
    out = tmp_path / "data" / "2a.jsonl"
    prepare(source, llama, out, windows=10)
    before = prepared(out.parent)

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command(source, llama, out, "--holdout", "0.3"), preexec_fn=small, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("gallica.py: ") and "Traceback" not in done.stderr
    assert prepared(out.parent) == before
    prepare(source, llama, out, windows=30, holdout=0.3)
    assert prepared(out.parent) != before


def test_killed_it_goes_on_to_the_same_bytes(source, llama, tmp_path):
    """bench/prep_kill.py does the same at many moments."""
    out, undisturbed = tmp_path / "data" / "2a.jsonl", tmp_path / "other" / "2a.jsonl"
    prepare(source, llama, undisturbed, windows=30, holdout=0.01)
    words = command(source, llama, out, "--workers", "2")
    with subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr
        heard = b""
        while b"1/3" not in heard:
            heard += process.stderr.read(1)
        os.killpg(process.pid, signal.SIGKILL)
    assert not prepared(out.parent)
    main(words[2:])
    assert prepared(out.parent) == prepared(undisturbed.parent)
    assert not list(out.parent.glob("gallica/*/rows-*"))


def test_two_commands_do_not_work_in_one_folder(source, llama, tmp_path):
    out = tmp_path / "2a.jsonl"
    prepare(source, llama, out)
    [corpus] = (tmp_path / "gallica").iterdir()
    with alone(corpus), pytest.raises(BadInput, match="another command is at work"):
        prepare(source, llama, out)


def test_other_arguments_are_another_corpus(source, llama, tmp_path):
    """And the same ones are not made twice."""
    out = tmp_path / "2a.jsonl"
    prepare(source, llama, out)
    [corpus] = (tmp_path / "gallica").iterdir()
    made = (corpus / "chosen.jsonl").stat().st_mtime_ns
    prepare(source, llama, out, split="2/2", sequence_len=64, seed=3)
    assert (corpus / "chosen.jsonl").stat().st_mtime_ns == made
    prepare(source, llama, out, holdout=0.3)
    assert len(list((tmp_path / "gallica").iterdir())) == 2


# --- real books ------------------------------------------------------------------------------------------------------


@needs_corpus
@pytest.mark.parametrize(("sequence_len", "windows", "split"), [(512, 1000, "1/2"), (2048, 250, "2/2")])
def test_real_books(sequence_len, windows, split, tmp_path):
    assert CORPUS
    source, tokenizer = Path(CORPUS) / "gallica", Path(CORPUS) / "tokenizer"
    out = tmp_path / "2x.jsonl"
    manifest = prepare(source, tokenizer, out, sequence_len=sequence_len, windows=windows, split=split, holdout=0.05)
    documents = manifest["documents"]
    assert documents["read"] == 53
    reasons = {"near-duplicate": 1, "not French": 1, "too short": 1, "unreadable scan": 1}
    assert documents["rejected"] == reasons
    for reason, name in zip(reasons, ("bpt6kdup0001", "bpt6keng0001", "bpt6ktiny001", "bpt6kocr0001"), strict=True):
        [path] = (tmp_path / "gallica").glob(f"*/rejected/{reason}/*.jsonl.gz")
        assert [json.loads(line)["id"] for line in gzip.decompress(path.read_bytes()).splitlines()] == [name]
    assert documents["used"] == documents["kept"]
    lengths, kept = axolotl_windows([row["text"] for row in rows(out)], tokenizer, sequence_len)
    assert len(kept) == windows
    assert sum(lengths) == manifest["train"]["tokens"] + manifest["train"]["tail_tokens"]
    trained, held = ({row["source"] for row in rows(path)} for path in (out, heldout_path(out)))
    assert held and not trained & held
    anonymous = [row for row in rows(out) + rows(heldout_path(out)) if row["title"] == "Le château de Pinon I"]
    assert {(row["author"], row["date"]) for row in anonymous} == {("", "1876-????")}


def test_the_corpus_hangs_on_the_code_that_decides_it() -> None:
    """All that corpus.py imports of prep/, down to the last, but what runs it, writes it, or only names versions."""
    found, waiting = set(), {"corpus"}
    while waiting:
        name = waiting.pop()
        found.add(name)
        text = (Path(corpus.__file__).with_name(f"{name}.py")).read_text()
        waiting |= set(re.findall(r"^from prep\.(\w+) import", text, re.M)) - found
    assert found - {"engine", "files", "rows"} == set(corpus.CODE)
