"""The bench of the recipes: a plan that is wrong is refused, what is finished is not run again, the page is the JSON's."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from safetensors import safe_open
from test_recipes import unknown_keys
from tiny_curriculum import save_base
from transformers import AutoTokenizer

from bench import sweep, sweep_plugin, sweep_report
from eval.readme import filled
from eval.tasks.texts import read_rows
from prep.common import BadInput
from train.stages import load_recipe

ROOT = Path(__file__).parent.parent
REPORT, LONG = (ROOT / f"bench/reports/{name}.json" for name in ("train", "train-long"))
PLANS = sorted((ROOT / "bench").glob("train*.yml"))
HASHES = {"2a": "a" * 64, "2b": "b" * 64, "2c": "c" * 64}


def plan_of(*variants: dict[str, Any], **more: Any) -> dict[str, Any]:
    settings = {"batch_divisor": {"2a": 8, "2b": 16, "2c": 4}, "largest_batch": 2048, "data": []}
    return {"profile": "cpu", "threads": 1, "all": {"bf16": True}, **settings, **more, "variants": list(variants)}


OURS = {"name": "ours", "recipe": "recipes/2a.yml", "seeds": [1, 2]}
ADAPTER = {"name": "adapter", "recipe": "recipes/2b.yml", "seeds": [1], "parent": "ours"}


def load(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "plan.yml"
    path.write_text(yaml.safe_dump(plan))
    return sweep.load_plan(path)


# --- the plan -----------------------------------------------------------------------------------------------------


def test_a_good_plan_is_read(tmp_path: Path) -> None:
    assert len(load(plan_of(OURS, ADAPTER), tmp_path)["variants"]) == 2


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ([{"name": "ours", "recipe": "recipes/2a.yml"}], "a name, a recipe and seeds"),
        ([OURS, OURS], "another of this name"),
        ([OURS | {"name": "base"}], "another of this name"),
        ([OURS | {"override": {}}], "unknown override"),
        ([OURS | {"recipe": "recipes/9z.yml"}], "no recipe recipes/9z.yml"),
        ([ADAPTER, OURS], "parent ours does not stand before it"),
        ([OURS, ADAPTER | {"seeds": [1, 3]}], "not trained with all of the seeds"),
        ([OURS | {"against": ["theirs"]}], "against theirs"),
        ([OURS, ADAPTER | {"start": "theirs"}], "against theirs"),
        ([OURS | {"rounded": {"load_in_8bit": True}}], "what is rounded is its parent"),
        ([OURS, ADAPTER | {"rounded": {"load_in_8bit": True}}], "what is rounded is its parent"),
    ],
)
def test_a_bad_variant_is_refused(variants: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        load(plan_of(*variants), tmp_path)


def test_a_stage_without_its_divisor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing of stage 2b"):
        load(plan_of(OURS, ADAPTER, batch_divisor={"2a": 8}), tmp_path)


def test_two_processes_share_the_runs(tmp_path: Path) -> None:
    """Each run is had by one; an adapter waits for what it builds on."""
    runs = sweep.runs_of(plan_of(OURS, ADAPTER), HASHES, "base")
    results: dict[str, Any] = dict.fromkeys(run.folder for run in runs)
    (tmp_path / "results").mkdir()

    def had() -> tuple[str, Any]:
        claimed = sweep.claim([run for run in runs if not results[run.folder]], results, tmp_path)
        return (claimed[0].folder[:-11], claimed[1]) if claimed else ("nothing", None)

    first, lock = had()
    second, _other = had()
    assert (first, second, had()[0]) == ("ours-1", "ours-2", "nothing")
    with lock:
        pass
    assert had()[0] == "ours-1"  # what a process that was killed had
    results[runs[0].folder] = {"key": ""}
    assert had()[0] == "adapter-1"


@pytest.mark.parametrize("text", ["", "- a\n", "all: [\n", "profile: cpu\n"])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yml").write_text(text)
    with pytest.raises(BadInput, match=r"plan\.yml"):
        sweep.load_plan(tmp_path / "plan.yml")


def test_the_batch_is_divided_exactly() -> None:
    ours = {"micro_batch_size": 16, "gradient_accumulation_steps": 2, "sequence_len": 512}
    theirs = {"micro_batch_size": 4, "gradient_accumulation_steps": 8, "sequence_len": 2048}
    assert sweep.divided(ours, 8, 2048) == {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    assert sweep.divided(ours, 2, 2048) == {"micro_batch_size": 4, "gradient_accumulation_steps": 4}
    assert sweep.divided(theirs, 16, 2048) == {"micro_batch_size": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(BadInput, match="cannot be divided"):
        sweep.divided(theirs, 64, 2048)


def test_settings_are_the_recipe_and_what_is_overridden() -> None:
    variant = OURS | {"overrides": {"learning_rate": 1e-3, "optim_args": None}}
    settings = sweep.settings(variant, 7, plan_of(variant))
    assert settings["learning_rate"] == 1e-3 and settings["seed"] == 7 and settings["bf16"] is True
    assert settings["optimizer"] == load_recipe(ROOT / "recipes/2a.yml")["optimizer"]
    assert "optim_args" not in settings and "test_datasets" not in settings and settings["plugins"] == []
    assert sweep.settings(variant | {"curve": True}, 7, plan_of(variant))["test_datasets"]


def test_first_seeds_come_first_and_parents_before_their_children() -> None:
    runs = sweep.runs_of(plan_of(OURS, ADAPTER, ADAPTER | {"name": "late", "seeds": [2]}), HASHES, "base")
    assert [(run.name, run.seed) for run in runs] == [("ours", 1), ("adapter", 1), ("ours", 2), ("late", 2)]


def test_what_decides_a_result_decides_its_key() -> None:
    def keys(*variants: dict[str, Any], data: dict[str, str] = HASHES, base: str = "base") -> list[str]:
        return [run.key for run in sweep.runs_of(plan_of(*variants), data, base)]

    ours, adapter, again = keys(OURS, ADAPTER)
    assert len({ours, adapter, again}) == 3
    assert keys(OURS, ADAPTER | {"says": "other words", "against": ["ours"]}) == [ours, adapter, again]
    hotter = keys(OURS | {"overrides": {"learning_rate": 1e-3}}, ADAPTER)
    assert hotter[0] != ours and hotter[1] != adapter  # the child of a changed parent is another
    assert keys(OURS, ADAPTER | {"overrides": {"lora_r": 8}})[0] == ours
    rounded = OURS | {"name": "rounded", "parent": "ours", "seeds": [1]}
    assert (
        len({*(keys(OURS, rounded | {"rounded": {bits: True}})[1] for bits in ("load_in_4bit", "load_in_8bit"))}) == 2
    )
    assert ours not in keys(OURS, ADAPTER, base="other") and ours not in keys(OURS, ADAPTER, data=HASHES | {"2c": "d"})


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_is_good_and_axolotl_knows_its_keys(path: Path) -> None:
    plan = sweep.load_plan(path)
    for variant in plan["variants"]:
        settings = sweep.settings(variant | {"curve": True}, variant["seeds"][0], plan)
        assert settings["plugins"] == ["bench.sweep_plugin.Plugin"]
        del settings["plugins"]  # it adds no key, and Liger's are not read without Liger's plugin
        read = {key: value for key, value in settings.items() if not key.startswith("liger_")}
        assert unknown_keys({"test_datasets": [], **read}) == []


# --- figures ------------------------------------------------------------------------------------------------------


def scores(shift: float, works: int = 12) -> dict[str, Any]:
    """Invented scores: each work's nats are its own, moved by `shift` nats a byte, a little unevenly."""
    documents = [
        {
            "source": f"work {i}", "part": "1", "tokens": 40, "words": 20, "bytes": 100,
            "nll": 60 + i + 100 * shift * (1 + i / 100), "blocks": [{"nll": 60 + i, "bytes": 100}],
        }
        for i in range(works)
    ]  # fmt: skip
    return sweep.scoring.summary(documents) | {"interval": sweep.intervals.interval(documents)}


def result(shift: float, steps: int = 4) -> dict[str, Any]:
    log = [{"step": step, "epoch": None, "tokens": None, "loss": None, "eval_loss": 3 - step / 10} for step in (0, 4)]
    return {
        "scores": {task: scores(shift) for task in sweep.TASKS},
        "memorisation": {side: {"token_probability": 0.1} for side in ("train", "heldout")},
        "steps": {"planned": steps, "reached": steps},
        "tokens_a_step": 2048,
        "movement": {"changed": 0.987, "relative": 0.01},
        "log": log,
    }


def test_documents_of_seeds_are_averaged() -> None:
    mean = sweep.together([result(0.1), result(0.3)], "gallica_heldout")
    assert mean[0]["nll"] == pytest.approx(60 + 20) and mean[5]["bytes"] == 100


def test_a_comparison_is_paired_by_seed_and_by_mean() -> None:
    before, after = {"1": result(0.2), "2": result(0.4)}, {"1": result(0.1), "2": result(0.3), "3": result(9)}
    compared = sweep.comparison(before, after, "gallica_heldout")
    assert compared and set(compared["seeds"]) == {"1", "2"}
    assert all(each["bits_per_byte"] < 0 for each in compared["seeds"].values())
    low, high = compared["mean"]["interval"]
    assert low <= compared["mean"]["bits_per_byte"] <= high < 0
    assert compared["mean"]["bits_per_byte"] == pytest.approx(-0.1 / 0.693147, rel=0.1)
    assert sweep.comparison({}, after, "gallica_heldout") is None


@pytest.fixture
def report() -> dict[str, Any]:
    """Ours with both seeds, the adapter not yet run."""
    theirs = {"name": "theirs", "recipe": "bench/reference/2a.yml", "against": ["ours"], "seeds": [1]}
    retuned = [theirs | {"name": f"theirs-{rate}", "overrides": {"learning_rate": rate}} for rate in (2e-4, 4e-4, 8e-4)]
    rounded = {"name": "rounded", "recipe": "recipes/2a.yml", "parent": "ours", "seeds": [1], "rounded": {"bits": 8}}
    plan = plan_of(OURS | {"curve": True}, rounded, ADAPTER | {"start": "rounded"}, theirs, *retuned)
    runs = sweep.runs_of(plan, HASHES, "base")
    shifts = {"ours": 0.1, "theirs": 0.2, "theirs-0.0002": 0.19, "theirs-0.0004": 0.15}
    found = {run.folder: result(shifts[run.name]) for run in runs if run.name in shifts}
    untrained = dict.fromkeys(("steps", "tokens_a_step", "movement", "log"))
    found |= {run.folder: result(0.12) | untrained for run in runs if run.rounded}
    facts = {
        "format": 1, "date": "today", "plan": plan, "validation": {stage: {"tokens": 10, "bytes": 30} for stage in HASHES},
        "environment": {"cpu": "a machine", "threads": 2, "git": None},
        "manifests": {stage: {"train": {"windows": 4}, "sequence_len": 512} for stage in HASHES},
    }  # fmt: skip
    return sweep.assemble(plan, runs, {"base": result(0.3), **found}, facts)


def test_the_table_says_what_was_measured_and_what_not(report: dict[str, Any]) -> None:
    text = sweep_report.tables(report)
    rows = {line.split(" | ")[0].strip("|` "): line for line in text.splitlines() if line.startswith("| `")}
    value = report["variants"]["ours"]["runs"]["1"]["scores"]["gallica_heldout"]["bits_per_byte"]
    assert f"| {value:.3f} |" in rows["ours"] and "4 x 2,048" in rows["ours"]
    assert rows["adapter"].count("–") == 5  # steps, two figures, two gains
    assert rows["theirs"].count("*") == 2 and "+0.1" in rows["theirs"]
    assert "12 works" in text
    assert rows["rounded"].count("–") == 2 and rows["rounded"].count("+0.") == 6  # no rate, no steps, and worse
    assert rows["adapter"].split("|")[2].strip() == "`rounded`"  # what its gain is counted from


def test_the_spread_of_the_seeds_is_the_largest(report: dict[str, Any]) -> None:
    assert sweep_report.seed_spread(report) == 0  # both seeds of ours were given one result
    for text, moved in zip(sweep_report.TEXTS, (0.25, 0.5), strict=True):
        report["variants"]["ours"]["gain"]["base"][text]["seeds"]["2"]["bits_per_byte"] -= moved
    assert sweep_report.seed_spread(report) == pytest.approx(0.5)
    assert "moved by 0.500 at most" in sweep_report.tables(report)
    report["variants"] = {"theirs": report["variants"]["theirs"]}
    assert sweep_report.seed_spread(report) is None  # one seed


def test_the_curve_is_in_bits_per_byte(report: dict[str, Any]) -> None:
    line = sweep_report.curve(report, report["variants"]["ours"])
    assert line == [(0, pytest.approx(3 / 3 / 0.693147, rel=1e-5)), (8192, pytest.approx(2.6 / 3 / 0.693147, rel=1e-5))]
    assert sweep_report.curve(report, report["variants"]["theirs"]) == []  # not asked for
    assert sweep_report.curve(report, report["variants"]["adapter"] | {"curve": True}) == []  # not run


def test_without_a_log_the_curve_is_where_it_began_and_where_it_ended(report: dict[str, Any]) -> None:
    ours = report["variants"]["ours"]
    for done in ours["runs"].values():
        done["log"] = None
    start = report["base"]["scores"]["gallica_heldout"]["bits_per_byte"]
    end = ours["runs"]["1"]["scores"]["gallica_heldout"]["bits_per_byte"]
    assert sweep_report.curve(report, ours) == [(0, start), (8192, pytest.approx(end))]


def test_the_summary_takes_the_references_best_learning_rate(report: dict[str, Any]) -> None:
    """Of those that are finished; a stage that is not is a row of dashes."""
    row, adapters = (line.split("|")[1:-1] for line in sweep_report.summary(report).splitlines()[2:])
    cells = [cell.strip() for cell in row]
    value = {name: sweep_report.bits(report["variants"][name], "gallica_heldout") for name in report["variants"]}
    assert cells[0] == "`2a`" and cells[3] == f"{value['ours']:.3f}"
    assert cells[4] == f"{value['theirs']:.3f} at 1e-5" and cells[6] == f"{value['theirs-0.0004']:.3f} at 4e-4"
    assert cells[5].startswith("+0.1") and cells[7].startswith("+0.0") and cells[7].endswith("*")
    assert [cell.strip() for cell in adapters[2:]] == [f"{value['rounded']:.3f}", *["–"] * 5]


def test_the_summary_leaves_out_what_is_not_measured_against_ours(report: dict[str, Any]) -> None:
    """As the reference on another base is not, though it were the best."""
    before = sweep_report.summary(report)
    best = report["variants"]["theirs-0.0004"]
    report["variants"]["elsewhere"] = best | {"against": {}, "runs": {"1": result(0)}}
    assert sweep_report.summary(report) == before


def test_a_page_without_marks_is_an_error(report: dict[str, Any], tmp_path: Path) -> None:
    sweep.store(report, tmp_path / "train.json")
    page = tmp_path / "README.md"
    page.write_text("# nothing here")
    with pytest.raises(BadInput, match="no single pair of marks"):
        sweep_report.write(tmp_path / "train.json", page)
    with pytest.raises(BadInput, match="bench-train-summary"):
        sweep_report.write(tmp_path / "train.json", summary_in=page)


def test_page_and_picture_follow_from_the_json_alone(report: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench-train:begin -->\nold\n<!-- bench-train:end -->\nafter\n")
    sweep.store(report, tmp_path / "train.json")
    sweep_report.write(tmp_path / "train.json", readme)
    assert "`ours`" in readme.read_text() and "old" not in readme.read_text() and "after" in readme.read_text()
    written = {suffix: (tmp_path / f"train{suffix}").read_text() for suffix in (".md", ".svg")}
    for suffix in written:
        (tmp_path / f"train{suffix}").unlink()
    sweep_report.write(tmp_path / "train.json")
    assert written == {suffix: (tmp_path / f"train{suffix}").read_text() for suffix in written}
    assert "ours" in written[".svg"] and "tokens seen" in written[".svg"] and "98.7%" in written[".md"]


def test_a_damaged_or_foreign_report_is_refused(tmp_path: Path) -> None:
    for text in ("{", '{"format": 9}'):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(BadInput, match="bench-train"):
            sweep_report.load(tmp_path / "train.json")


# --- what is committed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [REPORT, LONG], ids=lambda path: path.stem)
def test_the_committed_page_and_picture_are_the_jsons(committed: Path, tmp_path: Path) -> None:
    report = tmp_path / committed.name
    report.write_text(committed.read_text())
    sweep_report.write(report)
    for suffix in (".md", ".svg"):
        assert report.with_suffix(suffix).read_text() == committed.with_suffix(suffix).read_text(), suffix


@pytest.mark.parametrize("committed", [REPORT, LONG], ids=lambda path: path.stem)
def test_every_run_of_the_committed_plan_is_in_its_report(committed: Path) -> None:
    """Under the settings that the plan and the recipes make today, and finished."""
    plan = sweep.load_plan(ROOT / f"bench/{committed.stem}.yml")
    report = sweep_report.load(committed)
    assert [variant["name"] for variant in plan["variants"]] == list(report["variants"])
    for variant in plan["variants"]:
        found = report["variants"][variant["name"]]
        assert list(found["runs"]) == [str(seed) for seed in variant["seeds"]] and all(found["runs"].values())
        today = sweep.settings(variant, variant["seeds"][0], plan)
        del today["dataset_prepared_path"], found["settings"]["dataset_prepared_path"]
        assert found["settings"] == json.loads(json.dumps(today)), f"{variant['name']}: make bench-{committed.stem}"


def test_the_recipes_readme_has_the_reports_tables() -> None:
    page, report = (ROOT / "recipes/README.md").read_text(), sweep_report.load(REPORT)
    assert page == filled(page, sweep_report.TABLES, sweep_report.tables(report))
    assert page != filled(page, sweep_report.TABLES, sweep_report.tables(report | {"base": None}))


def test_readme_has_the_reports_summary() -> None:
    page, report = (ROOT / "README.md").read_text(), sweep_report.load(REPORT)
    summary = sweep_report.summary(report)
    assert page == filled(page, sweep_report.SUMMARY, summary)
    for stage in report["plan"]["batch_divisor"]:
        assert f"| `{stage}` " in summary


def started(variant: dict[str, Any]) -> str:
    """The name of what it started from."""
    (name,) = variant["gain"]
    return name


def gain(variant: dict[str, Any], text: str) -> float:
    return variant["gain"][started(variant)][text]["mean"]["bits_per_byte"]


def test_the_committed_report_carries_what_is_said_of_ours() -> None:
    """Ahead of the reference at each of its learning rates, at every stage, on both texts, with two seeds."""
    report = sweep_report.load(REPORT)
    gallica, novel = sweep_report.TEXTS
    for stage, variants in sweep_report.stages(report).items():
        ours = next(iter(variants))
        theirs = [
            name
            for name, variant in variants.items()
            if variant["recipe"].startswith(sweep_report.REFERENCE) and ours in variant["against"]
        ]
        assert theirs[0] == f"{stage}-reference" and len(theirs) == 3
        for text in sweep_report.TEXTS:
            for name in theirs:
                assert variants[name]["against"][ours][text]["mean"]["interval"][0] > 0, (name, text)
                assert len(variants[name]["against"][ours][text]["seeds"]) == 2
        for text in (novel,) if stage == "2c" else (gallica, novel):  # 2c reads nothing but the novel
            assert variants[ours]["gain"][started(variants[ours])][text]["mean"]["interval"][1] < 0


def test_the_committed_report_carries_what_is_said_of_the_stages() -> None:
    variants = sweep_report.load(REPORT)["variants"]
    gallica, novel = sweep_report.TEXTS
    for text in sweep_report.TEXTS:
        assert gain(variants["2a-ours"], text) < 3 * gain(variants["2a-reference"], text) < 0
        nearest = variants["2a-nearest"]["against"]["2a-ours"][text]["mean"]["bits_per_byte"]
        at_its_rate = variants["2a-reference-1e-4"]["against"]["2a-ours"][text]["mean"]["bits_per_byte"]
        assert 0.8 * at_its_rate < nearest < at_its_rate
        for name in ("2b-reference", "2c-reference"):
            assert abs(gain(variants[name], text)) < 0.002
        assert variants["2b-ours-6e-4"]["against"]["2b-ours-8bit"][text]["mean"]["interval"][1] < 0
    moved = {
        name: [result["movement"]["changed"] for result in sweep_report.finished(variants[name])]
        for name in ("2a-ours", "2a-reference")
    }
    assert max(moved["2a-reference"]) < 0.02 and min(moved["2a-ours"]) > 0.5
    full, half, twice = (
        variants[f"2c-{name}"]["against"]["2c-ours-8bit"] for name in ("full", "ours-1e-4", "ours-4e-4")
    )
    assert full[novel]["mean"]["interval"][1] < 0 < full[gallica]["mean"]["interval"][0]
    assert half[gallica]["mean"]["interval"][1] < 0 < half[novel]["mean"]["interval"][0]
    low, high = twice[novel]["mean"]["interval"]
    assert low < 0 < high and twice[gallica]["mean"]["interval"][0] > 0
    assert gain(variants["2c-full"], novel) < gain(variants["2c-ours-4e-4"], novel)
    assert variants["2c-merged"]["against"]["2c-ours-8bit"][novel]["mean"]["interval"][0] > 0
    assert variants["2c-passes"]["gain"]["2b-ours-8bit"][novel]["mean"]["interval"][0] > 0


def test_the_committed_report_carries_what_is_said_of_four_bits() -> None:
    """Behind the reference on eight, because the base is; ahead of its best learning rate where both have four."""
    variants = sweep_report.load(REPORT)["variants"]

    def less(name: str, other: str, text: str) -> list[float]:
        return variants[name]["against"][other][text]["mean"]["interval"]

    for text in sweep_report.TEXTS:
        assert 0.5 < -gain(variants["2b-ours"], text) / gain(variants["2a-ours-4bit"], text) < 0.7
        for stage in "2b", "2c":
            assert gain(variants[f"{stage}-ours"], text) < 0
            assert less(f"{stage}-ours", f"{stage}-reference", text)[0] > 0
            on_eight = less(f"{stage}-reference-1e-3", f"{stage}-ours-8bit", text)
            assert less(f"{stage}-reference-1e-3-4bit", f"{stage}-ours", text)[0] > on_eight[1] > 0


def test_the_references_last_stage_continues_its_best_adapter() -> None:
    variants = sweep_report.load(REPORT)["variants"]
    theirs = [name for name in variants if "2b-ours-8bit" in variants[name]["against"] and "reference" in name]
    assert len(theirs) == 3
    for text in sweep_report.TEXTS:
        scores = {name: sweep_report.bits(variants[name], text) or 0 for name in theirs}
        best = min(scores, key=scores.__getitem__)
        assert {variants[f"2c-reference-{rate}"]["parent"] for rate in ("2e-4", "1e-3")} == {best}


def test_the_committed_report_carries_what_is_said_of_smaller_decisions() -> None:
    variants = sweep_report.load(REPORT)["variants"]
    ours = gain(variants["2b-ours-8bit"], "gallica_heldout")
    assert 0.5 < gain(variants["2b-rank-16"], "gallica_heldout") / ours < 0.6
    assert 0.2 < gain(variants["2b-no-rslora"], "gallica_heldout") / ours < 0.3
    for text in sweep_report.TEXTS:
        assert variants["2a-ours-embedding"]["against"]["2a-ours"][text]["mean"]["interval"][0] > 0
        assert variants["2b-loraplus"]["gain"]["2a-ours-8bit"][text]["mean"]["interval"][0] > 0


def test_what_three_times_the_tokens_turn_and_what_they_do_not() -> None:
    short, long = (sweep_report.load(path)["variants"] for path in (REPORT, LONG))
    gallica, novel = sweep_report.TEXTS

    def less(variants: dict[str, Any], name: str, other: str, text: str) -> dict[str, Any]:
        return variants[name]["against"][other][text]["mean"]

    for text in sweep_report.TEXTS:
        for stage, theirs, ours in ("2a", "3e-4", "ours"), ("2b", "1e-3", "ours-8bit"), ("2c", "1e-3", "ours-8bit"):
            compared = long[f"{stage}-reference-{theirs}"]["against"][f"{stage}-{ours}"][text]
            assert compared["mean"]["interval"][0] > 0 and len(compared["seeds"]) == 2
        gains = [less(each, "2b-ours-6e-4", "2b-ours-8bit", text)["bits_per_byte"] for each in (long, short)]
        assert gains[0] < gains[1] < 0
    for variants in short, long:
        low, high = less(variants, "2a-ours-3e-4", "2a-ours", gallica)["interval"]
        assert low < 0 < high
    low, high = less(long, "2c-reference-1e-3", "2c-ours-1e-4", novel)["interval"]
    assert low < 0 < high and less(long, "2c-reference-1e-3", "2c-ours-1e-4", gallica)["interval"][0] > 0
    for variants in short, long:
        kept, lost = (less(variants, "2c-ours-1e-4", "2c-ours-8bit", text)["interval"] for text in (gallica, novel))
        assert kept[1] < 0 < lost[0]


def test_held_out_loss_turns_after_four_passes() -> None:
    """Four passes an epoch; the first point is before any."""
    report = sweep_report.load(REPORT)
    line = sweep_report.curve(report, report["variants"]["2c-passes"])
    assert min(range(len(line)), key=lambda index: line[index][1]) == 1 and len(line) == 5


def test_recipes_point_to_rows_that_exist() -> None:
    """`bench: NAME` in a recipe names a finished variant of the committed report."""
    variants = sweep_report.load(REPORT)["variants"]
    pointers = [
        (path.stem, name)
        for path in (ROOT / "recipes").glob("*.yml")
        for name in re.findall(r"bench: ([\w.-]+)", path.read_text())
    ]
    assert pointers
    for stem, name in pointers:
        assert variants[name]["stage"] == stem and sweep_report.finished(variants[name]), name


# --- the real thing, small ----------------------------------------------------------------------------------------

TINY = """
profile: cpu
threads: 1
all: {logging_steps: 1, eval_steps: null, save_steps: null, evals_per_epoch: 2, saves_per_epoch: 2, bf16: true, plugins: [bench.sweep_plugin.Plugin]}
batch_divisor: {2a: 16, 2b: 16, 2c: 4}
largest_batch: 2048
data:
  - '"$PYTHON" "$ROOT/demo/corpus.py" --out sources'
  - '"$PYTHON" "$ROOT/prep/gallica.py" --source sources/gallica --tokenizer models/base --sequence-len 512 --windows 8 --split 1/2 --holdout 0.2 --heldout-windows 2 --out data/2a.jsonl'
  - '"$PYTHON" "$ROOT/prep/gallica.py" --source sources/gallica --tokenizer models/base --sequence-len 2048 --windows 4 --split 2/2 --holdout 0.2 --heldout-windows 2 --out data/2b.jsonl'
  - '"$PYTHON" "$ROOT/prep/castle.py" --book "$ROOT/demo/corpus/novella.txt" --tokenizer models/base --holdout 0.2 --out data/2c.jsonl'
variants:
  - {name: full, recipe: recipes/2a.yml, seeds: [1], curve: true}
  - {name: full-4bit, recipe: recipes/2a.yml, seeds: [1], parent: full, rounded: {load_in_4bit: true}}
  - {name: adapter, recipe: recipes/2b.yml, seeds: [1], parent: full, start: full-4bit, overrides: {learning_rate: 1e-2}, against: [full]}
  - {name: merged, recipe: recipes/2c.yml, seeds: [1], parent: adapter, overrides: {base_model: outputs/merged, lora_model_dir: null}}
"""


def killed(row: sweep.weights.Candidate) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_scoring_that_is_killed_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "scored", killed)
    with pytest.raises(BadInput, match=r"scoring 2b was killed.*goes on"):
        sweep.score(sweep.weights.Candidate("2b", Path("models/base"), None, None, None))


def bench(folder: Path, *arguments: object, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "bench/sweep.py", "--plan", folder / "tiny.yml", "--base", folder / "base",
         "--work", folder / "work", "--out", folder / "reports", *map(str, arguments)],
        env=os.environ | {"CORPUS_DIR": str(folder), "HF_HUB_OFFLINE": "1"}, text=True, capture_output=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == expect, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def side_by_side(folder: Path) -> tuple[list[str], set[str]]:
    """What two benches at once print, and OMP_NUM_THREADS of all processes that they start."""
    threads = set()
    with ThreadPoolExecutor(2) as pool:
        benches = [pool.submit(bench, folder) for _ in range(2)]
        while not all(each.done() for each in benches):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(word in " ".join(process.cmdline()) for word in ("axolotl.cli", "spawn_main")):
                        threads.add(process.environ().get("OMP_NUM_THREADS", "as many as cores"))
            time.sleep(0.2)
        return [each.result() for each in benches], threads


def test_the_report_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/2a.manifest.json").write_text(json.dumps({"seed": 42, "source": {"path": "/home/a/corpus/gallica"}}))
    assert sweep.manifest("2a") == {"seed": 42, "source": {"path": "gallica"}}
    assert '"/' not in REPORT.read_text() and '"/' not in LONG.read_text()


@pytest.mark.slow
def test_four_variants_end_to_end(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    (tmp_path / "tiny.yml").write_text(TINY)

    def variants() -> dict[str, Any]:
        return json.loads((tmp_path / "reports/tiny.json").read_text())["variants"]

    first = bench(tmp_path, "--at-most", 1)
    assert "1 of 4 runs finished" in first
    assert variants()["full"]["runs"]["1"] and variants()["adapter"]["runs"]["1"] is None
    before = variants()["full"]["runs"]["1"]

    # Two at once share the rest, and neither trains, merges or scores with more threads than the plan says.
    both, threads = side_by_side(tmp_path)
    assert sorted(re.findall(r"^=== ([\w-]+)-1-", "".join(both), re.M)) == ["adapter", "full-4bit", "merged"]
    assert all("4 of 4 runs finished" in each for each in both) and threads == {"1"}
    assert variants()["full"]["runs"]["1"] == before
    after = variants()["adapter"]["runs"]["1"]
    assert before["steps"]["reached"] == 4 and before["tokens_a_step"] == 1024 and before["movement"]["changed"] > 0.5
    assert after["steps"]["reached"] == 4 and after["tokens_a_step"] == 2048 and after["movement"] is None
    assert [point["eval_loss"] is not None for point in before["log"] if point["step"] in (0, 4)] == [True, True]
    rounded = variants()["full-4bit"]["runs"]["1"]
    gain = variants()["adapter"]["gain"]["full-4bit"]["gallica_heldout"]["mean"]
    bits = [each["scores"]["gallica_heldout"]["bits_per_byte"] for each in (before, rounded, after)]
    assert gain["bits_per_byte"] == pytest.approx(bits[2] - bits[1]) and bits[0] != bits[1]
    assert rounded["steps"] is None and rounded["log"] is None

    # Axolotl shuffles the rows it keeps by the seed of the run that tokenises them; here the order is every seed's.
    kept = [load_from_disk(path.parent) for path in (tmp_path / "work/data/prepared").glob("2a-*/*/state.json")]
    (rows,) = [each["input_ids"] for each in kept if len(each) == 8]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    windows = [tokenizer(row["text"])["input_ids"][:100] for row in read_rows(tmp_path / "work/data/2a.jsonl")]
    # Each window has a tail, its end of text, which is shuffled along and then left out.
    both = Dataset.from_list([part for window in windows for part in ({"window": window}, {"window": None})])
    order = [window for window in both.shuffle(seed=sweep_plugin.ORDER)["window"] if window]
    assert [row[:100] for row in rows] == order

    # The last one trained a new adapter on the parent's, merged into the model that it stood on.
    (merged,) = (tmp_path / "work").glob("merged-1-*/outputs/merged/model.safetensors")
    (full,) = (tmp_path / "work").glob("full-1-*/outputs/2a/model.safetensors")
    with safe_open(merged, "pt") as with_adapter, safe_open(full, "pt") as without:
        name = "model.layers.0.mlp.down_proj.weight"
        assert not torch.equal(with_adapter.get_tensor(name).float(), without.get_tensor(name).float())
    last = variants()["merged"]["runs"]["1"]["scores"]["novel_heldout"]["bits_per_byte"]
    assert last != after["scores"]["novel_heldout"]["bits_per_byte"]

    # What a kill in mid-training leaves: no result yet; it is made again, from the last whole checkpoint if there is one.
    next((tmp_path / "work/results").glob("adapter-*.json")).unlink()
    third = bench(tmp_path)
    assert "=== adapter" in third and "=== full-1-" not in third
    fourth = bench(tmp_path)
    assert "===" not in fourth and "4 of 4 runs finished" in fourth
    assert re.findall(r"^finished ([\w-]+)-1-", bench(tmp_path, "--list"), re.M) == [
        "full",
        "full-4bit",
        "adapter",
        "merged",
    ]
    assert "`adapter`" in (tmp_path / "reports/tiny.md").read_text()
