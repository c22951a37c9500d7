"""The benches whose parts a test can see: committed pages, faults told apart, false alarms counted, made-up books."""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import adapter_start, faults, gpu, prep_speed, rehearsal, score_cleaning
from bench import calibrate_verdicts as calibration
from bench import compare_with_lm_eval as lm_eval
from prep.common import BadInput
from prep.dedup import fingerprint, shared

REPORTS = Path(__file__).parent.parent / "bench/reports"
PAGES = {
    "adapter_start": adapter_start, "eval": lm_eval, "faults": faults, "gpu": gpu, "prep": prep_speed,
    "rehearsal": rehearsal, "rehearsal-prep": rehearsal, "rehearsal-gpu": rehearsal,
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_follows_from_the_json(name: str) -> None:
    report: dict[str, Any] = json.loads((REPORTS / f"{name}.json").read_text())
    assert PAGES[name].page(report) == (REPORTS / f"{name}.md").read_text()


@pytest.mark.parametrize("name", ["adapter_start", "faults", "rehearsal"])
def test_a_report_of_other_versions_or_a_damaged_one_is_not_continued(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(adapter_start, "REPORT", path)
    option = f"--model={tmp_path}" if name == "adapter_start" else f"--out={path}"
    monkeypatch.setattr(sys, "argv", [name, option])
    report = json.loads((REPORTS / f"{name}.json").read_text())
    report.get("facts", report)["versions"]["torch"] = "1.0"
    for text, said in {json.dumps(report): "was made with another .*versions", "{": "damaged"}.items():
        path.write_text(text)
        with pytest.raises(BadInput, match=rf"report\.json .*{said}.*move it away"):
            PAGES[name].main()
        assert path.read_text() == text


# --- bench/faults.py: small commands of every kind, through its door --------------------------------------------------

COMMAND = """
import pathlib, sys, time
out, how = pathlib.Path("made/out.json"), sys.argv[1]
damaged = out.exists() and out.read_text() != '{"figure": 1, "seconds": 2}'
if damaged and how == "refuses":
    sys.exit("command.py: made/out.json is damaged: remove it")
if damaged and how == "crashes":
    raise ValueError(out.read_text())
if how == "rewrites" or not out.exists():
    out.parent.mkdir(exist_ok=True)
    seconds = 3 if damaged else 2
    with out.open("w") as handle:
        handle.write('{"figure": 1, ')
        handle.flush()
        time.sleep(0.5)
        handle.write('"seconds": %d}' % seconds)
"""
OUTCOMES = {"refuses": faults.REFUSAL, "crashes": faults.FAULT, "rewrites": faults.FIGURES, "trusts": faults.FAULT}


def test_what_recovers_is_told_from_what_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my books").mkdir()  # a checkout's name may have spaces
    (tmp_path / "my books/command.py").write_text(COMMAND)
    (tmp_path / "work/before").mkdir(parents=True)
    rows = [{"to": list(OUTCOMES), "do": ["cut made/*"]}, {"to": ["rewrites"], "do": ["gone made/*", "kill KILL"]}]
    monkeypatch.setattr(faults, "PLAN", {"cases": rows, "states": {"whole": []}})
    monkeypatch.setattr(faults, "ROOT", tmp_path / "my books")
    monkeypatch.setattr(faults, "COMMANDS", {how: (f"{{root}}/command.py {how}", "made/*") for how in OUTCOMES})
    report = tmp_path / "faults.json"
    monkeypatch.setattr(sys, "argv", ["faults.py", "--work", str(tmp_path / "work"), "--out", str(report)])
    faults.main()
    made = json.loads(report.read_text())
    results = made["cases"]
    found = {name.split(",")[0]: result["outcome"] for name, result in results.items() if ": cut" in name}
    assert found == OUTCOMES
    assert results["rewrites, whole: gone made/* #1"]["outcome"] == faults.BYTES
    assert results["rewrites, whole: kill KILL #1"]["outcome"] in (faults.BYTES, faults.FIGURES)
    assert "traceback: ValueError" in results["crashes, whole: cut made/* #1"]["said"]
    page = report.with_suffix(".md").read_text()
    assert "made/out.json is another" in page and "made/out.json is damaged: remove it" in page
    assert "6 kills and damages in 6 of 6 cases" in page

    results["refuses, whole: cut made/* #1"]["done"] = ["kept"]  # only what ended in a fault is tried again
    report.write_text(json.dumps(made))
    faults.main()
    assert json.loads(report.read_text())["cases"]["refuses, whole: cut made/* #1"]["done"] == ["kept"]


# --- cleaned text beside clean truth ----------------------------------------------------------------------------------


def test_page_tables_are_scored_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As `make gallica` collects by default."""
    (tmp_path / "pages.tsv").write_text("main_id\ttexte\nb1_p1\t_p_ Bonjour le monde.\n")
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth/b1.txt").write_text("Bonjour le mode.")
    monkeypatch.setattr(sys, "argv", ["score_cleaning.py", f"--parquet={tmp_path}", f"--truth={tmp_path}/truth"])
    score_cleaning.main()
    assert "b1  CER 6.250%" in capsys.readouterr().out


def test_texts_of_another_encoding_are_read_as_the_preparation_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = "Décidément, cet été-là, le père cherchait des fougères près de la forêt."
    for folder, encoding in {"found": "cp1252", "truth": "mac_roman"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "b1.txt").write_text(text, encoding)
    for option in ("text", "scan"):
        monkeypatch.setattr(sys, "argv", ["", f"--{option}={tmp_path}/found", f"--truth={tmp_path}/truth"])
        score_cleaning.main()
    assert re.search("b1  CER 0.000%.*words before 0 after 0", capsys.readouterr().out, re.S)
    (tmp_path / "found/b1.txt").write_bytes(bytes(9))
    with pytest.raises(BadInput, match=r"b1\.txt is neither a PDF nor a text"):
        score_cleaning.main()


# --- false alarms of the verdicts, on texts made by hand --------------------------------------------------------------

FRENCH = "maison neige porte lampe table homme femme enfant village route matin soir main voix pain chien"


def novel(seed: int, words: int = 900) -> str:
    """French words in no order: no two runs of four are alike, but by chance."""
    draw = random.Random(seed)
    return " ".join(draw.choice(FRENCH.split()) + ("." if i % 9 == 8 else "") for i in range(words))


def measured(novels: dict[str, str], **authors: str) -> dict:
    return calibration.measured(novels, authors, 10, seed=0)


def test_novels_that_repeat_nothing_raise_no_alarm() -> None:
    result = measured({"a": novel(1), "b": novel(2), "c": novel(3)}, a="X", b="X", c="Y")
    assert result["reports"] == 60 and not +result["alarms"]
    inside, outside = result["shared"].values()
    assert 0 < max(inside) < 12 and len(inside) == 26  # of 10 words, in three tenths of 900
    assert len(outside) == 2 * 89  # a against b, and b against a; c has no fellow


def test_each_alarm_is_counted() -> None:
    """A novel that says one thing for ever, but for its held-out tenth, and a page that stands twice."""
    quiet, middle, page = novel(4, 400), novel(5, 100), " ".join(novel(5, 100).split()[40:70])
    looping = f"{'dormir ' * 400}{middle} {'dormir ' * 400}"
    strange = " ".join(["xqzt wrfg", *(["bvnk tplm"] * 199)]) + f" {middle} " + "xqzt bvnk " * 200
    alarms = measured({"l": looping, "s": strange})["alarms"]
    assert alarms["looping"] == 40 and alarms["not_french"] == 20
    assert measured({"n": f"{quiet} {middle} " + "neige\n\n12\n\nporte " * 200})["alarms"]["artefacts"] > 0
    found = measured({"t": f"{quiet} {middle} {quiet} {page}"})
    assert max(found["shared"][calibration.INSIDE]) >= 10
    assert "| copies " in calibration.tables(found, 1, 10)


def test_novels_are_matched_with_their_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for seed, name in enumerate(("007", "008")):
        (tmp_path / f"{name}.txt").write_text(novel(seed).replace("soir", "été"), "cp1252")
    (tmp_path / "works.csv").write_text("file_id,author\n007,X\n008,X\n")
    monkeypatch.setattr(sys, "argv", ["", f"--texts={tmp_path}", f"--works={tmp_path}/works.csv", "--words=10"])
    calibration.main()
    assert calibration.OUTSIDE in capsys.readouterr().out


# --- books made of others ---------------------------------------------------------------------------------------------


def test_a_perturbed_book_is_another_on_the_same_pages() -> None:
    lines = (f"Le vieux pêcheur numéro {n} du port regardait la mer en silence.\nTITRE {n}" for n in range(900))
    text = "\n".join(lines)
    other = prep_speed.perturbed(text, random.Random(1))
    words, others = (re.findall(r"\w+", each) for each in (text, other))
    assert 0.01 * len(words) < sum(word not in words for word in others) < 0.05 * len(words)
    assert re.sub(r"\w+", "", other) == re.sub(r"\w+", "", text) and "TITRE 7\n" in other and len(others) == len(words)
    assert sum(a != b for a, b in zip(words, others, strict=True) if a == "silence") > 500  # also at a mark
    assert shared(fingerprint(text), fingerprint(other)) < 8
