"""Each rule on books that it must reject and on the tales it must keep; copies, editions and overlaps; every kind of source."""

import gzip
import io
import itertools
import json
import os
import random
import re
import signal
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_library import books, library, prepare
from small_tokenizers import tales

from prep.common import BadInput
from prep.dedup import Entry, copies, fingerprint
from prep.executor import Cluster, run_local
from prep.filters import fiction_score, year_of
from prep.readers import read_books, source_paths


def texts() -> list[str]:
    return [tale.partition("\n\n")[2] for tale in tales()]


def rejected(folder: Path) -> dict[str, list[str]]:
    """Identifiers of the rejected books, by reason."""
    return {
        reason.name: [json.loads(line)["id"] for path in reason.iterdir() for line in gzip.open(path, "rt")]
        for reason in folder.glob("gallica/*/rejected/*")
    }


def misread(text: str, share: float, seed: int = 1) -> str:
    """A text with a share of its letters taken for others."""
    draw = random.Random(seed)
    return "".join(
        draw.choice("abcdefghijklmnopqrstuvwxyz") if c.isalpha() and draw.random() < share else c for c in text
    )


LAW = "\n".join(
    f"Art. {n}. Les dispositions de l'article {n + 7} de la loi du {n % 28 + 1} mars 18{n % 90 + 10} sont applicables aux\n"
    f"propriétaires, qui doivent en faire la déclaration par écrit dans les {n % 9 + 2} mois ; le préfet peut, par arrêté,\n"
    f"étendre le délai. La peine est de {n % 40 + 10} francs d'amende, et celle des complices est de la moitié."
    for n in range(1, 200)
)
VERSE = "\n".join(
    f"Le soir est descendu des monts,\nLa lune est dorée sur la mer qui dort,\nEt l'ombre {n} est dans les joncs"
    for n in range(400)
)
ENGLISH = "The old man went down to the harbour and looked at the ships, and said nothing.\n" * 100


# --- the rules -------------------------------------------------------------------------------------------------------


def test_every_rule_rejects_under_its_own_name_and_keeps_the_tales(llama, tmp_path):
    odd = {
        "short": "Il pleuvait. " * 20,
        "english": ENGLISH,
        "scan": misread(texts()[5], 0.1),
        "law": LAW,
        "verse": VERSE,
        "table": texts()[6][:3990] + "\n[texte_manquant]" * 2,
        "old": texts()[7],
        "copy": misread(texts()[8], 0.02),
    }
    dates = dict.fromkeys(odd, "1880") | {"old": "1650", "copy": "1890"}
    good = [book | {"date": "1876-????"} for book in books()]
    good.pop(7)
    bad = [{"file_id": name, "title": name, "date": dates[name], "complete_text": text} for name, text in odd.items()]
    source = library(tmp_path / "source", good + bad)
    documents = prepare(source, llama, tmp_path / "2a.jsonl", from_year=1800, to_year=1950)["documents"]
    found = {reason: sorted(names) for reason, names in rejected(tmp_path).items()}
    assert found == {
        "too short": ["short"],
        "not French": ["english"],
        "unreadable scan": ["scan"],
        "not prose fiction": ["law", "verse"],
        "too short when cleaned": ["table"],
        "outside the period": ["old"],
        "near-duplicate": ["copy"],
    }
    assert documents["rejected"] == {reason: len(names) for reason, names in found.items()}
    assert documents["kept"] + documents["heldout"] == 14
    # The funnel: each step's books are those of the one before, less the rejected.
    funnel = documents["funnel"]
    for before, step in itertools.pairwise(funnel):
        assert step["documents"] == before["documents"] - step["rejected"]
        assert step["step"] == "cleaned" or step["characters"] <= before["characters"]
    assert funnel[-1]["documents"] == 14 and funnel[0]["documents"] == documents["read"] == 22


def test_a_title_counts_and_a_date_has_a_year_or_none():
    assert fiction_score(texts()[0], "Comédie en trois actes") < fiction_score(texts()[0], "Roman")
    assert [year_of(date) for date in ("1876-????", "18--?", "[1912]", "", "12345")] == [1876, None, 1912, None, None]


# --- copies and overlaps ---------------------------------------------------------------------------------------------


def entry(line: int, known: float, date: str = "", source: str = "") -> Entry:
    return Entry(0, line, source or f"id{line}", "", "", date, f"work {line}", 0, known, "")


def test_the_copy_that_stays_is_the_best_read_whatever_the_order():
    text = texts()[0]
    prints = [fingerprint(t) for t in (misread(text, 0.02), text, texts()[1], text)]
    entries = [entry(0, 0.8), entry(1, 0.95), entry(2, 0.99), entry(3, 0.95)]
    lookup = type("Lookup", (), {"__getitem__": lambda self, e: prints[e.line]})()
    pairs = [((0, 0), (0, 1)), ((0, 1), (0, 3)), ((0, 2), (0, 3)), ((0, 0), (0, 3))]
    for order, some in itertools.product((pairs, pairs[::-1]), (entries, entries[::-1])):
        assert copies(some, order, lookup) == {entries[0]: entries[1], entries[3]: entries[1]}
    older, newer = entry(0, 0.93, "1852", "id2"), entry(1, 0.93, "1899", "id1")  # of two read alike the older stays
    assert older.preference < newer.preference < entry(2, 0.93).preference
    assert older.preference < newer._replace(known=0.95).preference
    assert newer.preference < older._replace(known=0.8).preference


def test_what_overlaps_with_the_novel_or_with_held_out_text_is_removed(llama, tmp_path):
    """A chapter of it in a book is enough; what did overlap is in the manifest."""
    records = books()
    novel = tmp_path / "novel.txt"
    novel.write_text(texts()[7], encoding="utf-8")
    records[9]["complete_text"] += "\n" + texts()[7][2000:8000]
    records[1]["complete_text"] += "\n" + texts()[0][2000:8000]  # of bpt01, which is held out
    source = library(tmp_path / "source", records)
    documents = prepare(source, llama, tmp_path / "2a.jsonl", against=novel)["documents"]
    found = documents["contaminated"]
    assert set(found) == {"bpt02", "bpt08", "bpt10"} and documents["rejected"]["contaminated"] == 3
    assert "the novel" in found["bpt10"] and "held-out books" in found["bpt02"]


def test_a_cap_on_a_work_counts_all_its_volumes(llama, tmp_path):
    records = books()
    for number in (4, 5, 6):
        records[number]["title"] = f"Les Veillées. Tome {number}"
    source = library(tmp_path / "source", records)
    manifest = prepare(source, llama, tmp_path / "2a.jsonl", cap_per_work=3, holdout=0)
    assert manifest["train"]["windows"] == 3 * 13 and manifest["documents"]["works_used"] == 13


# --- sources ---------------------------------------------------------------------------------------------------------

FIELDS = ("title", "author", "date")
TABLE = (
    "main_id\tcatalogue_id\ttitre\tnom_auteur\tprenom_auteur\tdate\tdocument_ocr\tdate_enligne\tgallica\tpage\ttexte\n"
    'b1_p9\tc1\tLe Sel\tDupont\tMarie\t1871\t98\t2010\thttps://x\t9\t_p_ Premier ali- néa. _p_ Deuxième "alinéa\n'
    "b1_p11\tc1\tLe Sel\tDupont\tMarie\t1871\t98\t2010\thttps://x\t11\tfin.\n"
    'b1_p10\tc1\tLe Sel\tDupont\tMarie\t1871\t98\t2010\thttps://x\t10\t"suite ""et"""\n'
    'b1_p10\tc1\tLe Sel\tDupont\tMarie\t1871\t98\t2010\thttps://x\t10\t"suite ""et"""\n'
    "b2_p1\tc2\tLe Ver\tNA\t\t1880\t98\t2010\thttps://x\t1\tAutre livre.\n"
)


def packed(path: Path, data: bytes) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("1871.tsv", data)
            archive.writestr("lisez-moi.md", "rien")
    elif path.name.endswith(".tar.gz"):
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo("tables/1871.tsv")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    else:
        path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.tsv", "A.TSV.GZ", "a.zip", "a.tar.gz"])
def test_page_tables_become_books(name, tmp_path):
    packed(tmp_path / name, TABLE.encode())
    first, second = (book for path in source_paths(tmp_path) for book in read_books(path))
    odd = {"pages_twice": 1, "pages_moved": 1}
    assert first.id == "b1"
    assert first.metadata == {"title": "Le Sel", "author": "Dupont, Marie", "date": "1871", "odd": odd}
    assert (second.id, second.metadata["author"]) == ("b2", "")
    assert first.text == '\n\n Premier ali-\nnéa. \n\n Deuxième "alinéa\fsuite "et"\ffin.'
    assert not list(read_books(packed(tmp_path / f"empty{name[1:]}", b"")))
    with pytest.raises(BadInput, match="no column"):
        list(read_books(packed(tmp_path / f"other{name[1:]}", b"a\tb\n1\t2\n")))


def test_pages_that_are_not_all_numbered_keep_their_order(tmp_path):
    """Roman numerals, or none: a place in the table and a number would be the same."""
    rows = [f"b1_p{n}\t\t\t\t\t\t\t\t\t{page}\tpage {n}\n" for n, page in enumerate(["NA", "iv", "1", "2"])]
    (tmp_path / "a.tsv").write_text(TABLE.split("\n")[0] + "\n" + "".join(rows))
    [book] = read_books(tmp_path / "a.tsv")
    assert book.text == "page 0\fpage 1\fpage 2\fpage 3" and not book.metadata["odd"]


@pytest.mark.parametrize("name", ["a.tsv.gz", "a.zip", "a.tar.gz", "b.jsonl.gz"])
def test_a_truncated_archive_is_one_clear_error(name, tmp_path):
    draw = random.Random(1)
    data = TABLE + "".join(f"b{n}\t\t\t\t\t\t\t\t\t1\t{draw.random()}\n" for n in range(5000))
    path = packed(tmp_path / name, data.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadInput, match=r"damaged|not a JSON object"):
        list(read_books(path))


def test_a_zip_of_tables_with_a_password_is_one_clear_error(tmp_path):
    path = packed(tmp_path / "a.zip", TABLE.encode())
    path.write_bytes(path.read_bytes().replace(b"\x14\0\0\0\0\0", b"\x14\0\1\0\0\0"))
    with pytest.raises(BadInput, match=r"a\.zip has a password"):
        list(read_books(path))


def test_a_defect_of_ours_is_no_damaged_file(tmp_path, monkeypatch):
    def deep(*_):
        raise RecursionError

    monkeypatch.setattr("prep.readers.repaired", deep)
    with pytest.raises(RecursionError):
        list(read_books(packed(tmp_path / "a.zip", TABLE.encode())))


def test_the_same_books_as_parquet_jsonl_or_tables_give_the_same_rows(llama, tmp_path):
    records = books()
    lines, pages = [], [TABLE.split("\n", 1)[0].split("\t")]
    for r in records:
        lines.append(json.dumps({"id": r["file_id"], "text": r["complete_text"]} | {k: r[k] for k in FIELDS}))
        text = r["complete_text"].replace("\n", "_p_")
        pages.append([r["file_id"], "", r["title"], r["author"] or "", "", r["date"], "", "", "", "1", text])
    library(tmp_path / "parquet", records)
    made = []
    for kind, table in ("parquet", []), ("jsonl", lines), ("tsv", map("\t".join, pages)):
        (tmp_path / kind).mkdir(exist_ok=True)
        if kind != "parquet":
            (tmp_path / kind / f"a.{kind}").write_text("".join(f"{line}\n" for line in table), encoding="utf-8")
        prepare(tmp_path / kind, llama, tmp_path / f"out-{kind}" / "2a.jsonl")
        made.append((tmp_path / f"out-{kind}" / "2a.jsonl").read_bytes())
    assert made[0] == made[1] == made[2]


def test_odd_fields_of_a_line_are_empty(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"id": 7, "text": null}\n{"text": ["x"], "title": 5}\n')
    odd = [(book.id, book.metadata["title"], book.text) for book in read_books(tmp_path / "odd.jsonl")]
    assert odd == [("7", "", ""), ("", "5", "")]


def test_tables_in_latin_1_are_refused_and_a_text_encoded_twice_is_mended(tmp_path):
    line = json.dumps({"id": "a", "text": "L'été"}, ensure_ascii=False) + "\n"
    for name, data in {"a.jsonl": line, "a.tsv": TABLE}.items():
        (tmp_path / name).write_bytes(data.encode("latin-1"))
        with pytest.raises(BadInput, match=f"{name} is not in UTF-8"):
            list(read_books(tmp_path / name))
    text = texts()[0]
    twice = text.encode().decode("latin-1")
    source = library(tmp_path / "source", [{"file_id": "a", "complete_text": t} for t in (twice, twice + text)], 1)
    assert [book.text for book in read_books(source / "gallica_mono_1.parquet")] == [text, text + text]


@pytest.mark.slow
def test_a_book_of_thirteen_million_characters_and_files_without_books(llama, tmp_path):
    records = books()
    sentences = re.split(r"(?<=[.!?]) ", texts()[3])
    records[3]["complete_text"] = "\n".join(
        random.Random(1).choices(sentences, k=13_000_000 * len(sentences) // len(texts()[3]))
    )
    source = library(tmp_path / "source", records)
    empty = pa.Table.from_pylist([], pa.schema([("file_id", pa.string()), ("complete_text", pa.string())]))
    pq.write_table(empty, source / "a_first.parquet")
    (source / "z.zip").write_bytes(packed(tmp_path / "z.zip", b"").read_bytes())
    manifest = prepare(source, llama, tmp_path / "2a.jsonl", windows=50)
    assert manifest["documents"]["read"] == 15 and manifest["train"]["windows"] == 50


# --- who does the work -----------------------------------------------------------------------------------------------

SBATCH = """#!/usr/bin/env bash
# Stands in for Slurm: runs a job's array one task after the other, at once.
for script; do :; done
n=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
echo "$(basename "$PWD") ${n:-0} $*" >> "$(dirname "$0")/jobs"
for i in $(seq 0 "${n:-0}"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here SLURM_JOB_ID=1 RUN_OFFSET=0 bash "$script" >> "$(dirname "$0")/log" 2>&1 || exit 1
done
echo "Submitted batch job 7"
"""


@pytest.mark.slow
def test_slurm_jobs_make_the_same_bytes(llama, tmp_path, monkeypatch):
    """The scripts that datatrove submits, run by a stand-in for sbatch."""
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    (stand_in / "sbatch").write_text(SBATCH)
    (stand_in / "scontrol").write_text("#!/bin/sh\necho here\n")
    for path in stand_in.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(stand_in), prepend=":")
    source = library(tmp_path / "source", books(), files=2)
    prepare(source, llama, tmp_path / "local" / "2a.jsonl", windows=20)
    prepare(source, llama, tmp_path / "slurm" / "2a.jsonl", windows=20, executor="slurm", partition="cpu")
    for name in ("2a.jsonl", "2a.heldout.jsonl", "2a.manifest.json"):
        assert (tmp_path / "slurm" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name
    [script] = (tmp_path / "slurm").glob("gallica/*/logs/clean/launch_script.slurm")
    assert "#SBATCH --partition=cpu" in script.read_text() and "--array=0-1" in script.read_text()


def test_a_killed_worker_is_one_clear_error(tmp_path):
    def die(data: object, rank: int, world_size: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(BadInput, match="a worker of stage one was killed"):
        run_local([Cluster("local", 2).stage("one", [die], 3, tmp_path, None)], tmp_path)
    run_local([Cluster("local", 1).stage("one", [lambda *_: None], 3, tmp_path, None)], tmp_path)
    assert {path.name for path in (tmp_path / "logs" / "one" / "completions").iterdir()} == {"00000", "00001", "00002"}
