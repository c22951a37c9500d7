"""bench/faults.py tells what recovers from what does not: small commands of every kind, through its door."""

import json
import sys
from pathlib import Path

import pytest

from bench import faults

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
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "work/before").mkdir(parents=True)
    rows = [{"to": list(OUTCOMES), "do": ["cut made/*"]}, {"to": ["rewrites"], "do": ["gone made/*", "kill KILL"]}]
    monkeypatch.setattr(faults, "PLAN", {"cases": rows, "states": {"whole": []}})
    monkeypatch.setattr(faults, "COMMANDS", {how: (f"{tmp_path}/command.py {how}", "made/*") for how in OUTCOMES})
    report = tmp_path / "faults.json"
    monkeypatch.setattr(sys, "argv", ["faults.py", "--work", str(tmp_path / "work"), "--out", str(report)])
    faults.main()
    results = json.loads(report.read_text())["cases"]
    found = {name.split(",")[0]: result["outcome"] for name, result in results.items() if ": cut" in name}
    assert found == OUTCOMES
    assert results["rewrites, whole: gone made/* #1"]["outcome"] == faults.BYTES
    assert results["rewrites, whole: kill KILL #1"]["outcome"] in (faults.BYTES, faults.FIGURES)
    assert "traceback: ValueError" in results["crashes, whole: cut made/* #1"]["said"]
    page = report.with_suffix(".md").read_text()
    assert "made/out.json is another" in page and "made/out.json is damaged: remove it" in page
    assert "6 kills and damages in 6 of 6 cases" in page

    results["refuses, whole: cut made/* #1"]["done"] = ["kept"]  # only what ended in a fault is tried again
    report.write_text(json.dumps({"cases": results}))
    faults.main()
    assert json.loads(report.read_text())["cases"]["refuses, whole: cut made/* #1"]["done"] == ["kept"]
