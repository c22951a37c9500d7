"""The novel's rows: noise out, one block held out, four phases, windows as Axolotl counts them."""

import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
from axolotl_preprocessing import axolotl_windows
from reportlab.lib.pagesizes import A5
from reportlab.pdfgen.canvas import Canvas
from small_library import rows
from small_tokenizers import tales

from bench.score_cleaning import f1, paragraphs_of, score
from prep.castle import drop_note_calls, main
from prep.common import ROOT, BadInput, sha256
from prep.formats import read_book
from prep.page_layout import clean_pages
from prep.rows import Cutter


@pytest.fixture(scope="module")
def novel() -> list[str]:
    """Above 131,072 tokens, more than Axolotl takes in one row: the tales one after another, twice, numbered."""
    paragraphs = [p for tale in tales() for p in paragraphs_of(tale)]
    doubled = [f"{p} ({turn} {n})" for turn in ("Un", "Deux") for n, p in enumerate(paragraphs)]
    assert sum(map(len, doubled)) > 400_000
    return doubled


class Made:
    """What the script wrote."""

    def __init__(self, folder: Path):
        self.folder, self.book = folder / "data", folder / "roman.txt"
        self.train, self.held = (rows(self.folder / f"2c.{part}") for part in ("jsonl", "heldout.jsonl"))
        self.manifest = json.loads((self.folder / "2c.manifest.json").read_text(encoding="utf-8"))
        self.paragraphs = (self.folder / "2c.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in self.train]


def words(book: Path, tokenizer: Path, *options: str) -> list[str]:
    return ["--book", str(book), "--tokenizer", str(tokenizer), "--out", "data/2c.jsonl", *options]


def castle(folder: Path, book: Path, tokenizer: Path, *options: str) -> Made:
    """Run the script's `main` in `folder`: the import of the libraries takes seconds."""
    with contextlib.chdir(folder), mock.patch.object(sys, "argv", ["castle.py", *words(book, tokenizer, *options)]):
        main()
    return Made(folder)


@pytest.fixture(scope="module")
def prepared(novel, tokenizer, tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("run")
    (folder / "roman.txt").write_text("\n\n".join(novel), encoding="utf-8")
    return castle(folder, folder / "roman.txt", tokenizer, "--seed", "7")


def test_axolotl_finds_the_windows_of_the_manifest_and_nothing_is_truncated(prepared, novel, tokenizer):
    cutter = Cutter(tokenizer, 2048)
    total = cutter.count("\n\n".join(novel))
    assert total > 64 * 2048
    lengths, windows = axolotl_windows(prepared.texts, tokenizer, 2048)
    assert len(windows) == prepared.manifest["train"]["windows"] == lengths.count(2048)
    assert {len(window) for window in windows} == {2048}
    assert all(cutter.eos not in window[1:] for window in windows)
    assert sum(lengths) - 2048 * len(windows) == prepared.manifest["train"]["tail_tokens"]
    # Four times what is not held out, but for what precedes each start and the last window that is not full, in two parts.
    held = prepared.manifest["heldout"]["tokens"]
    assert 4 * (total - held) - 2 * (512 + 1024 + 1536 + 4 * 2048) - 500 < 2048 * len(windows) < 4 * (total - held)
    assert abs(held / total - 0.05) < 0.01


def test_phases_start_at_the_stride_and_are_whole(prepared, tokenizer):
    """Each phase of each part: its first row starts 0, 512, 1024 or 1536 tokens in, and its rows follow each other."""
    ordered = sorted(prepared.train, key=lambda row: row["part"])
    assert len({row["part"] for row in ordered}) == len(ordered)
    start, end = prepared.manifest["documents"]["heldout_paragraphs"]
    parts = {"1/2": "\n\n".join(prepared.paragraphs[:start]), "2/2": "\n\n".join(prepared.paragraphs[end:])}
    cutter = Cutter(tokenizer, 2048)
    phases: dict[tuple[str, int], list[str]] = {}
    for row in ordered:
        _, part, _, phase, _, _ = row["part"].split()
        phases.setdefault((part, int(phase)), []).append(row["text"])
    assert sorted(phases) == [(part, phase) for part in ("1/2", "2/2") for phase in (0, 512, 1024, 1536)]
    for (part, phase), texts in phases.items():
        at = parts[part].index(texts[0])
        assert abs(len(cutter.encode(parts[part][:at]).ends) - phase) <= 4
        for text in texts:
            at = parts[part].index(text, at)
            assert at == 0 or parts[part][at - 1].isspace()
            at += len(text)
        assert len(cutter.encode(parts[part][at:]).ends) < 2048 + 16


def test_no_held_out_text_in_any_training_row(prepared):
    start, end = prepared.manifest["documents"]["heldout_paragraphs"]
    paragraphs, block = prepared.paragraphs, prepared.paragraphs[start:end]
    assert "\n\n".join(block).startswith(prepared.held[0]["text"]) and len(prepared.held) == 1
    assert not any(paragraph in text for paragraph in block for text in prepared.texts)
    # All the rest is there, and the block lies in the middle.
    joined = "\n\n".join(prepared.texts)
    assert all(paragraph in joined for paragraph in [*paragraphs[3 : start - 60], *paragraphs[end + 3 : -60]])
    before, after = len("".join(paragraphs[:start])), len("".join(paragraphs[end:]))
    assert abs(before - after) < 0.05 * (before + after)


def test_same_seed_same_bytes_other_seed_other_order(prepared, tokenizer, tmp_path):
    def digests(folder: Path) -> dict[str, str]:
        return {path.name: sha256(path) for path in folder.iterdir()}

    script = [sys.executable, "-X", "importtime", str(ROOT / "prep/castle.py")]
    command = [*script, *words(prepared.book, tokenizer, "--seed", "7")]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=True)
    imported = re.findall(r"\| +(\S+)$", done.stderr, re.M)
    assert "tokenizers" in imported and "torch" not in imported  # which takes seconds
    assert digests(tmp_path / "data") == digests(prepared.folder)
    assert set(digests(prepared.folder)) == {"2c.jsonl", "2c.heldout.jsonl", "2c.manifest.json", "2c.txt"}
    other = castle(tmp_path, prepared.folder / "2c.txt", tokenizer, "--seed", "8")  # prepared twice, the same
    assert other.texts != prepared.texts and sorted(other.texts) == sorted(prepared.texts)


def test_without_holdout_the_whole_book_is_trained_on(prepared, tokenizer, tmp_path):
    made = castle(tmp_path, prepared.book, tokenizer, "--holdout", "0")
    assert {row["part"].split()[1] for row in made.train} == {"1/1"}
    # In one row each phase would be longer than the 64 windows Axolotl takes.
    windows = len(axolotl_windows(made.texts, tokenizer, 2048)[1])
    assert made.manifest["train"]["windows"] == windows > 4 * 64
    assert made.manifest["heldout"]["rows"] == 0 and (made.folder / "2c.heldout.jsonl").read_bytes() == b""
    assert made.manifest["documents"]["heldout_paragraphs"] is None


def test_a_short_book_holds_out_one_whole_window(tokenizer, tmp_path):
    (tmp_path / "conte.txt").write_text("\n\n".join(paragraphs_of("\n\n".join(tales()[:3]))), encoding="utf-8")
    [row] = castle(tmp_path, tmp_path / "conte.txt", tokenizer, "--holdout", "0.01").held
    assert len(axolotl_windows([row["text"]], tokenizer, 2048)[1]) == 1


def test_a_book_of_one_paragraph_holds_out_sentences(novel, llama, tmp_path):
    text = " ".join(novel)[:60_000].rpartition(".")[0] + "."
    (tmp_path / "roman.txt").write_text(text, encoding="utf-8")
    made = castle(tmp_path, tmp_path / "roman.txt", llama, "--sequence-len", "256", "--stride", "64")
    assert len(made.paragraphs) == 3 and " ".join(made.paragraphs) == text
    assert all(re.match("[A-ZÀ-Ý«—]", p) and p[-1] in ".!?»" for p in made.paragraphs)
    assert made.manifest["documents"]["heldout_paragraphs"] == [1, 2]
    assert abs(len(made.paragraphs[1]) / len(text) - 0.05) < 0.01


@pytest.mark.parametrize(
    "foreign",
    [
        "It is a truth universally acknowledged, that a single man must be in want of a wife. ",
        "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich in seinem Bett. ",
        "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, vivía un hidalgo. ",
        "我冒了嚴寒，回到相隔二千餘里，別了二十餘年的故鄉去。",
    ],
    ids=["English", "German", "Spanish", "Chinese"],
)
def test_another_language_is_refused_and_passages_in_it_are_not(foreign, llama, tmp_path):
    (tmp_path / "roman.txt").write_text(foreign * 60, encoding="utf-8")
    with pytest.raises(BadInput, match="made for French only"):
        castle(tmp_path, tmp_path / "roman.txt", llama)
    mixed = "\n\n".join([foreign * 20, *paragraphs_of(tales()[0])])
    (tmp_path / "roman.txt").write_text(mixed, encoding="utf-8")
    options = ("--sequence-len", "256", "--stride", "64", "--holdout", "0")
    assert len(castle(tmp_path, tmp_path / "roman.txt", llama, *options).paragraphs) == mixed.count("\n\n") + 1


# --- the book's noise -----------------------------------------------------------------------------------------------

PAGES = """\
Le passeur avait loué la chambre 15, au-dessus de l’écurie, et\r
depuis le 3 juillet il n’en descendait plus que pour la soupe. Sa\r
fatigue1 était telle qu’il dormait assis, la tête contre le mur,\r
les deux mains posées à plat sur la couverture de laine grise que\r
– 5 –\r
la servante lui avait prêtée au printemps, quand les nuits\r
étaient encore froides et que le poêle fumait.\r
– Que faites-vous là ? dit-elle en entrant avec la lampe, qu’elle\r
posa sur la table. Vous savez bien ce que vous faites !2\r
– Je me repose, dit-il, puisque ce soir encore monsieur le maire\r
– et vous le connaissez mieux que moi – ne veut pas que l’on\r
passe la rivière avant la 10ème heure.\r
Elle haussa les épaules. Personne au village n’avait vu le maire\r
depuis la crue, et l’on disait qu’il ne quittait plus son com-\r
– 6 –\r
plice, le notaire, avec qui il jouait aux cartes du matin au soir\r
dans l’arrière-salle.\r
Il se leva.\r
– Je vous croirai quand vous me le direz vous-\r
– 7 –\r
même, reprit la servante, et elle emporta la lampe3, laissant le\r
passeur dans le noir avec ses 12 francs et son livre de comptes.\r
"""

CLEANED = [
    "Le passeur avait loué la chambre 15, au-dessus de l'écurie, et depuis le 3 juillet il n'en descendait plus que pour la "
    "soupe. Sa fatigue était telle qu'il dormait assis, la tête contre le mur, les deux mains posées à plat sur la "
    "couverture de laine grise que la servante lui avait prêtée au printemps, quand les nuits étaient encore froides et que "
    "le poêle fumait.",
    "— Que faites-vous là ? dit-elle en entrant avec la lampe, qu'elle posa sur la table. Vous savez bien ce que vous "
    "faites !",
    "— Je me repose, dit-il, puisque ce soir encore monsieur le maire — et vous le connaissez mieux que moi — ne veut pas "
    "que l'on passe la rivière avant la 10ème heure.",
    "Elle haussa les épaules. Personne au village n'avait vu le maire depuis la crue, et l'on disait qu'il ne quittait plus "
    "son complice, le notaire, avec qui il jouait aux cartes du matin au soir dans l'arrière-salle.",
    "Il se leva.",
    "— Je vous croirai quand vous me le direz vous-même, reprit la servante, et elle emporta la lampe, laissant le passeur "
    "dans le noir avec ses 12 francs et son livre de comptes.",
]


def draw_pdf(path: Path, pages: list[list[str]]) -> None:
    canvas = Canvas(str(path), pagesize=A5)
    for lines in pages:
        for n, line in enumerate(lines):
            canvas.drawString(40, 560 - 14 * n, line)
        canvas.showPage()
    canvas.save()


@pytest.mark.parametrize("suffix", ["txt", "pdf"])
def test_every_kind_of_noise_goes_and_what_only_looks_like_it_stays(suffix, llama, tmp_path):
    book = tmp_path / f"roman.{suffix}"
    book.write_bytes(PAGES.encode())
    if suffix == "pdf":
        draw_pdf(book, [page.splitlines() for page in re.split(r"(?<=\d –)\r\n", PAGES)])
    made = castle(tmp_path, book, llama, "--sequence-len", "64", "--stride", "16", "--holdout", "0")
    assert made.paragraphs == CLEANED
    counts = {"page_numbers": 3, "page_breaks_joined": 3, "hyphens_joined": 1, "hyphens_kept": 1, "note_calls": 3}
    assert made.manifest["documents"]["cleaning"] == counts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sa fatigue1 et ses pas2.", "sa fatigue et ses pas."),
        ("« Oui !1 » dit-il, « non.2 »", "« Oui ! » dit-il, « non. »"),
        ("fin...1 puis2, puis4, et5.", "fin... puis, puis, et."),  # call 3 was lost
        ("un mot1. Chapitre deux : un mot1, un autre2.", "un mot. Chapitre deux : un mot, un autre."),
        ("le 3 juillet, chambre 15, la 10ème, n°4, 1,50 franc, 10.30", None),
        ("Un1 mur, et Le2 bac", "Un mur, et Le bac"),
        ("un mot2", None),
        ("à 541 km2, à 12 km² et 3 dm3, n.3, n.4", None),
        ("un siège A1, un siège A2, un siège A3", None),
        ("mot1 mot2 mot3 dit K4. mot5 mot6", "mot mot mot dit K. mot mot"),
        ("mot1 mot2 mot3 mot4 mot12 mot13 mot14", "mot mot mot mot mot mot mot"),  # 5 to 11 are lost
        ("mot1 mot2 mot3 wagon27", "mot mot mot wagon27"),
        ("un mot1, le wagon27, un autre2, puis3", "un mot, le wagon27, un autre, puis"),
        ("page12, page47, page31", None),
        ("sa fatigue¹ et ses pas²", "sa fatigue et ses pas"),
    ],
)
def test_note_calls(text, expected):
    cleaned, count = drop_note_calls([text])
    assert cleaned == [expected or text]
    assert bool(count) == (expected is not None)


def test_notes_at_the_end_go_with_their_calls():
    """`make continue` continues the last lines."""
    text = ["Le bac1 partit, et le passeur2 chanta.", "Il revint3 au soir.", "Fin."]
    plain = ["Le bac partit, et le passeur chanta.", "Il revint au soir.", "Fin."]
    notes = ["Notes", "1. Voir la carte.", "2. « Celui qui passe. »", "3 Un mardi."]
    assert drop_note_calls([*text, *notes]) == (plain, 3)
    assert drop_note_calls([*text, *notes[1:3]]) == ([*plain, *notes[1:3]], 3)  # chapters: the third call has none
    many = [f"{n}. Voir la carte." for n in range(1, 9)]
    assert drop_note_calls([*text, *many]) == ([*plain, *many], 3)
    assert drop_note_calls(["Le bac partit.", *notes]) == (["Le bac partit.", *notes], 0)


def test_a_pdf_gives_the_text_it_was_made_from(tmp_path):
    paragraphs = [p for tale in tales()[:3] for p in paragraphs_of(tale)]
    lines = [line for p in paragraphs for line in textwrap.wrap(p, 64, break_on_hyphens=False)]
    sheets = [[*lines[n : n + 32], f"– {n // 32 + 5} –"] for n in range(0, len(lines), 32)]
    draw_pdf(tmp_path / "roman.pdf", sheets)
    found = clean_pages(read_book(tmp_path / "roman.pdf").text)
    result = score(found.paragraphs, paragraphs)
    assert found.counts["page_numbers"] == len(sheets)
    assert result["errors"] == 0 and f1(result) > 0.95


# --- the real book ---------------------------------------------------------------------------------------------------

CORPUS = os.environ.get("CORPUS_DIR", "")


@pytest.mark.skipif(
    not CORPUS, reason="CORPUS_DIR is not set: a folder with book/ (book.txt, truth.txt) and tokenizer/"
)
def test_the_corpus_book_equals_its_truth(tmp_path):
    made = castle(tmp_path, Path(CORPUS) / "book" / "book.txt", Path(CORPUS) / "tokenizer")
    truth = (Path(CORPUS) / "book" / "truth.txt").read_text(encoding="utf-8")
    scored = score(made.paragraphs, paragraphs_of(truth))
    assert scored["errors"] < 0.0001 * scored["characters"] and f1(scored) > 0.97
    assert not any(scored[kind] for kind in ("number", "header", "hyphen"))
