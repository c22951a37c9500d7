"""Several runs in one page, out of the committed report with losses written by hand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_curriculum import call_main

from eval import compare, report, tables

DEMO = Path(report.__file__).parent / "reports/demo.json"
LOSSES: dict[str, dict[str, list[Any]]] = {  # (tokens, loss, validation loss)
    "small": {"2a": [(100, 4.0, None), (200, 3.0, 3.5)]},
    "large": {"2a": [(1000, 3.9, None)], "2b": [(500, 2.0, 2.5)]},
}


@pytest.fixture
def reports() -> list[dict[str, Any]]:
    """Two runs, the first without 2b."""
    made = []
    for run, losses in LOSSES.items():
        each = report.load(DEMO) | {"run": run, "differences": {}, "style": None}
        each["stages"] = {name: each["stages"][name] for name in ("base", "2a", "2b")}
        for name, stage in each["stages"].items():
            stage["parent"] = {"2a": "base", "2b": "2a"}.get(name)
            stage["training"] = [
                {"step": step, "epoch": None, "tokens": tokens, "loss": loss, "eval_loss": check}
                for step, (tokens, loss, check) in enumerate(losses.get(name, []), 1)
            ]
        made.append(each)
    made[0]["stages"]["2b"] = None
    return made


def cells_of(table: tables.Table, row: str) -> dict[str, str]:
    return next(dict(zip(table[0], cells, strict=True)) for cells in table[1] if cells[0] == row)


def test_runs_are_paired_and_so_are_answers(reports):
    small, large = reports
    assert list(cells_of(compare.paired(reports), "base: large - small")) == ["stage", *small["tasks"]]  # no questions
    del small["tasks"]["english"]
    large["tasks"]["code"] = large["tasks"]["code"] | {"text_sha256": "b" * 64}
    small["questions"] = large["questions"] = [{"name": "q", "question": "?"}]
    base = large["stages"]["base"]
    for document in base["scores"]["novel_heldout"]["documents"]:
        for block in [document, *document["blocks"]]:
            block["nll"] *= 1.1
    for stage, known in ((small["stages"]["base"], [True] * 4 + [False] * 8), (base, [True] * 12)):
        judged = {"own_language": None, "ended": True, "tokens": 1, "question": "q"}
        stage["answers"] = [judged | {"right": right, "text": f"Réponse {i}"} for i, right in enumerate(known)]
    [(prompt, written)] = compare.answers(reports)  # side by side
    assert prompt == {"name": "q", "text": "?"} and len(written) == 24 and written[12]["text"] == "Réponse 0"
    assert [each["label"].split(",")[0] for each in written[11:13]] == ["small: base", "large: base"]
    large["tasks"]["novel_heldout"]["path"] = "elsewhere/2c.heldout.jsonl"  # of the same text
    cells = cells_of(compare.paired(reports), "base: large - small")
    bits = small["stages"]["base"]["scores"]["novel_heldout"]["bits_per_byte"]
    assert cells["novel_heldout"].startswith(f"{0.1 * bits:+.3f} [+") and cells["novel_heldout"].endswith("] *")
    assert cells["code"] == cells["english"] == cells["in the questions' language"] == "–"
    assert re.fullmatch(r"\+67% \[\+[34]\d%, \+(8|9)\d%\] \*", cells["right"])
    assert cells["stops by itself"] == "+0% [+0%, +0%]"
    large["questions"] = []
    assert cells_of(compare.paired(reports), "base: large - small")["right"] == "–"

    # The ablation's row has its answers beside its bits per byte.
    base["parent"], large["differences"] = None, {"2a - base": {"against": "base", "scores": {}}}
    large["stages"]["2a"]["answers"] = small["stages"]["base"]["answers"]
    assert cells_of(tables.changes(large), "2a - base")["right"].startswith("-67% [-")


def test_a_text_that_only_the_third_run_has_is_a_dash(reports):
    for each in reports:
        del each["tasks"]["english"]
        for stage in filter(None, each["stages"].values()):
            del stage["scores"]["english"]
    third = report.load(DEMO) | {"run": "third"}
    assert cells_of(compare.paired([*reports, third]), "base: third - small")["english"] == "–"


def test_one_axis_holds_every_run(reports):
    picture = compare.draw_losses(reports)
    assert picture
    (axis,) = picture.axes
    drawn = {line.get_label(): line.get_xydata() for line in axis.lines}
    for label, points in {
        "small, training": [(100, 4.0), (200, 3.0)],
        "small, validation": [(200, 3.5)],
        "large, training": [(1000, 3.9), (1000, math.nan), (1500, 2.0)],  # 2b continues where 2a ended, without a line
        "large, validation": [(1000, math.nan), (1500, 2.5)],
    }.items():
        np.testing.assert_array_equal(drawn[label], points)
    assert axis.get_xscale() == "linear"
    assert len({line.get_color() for line in axis.lines if "," in str(line.get_label())}) == 2
    reports[1]["stages"]["2b"]["training"][0]["tokens"] = 1_000_000
    reports[1]["stages"]["2b"]["parent"] = "base"  # an ablation starts where its base is
    far = compare.draw_losses(reports)
    assert far and far.axes[0].get_xscale() == "log" and far.axes[0].dataLim.xmax == 1_000_000
    for each in reports:
        each["stages"] = {"base": each["stages"]["base"]}
    assert compare.draw_losses(reports) is None


def test_what_does_not_compare_is_said_or_left_out(reports):
    titles = re.findall(r"<h2>(.*?)</h2>", compare.html(reports))
    assert titles == [
        "Loss over tokens", "Bits per byte", "Run less run", "Memorisation", "Degeneration", "Perplexity"
    ]  # fmt: skip
    assert compare.warning(reports) == ""
    reports[1]["tasks"]["novel_heldout"]["text_sha256"] = "b" * 64
    assert "novel_heldout" in compare.warning(reports)
    del reports[0]["stages"]["2b"]
    reports[0]["run"] = "$^$"
    page = compare.html(reports)
    assert compare.warning(reports) in page
    assert "<dt>2b: large</dt>" in page and "<dt>2a: $^$</dt>" in page and "2b: $^$" not in page


def test_the_page_is_one_file_with_every_run(tmp_path, reports, capsys):
    for each in reports:
        (tmp_path / f"{each['run']}.json").write_text(json.dumps(each))
    base, trained = (tables.bits(reports[1]["stages"][name], "code") for name in ("base", "2b"))
    call_main(compare, "small", "large", "--reports", tmp_path)
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    said = re.sub(" +", " ", capsys.readouterr().out)
    assert compare.html(reports) == page and base in page and said.count("\n| 2") == 2 * len(reports[0]["tasks"])
    for row in ("stage, text | small | large", f"base, code | {base} | {base}", f"2b, code | – | {trained}"):
        assert f"| {row} |" in said

    (tmp_path / "small.json").rename(tmp_path / "renamed.json")
    call_main(compare, "renamed", "large", "--reports", tmp_path, "--out", tmp_path / "other.html")
    other = (tmp_path / "other.html").read_text(encoding="utf-8")
    assert "<b>renamed</b>" in other and "<b>small</b>" not in other  # a run goes by its file
