"""Gallica's rows: exact windows, whole works held out, disjoint shares, even spread, and what bad input gives."""

import gzip
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axolotl_preprocessing import axolotl_windows
from small_library import books, library, prepare, rows, snippets, words

from prep.common import BadInput, digest, sha256
from prep.dedup import held_out, work_of
from prep.gallica import CORPUS_VERSION, main
from prep.rows import heldout_path, manifest_path

SCRIPT = Path(__file__).parent.parent / "prep" / "gallica.py"
CORPUS = os.environ.get("CORPUS_DIR", "")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return library(tmp_path_factory.mktemp("source"), books())


@pytest.fixture(scope="module")
def made(source, llama, tmp_path_factory) -> Path:
    """30 windows, as any run of the same command makes them. Read them, do not change them."""
    out = tmp_path_factory.mktemp("made") / "2a.jsonl"
    prepare(source, llama, out, windows=30)
    return out


@pytest.fixture
def out(made, tmp_path) -> Path:
    """The same, to spoil."""
    return shutil.copytree(made.parent, tmp_path / "data") / made.name


def prepared(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def all_snippets(path: Path) -> set[str]:
    return set().union(*map(snippets, rows(path)))


def sources(path: Path) -> set[str]:
    return {row["source"] for row in rows(path)}


# --- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "sequence_len"), [("llama", 512), ("gpt2", 2048)])
def test_axolotl_finds_exactly_the_windows_asked_for(source, kind, sequence_len, tmp_path, request):
    tokenizer = request.getfixturevalue(kind)
    most = prepare(source, tokenizer, tmp_path / "all.jsonl", sequence_len=sequence_len)["train"]["windows"]
    assert most >= 10
    for wanted in (1, 9, most):
        out = tmp_path / f"{wanted}.jsonl"
        manifest = prepare(source, tokenizer, out, sequence_len=sequence_len, windows=wanted)
        assert manifest["train"]["windows"] == wanted
        assert manifest["documents"]["used"] == min(wanted, manifest["documents"]["kept"])  # evenly drawn
        for path, part in ((out, "train"), (heldout_path(out), "heldout")):
            lengths, windows = axolotl_windows([row["text"] for row in rows(path)], tokenizer, sequence_len)
            assert len(windows) == manifest[part]["windows"] > 0
            assert sum(lengths) == manifest[part]["tokens"] + manifest[part]["tail_tokens"]
            assert len(rows(path)) == manifest[part]["rows"]
            written = {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            assert written.items() <= manifest[part].items()
        assert manifest["tokenizer"]["sha256"] == sha256(tokenizer / "tokenizer.json")


def test_too_small_a_corpus_says_how_much_it_has(source, llama, tmp_path):
    most = prepare(source, llama, tmp_path / "all.jsonl")["train"]["windows"]
    with pytest.raises(BadInput, match=f"gives {most} windows of 512 tokens to share 1/2"):
        prepare(source, llama, tmp_path / "2a.jsonl", windows=most + 1)
    with pytest.raises(BadInput, match=r"gives 0 windows of 16384 tokens.*wanted\. The books were too short"):
        prepare(source, llama, tmp_path / "2a.jsonl", sequence_len=16384)
    assert not list(tmp_path.glob("*2a*")) and not list(tmp_path.glob("gallica/*/rows-*"))


def test_shares_and_held_out_books_have_nothing_in_common(source, llama, gpt2, tmp_path):
    """Whatever else differs between the two runs: tokenizer, length, seed."""
    one, other = tmp_path / "2a.jsonl", tmp_path / "2b.jsonl"
    a = prepare(source, llama, one, split="1/2", seed=1, heldout_windows=9)
    b = prepare(source, gpt2, other, split="2/2", seed=2, sequence_len=2048)
    assert a["documents"]["used"] == b["documents"]["used"] == a["documents"]["kept"]
    assert min(len(all_snippets(one)), len(all_snippets(other))) > 5000
    assert not all_snippets(one) & all_snippets(other)

    # As few held-out windows as asked for, from as many books as there are.
    assert a["heldout"]["windows"] == 9 and len(sources(heldout_path(one))) == 4
    held = sources(heldout_path(one)) | sources(heldout_path(other))
    assert len(held) == a["documents"]["heldout"] == b["documents"]["heldout"] == 4
    texts = [record["complete_text"] for record in books() if record["file_id"] in held]
    plain = " ".join(" ".join(texts).replace("’", "'").split())
    for path in (one, other):
        assert not held & sources(path)
        for expected, found in ((False, rows(path)), (True, rows(heldout_path(path)))):
            for row in found:
                assert any(piece in plain for piece in re.findall(r"[\w' ,-]{40,}", row["text"])) is expected


def test_no_text_is_drawn_twice_and_without_held_out_books_their_file_is_empty(source, llama, tmp_path):
    manifest = prepare(source, llama, tmp_path / "2a.jsonl", split="1/1", sequence_len=64, holdout=0)
    assert manifest["documents"]["used"] == 15
    assert manifest["heldout"]["rows"] == 0 and (tmp_path / "2a.heldout.jsonl").read_bytes() == b""
    found = rows(tmp_path / "2a.jsonl")
    assert len({(row["source"], row["part"]) for row in found}) == len(found) > 20
    for one, other in itertools.combinations(map(snippets, found), 2):
        assert not one & other


def test_the_same_bytes_however_the_books_lie_and_others_by_another_seed(source, made, llama, tmp_path):
    records = books()
    random.Random(5).shuffle(records)
    shuffled, other = tmp_path / "2a.jsonl", tmp_path / "2b.jsonl"
    prepare(library(tmp_path / "books", records, files=2), llama, shuffled, windows=30)
    prepare(source, llama, other, windows=30, seed=2)
    assert shuffled.read_bytes() == made.read_bytes() != other.read_bytes()
    assert heldout_path(shuffled).read_bytes() == heldout_path(made).read_bytes()
    assert sources(heldout_path(made)) == sources(heldout_path(other)) == {"bpt01", "bpt03", "bpt10", "bpt11"}


def test_windows_are_drawn_evenly(made, llama):
    documents = json.loads(manifest_path(made).read_text(encoding="utf-8"))["documents"]
    assert documents["used"] == documents["kept"] == 11
    counts: Counter[str] = Counter()
    for row in rows(made):
        counts[row["source"]] += len(axolotl_windows([row["text"]], llama, 512)[1])
    assert sorted(counts.values()) == [2] * 3 + [3] * 8


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "titles",
    [
        ("Une Vie", "Une vie : l'humble vérité", "UNE VIE (nouvelle édition)", "Une vie, roman"),
        ("Le château de Pinon I", "Le château de Pinon. II", "Chateau de Pinon (Le). Tome 2"),
        ("Les Misérables. Tome 1, Fantine", "les miserables / Victor Hugo", "Les misérables. T. V"),
        ("La Sœur du Soleil (L'Usurpateur)", "La soeur du soleil"),
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
    held = held_out(works, 0.01)
    assert 150 < len(held) < 250
    # A smaller corpus, a larger share: the same works stay on their side.
    assert held & set(works[:9000]) == held_out(works[:9000], 0.01) <= held_out(works, 0.02)
    assert len(held_out(works[:5], 1e-9)) == 1
    assert not held_out(works, 0) and not held_out([], 0.1)


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
    documents = prepare(folder, llama, tmp_path / "2a.jsonl")["documents"]
    assert documents["rejected"] == {
        "identifier seen before": 1,
        "no identifier": 1,
        "no text": 2,
        "special token in text": 1,
        "too short": 1,
    }
    assert 20 == documents["read"] == documents["kept"] + documents["heldout"] + sum(documents["rejected"].values())
    found = {row["source"]: row for row in rows(tmp_path / "2a.jsonl") + rows(tmp_path / "2a.heldout.jsonl")}
    assert len(found) == 14
    assert [found["bpt05"][field] for field in ("title", "author", "date")] == ["", "", ""]
    assert found["bpt03"]["author"] == "" and found["bpt04"]["date"] == "1876-????"
    assert len(found["bpt06"]["title"]) == 300 and "\n" not in found["bpt06"]["title"]


def test_a_text_that_is_no_utf8_is_rejected_and_only_text_and_identifier_are_needed(llama, tmp_path):
    records = books()
    texts = [record["complete_text"].encode() for record in records]
    texts[0] = b"\xff\xfe" + texts[0]
    columns = {"file_id": pa.array([record["file_id"] for record in records])}
    columns["complete_text"] = pa.array(texts, pa.binary()).view(pa.string())
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "source" / "a.parquet")
    manifest = prepare(tmp_path / "source", llama, tmp_path / "2a.jsonl", windows=9)
    assert manifest["documents"]["rejected"] == {"no text": 1} and manifest["train"]["windows"] == 9


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_bad_source_is_one_clear_error(llama, tmp_path):
    path = library(tmp_path / "source", books(), files=1) / "gallica_mono_1.parquet"
    table, data = pq.read_table(path), path.read_bytes()
    without = table.drop_columns(["complete_text"])
    for made, message in (
        (data[: len(data) // 2], r"gallica_mono_1\.parquet is damaged"),
        (data[:20_000] + bytes(20_000) + data[40_000:], r"gallica_mono_1\.parquet is damaged"),  # a hole in the pages
        (without, "no column complete_text"),
        (table.drop_columns(["file_id"]), "no column file_id"),
        (without.append_column("complete_text", table["character_count"]), "column complete_text is int64, not text"),
    ):
        path.write_bytes(made) if isinstance(made, bytes) else pq.write_table(made, path)
        with pytest.raises(BadInput, match=message):
            prepare(path.parent, llama, tmp_path / "data" / "2a.jsonl")
        assert not list((tmp_path / "data").glob("2a*"))


def test_books_that_cannot_be_read_are_counted_and_named(llama, tmp_path, capfd):
    """In a zip, in a file of their own and in a table; and by workers, whose standard error is not seen."""
    source = library(tmp_path / "source", [*books(), {"file_id": "perdu", "complete_text": "L'\ufffdt\ufffd. " * 999}])
    (source / "faux.txt").write_bytes(b"\x89PNG\r\n")
    with zipfile.ZipFile(source / "lot.zip", "w") as archive:
        archive.writestr("image.jpg", b"\xff\xd8\xff")
    for workers in (2, 1):  # the second time the corpus is there
        manifest = prepare(source, llama, tmp_path / "2a.jsonl", workers=workers)
        assert manifest["documents"]["rejected"]["not read"] == 3
        said = capfd.readouterr().err
        for name in ("perdu has lost", "faux.txt is a picture", "lot.zip: image.jpg is a picture"):
            assert said.count(f"{name}") == 1, said


@pytest.mark.parametrize("limit", [5_000, 150_000])
def test_a_full_disk_leaves_what_was_there(limit, source, made, out, llama):
    """A limit on the size of files stands in for the disk's end: in the corpus, in its cut rows, in the rows."""

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, str(SCRIPT), *words(source, llama, out, windows=30, holdout=0.3)]
    done = subprocess.run(command, preexec_fn=small, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("gallica.py: ") and "Traceback" not in done.stderr
    assert prepared(out.parent) == prepared(made.parent)
    prepare(source, llama, out, windows=30, holdout=0.3)
    assert prepared(out.parent) != prepared(made.parent)


def test_killed_it_goes_on_to_the_same_bytes(source, made, llama, tmp_path):
    out = tmp_path / "data" / "2a.jsonl"
    command = [sys.executable, str(SCRIPT), *words(source, llama, out, windows=30, workers=2)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not list(out.parent.glob("gallica/*/logs/clean/completions/*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not prepared(out.parent)
    main(command[2:])
    assert prepared(out.parent) == prepared(made.parent)
    assert not list(out.parent.glob("gallica/*/rows-*"))


def test_two_commands_do_not_work_in_one_folder(source, out, llama, locked):
    [corpus] = (out.parent / "gallica").glob("*/")
    with locked(corpus) as other, pytest.raises(BadInput, match=f"process {other} is writing {corpus}"):
        prepare(source, llama, out)


@pytest.mark.parametrize("file", ["books/00000.jsonl.zst", "chosen.jsonl"])
def test_a_corpus_that_was_damaged_is_made_again(file, source, made, out, llama):
    [damaged] = (out.parent / "gallica").glob(f"*/{file}")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    prepare(source, llama, out, windows=30)
    assert prepared(out.parent) == prepared(made.parent) and damaged.read_bytes() == whole


def test_other_arguments_are_another_corpus_and_the_same_are_made_again_only_when_asked(source, made, out, llama):
    [corpus] = (out.parent / "gallica").glob("*/")
    before = (corpus / "chosen.jsonl").stat().st_mtime_ns
    prepare(source, llama, out, split="2/2", sequence_len=64, seed=3)
    assert (corpus / "chosen.jsonl").stat().st_mtime_ns == before
    (corpus / "books" / "00000.jsonl.zst").unlink()
    main([*words(source, llama, out, windows=30), "--fresh"])
    assert prepared(out.parent) == prepared(made.parent)
    prepare(source, llama, out, holdout=0.3)
    assert len(list((out.parent / "gallica").glob("*/"))) == 2


def test_the_same_input_gives_the_same_corpus_and_rows_as_ever(made):
    [chosen] = made.parent.glob("gallica/*/chosen.jsonl")
    found = digest(chosen.read_text(encoding="utf-8") + made.read_text(encoding="utf-8"))
    changed = "output changed: raise CORPUS_VERSION and update the hash"
    assert (CORPUS_VERSION, found[:16]) == (11, "f3a541a78ec34e0b"), changed


@pytest.mark.skipif(not CORPUS, reason="CORPUS_DIR is not set: no real books to read")
@pytest.mark.parametrize(("sequence_len", "windows", "split"), [(512, 1000, "1/2"), (2048, 250, "2/2")])
def test_real_books(sequence_len, windows, split, tmp_path):
    source, tokenizer, out = Path(CORPUS) / "gallica", Path(CORPUS) / "tokenizer", tmp_path / "2x.jsonl"
    options: dict[str, Any] = {"sequence_len": sequence_len, "windows": windows, "split": split, "holdout": 0.05}
    manifest = prepare(source, tokenizer, out, **options)
    documents = manifest["documents"]
    assert documents["read"] == 53 and documents["used"] == documents["kept"]
    rejected = {
        "near-duplicate": "bpt6kdup0001",
        "not French": "bpt6keng0001",
        "too short": "bpt6ktiny001",
        "unreadable scan": "bpt6kocr0001",
    }
    # The classifier loses three of the 49 novels, Allais, Barrès and Péladan: it keeps nine in ten.
    assert documents["rejected"] == dict.fromkeys(rejected, 1) | {"not prose fiction": 3}
    for reason, name in rejected.items():
        [path] = (tmp_path / "gallica").glob(f"*/rejected/{reason}/*.jsonl.gz")
        assert [json.loads(line)["id"] for line in gzip.decompress(path.read_bytes()).splitlines()] == [name]
    lengths, kept = axolotl_windows([row["text"] for row in rows(out)], tokenizer, sequence_len)
    assert len(kept) == windows
    assert sum(lengths) == manifest["train"]["tokens"] + manifest["train"]["tail_tokens"]
    assert sources(heldout_path(out)) and not sources(out) & sources(heldout_path(out))
    anonymous = [row for row in rows(out) + rows(heldout_path(out)) if row["title"] == "Le château de Pinon I"]
    assert {(row["author"], row["date"]) for row in anonymous} == {("", "1876-????")}
