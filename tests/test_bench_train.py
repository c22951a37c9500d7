"""The sweep: a wrong plan is refused, what is finished is not run again, the page follows from the JSON report."""

import contextlib
import json
import os
import re
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
from tiny_curriculum import save_base
from transformers import AutoTokenizer

from bench import sweep, sweep_plugin, sweep_report
from eval.tasks.texts import read_rows
from prep.common import BadInput
from train.plugins import unknown_keys
from train.stages import load_recipe

ROOT = Path(__file__).parent.parent
REPORTS = sorted((ROOT / "bench/reports").glob("train*.json"))
DATA = {"2a": "a" * 64, "2b": "b" * 64, "2c": "c" * 64}
OURS: dict[str, Any] = {"name": "ours", "recipe": "recipes/2a.yml"}
ADAPTER: dict[str, Any] = {"name": "adapter", "recipe": "recipes/2b.yml", "parent": "ours"}
QUANTISED: dict[str, Any] = OURS | {"name": "quantised", "parent": "ours", "quantised": {"load_in_8bit": True}}


def plan_of(folder: Path, *variants: dict[str, Any], **more: Any) -> dict[str, Any]:
    plan = {
        "profile": "cpu", "threads": 1, "seeds": [1, 2], "all": {"bf16": True, "plugins": []}, "data": [],
        "batch_divisor": {"2a": 8, "2b": 16, "2c": 4}, "largest_batch": 2048, "variants": list(variants), **more,
    }  # fmt: skip
    (folder / "plan.yml").write_text(yaml.safe_dump(plan))
    return sweep.load_plan(folder / "plan.yml")


# --- plan and runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ([OURS, OURS], "a name of its own"),
        ([OURS | {"name": "base"}], "a name of its own"),
        ([OURS | {"override": {}}], "unknown key override"),
        ([OURS | {"recipe": "recipes/9z.yml"}], r"no recipe recipes/9z\.yml"),
        ([ADAPTER, OURS], "ours must be listed before it"),
        ([OURS | {"seeds": [1]}, ADAPTER], "has not all of its seeds"),
        ([OURS | {"against": ["theirs"]}], "theirs must be listed"),
        ([OURS | {"quantised": {"load_in_8bit": True}}], "`quantised` needs a parent"),
    ],
)
def test_a_bad_variant_is_refused(variants: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"plan\.yml, variant .*: .*{said}"):
        plan_of(tmp_path, *variants)


@pytest.mark.parametrize("text", ["", "- a\n", "all: [\n", "profile: cpu\n"])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yml").write_text(text)
    with pytest.raises(BadInput, match=r"plan\.yml"):
        sweep.load_plan(tmp_path / "plan.yml")


def test_the_batch_is_divided_exactly() -> None:
    ours = {"micro_batch_size": 16, "gradient_accumulation_steps": 2, "sequence_len": 512}
    theirs = {"micro_batch_size": 4, "gradient_accumulation_steps": 8, "sequence_len": 2048}
    assert sweep.divided(ours, 8, 2048) == {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    assert sweep.divided(ours, 2, 2048) == {"micro_batch_size": 4, "gradient_accumulation_steps": 4}
    assert sweep.divided(theirs, 16, 2048) == {"micro_batch_size": 1, "gradient_accumulation_steps": 2}
    for divisor in (3, 64):
        with pytest.raises(BadInput, match="cannot be divided"):
            sweep.divided(theirs, divisor, 2048)


def test_settings_are_the_recipe_with_overrides(tmp_path: Path) -> None:
    variant = OURS | {"overrides": {"learning_rate": 1e-3, "optim_args": None}}
    plan = plan_of(tmp_path, variant)
    settings = sweep.settings(variant, plan, 7)
    assert settings["learning_rate"] == 1e-3 and settings["seed"] == 7 and settings["bf16"] is True
    assert settings["optimizer"] == load_recipe(ROOT / "recipes/2a.yml")["optimizer"]
    assert "optim_args" not in settings and "test_datasets" not in settings
    assert sweep.settings(variant | {"curve": True}, plan, 7)["test_datasets"]


def runs_of(
    folder: Path, *variants: dict[str, Any], data: dict[str, str] = DATA, base: str = "b"
) -> dict[str, sweep.Run]:
    return {run.id: run for run in sweep.runs_of(plan_of(folder, *variants), data, base)}


def test_first_seeds_come_first_and_parents_before_what_builds_on_them(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, OURS, ADAPTER, ADAPTER | {"name": "late", "seeds": [2]})
    assert list(runs) == ["base", "ours-1", "adapter-1", "ours-2", "adapter-2", "late-2"]


def test_a_result_is_reused_only_when_all_that_decides_it_is_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    def keys(*variants: dict[str, Any], **more: Any) -> dict[str, str]:
        return {name: run.key for name, run in runs_of(tmp_path, *variants, **more).items()}

    before = keys(OURS, ADAPTER, QUANTISED)
    assert len(set(before.values())) == len(before)
    assert keys(OURS, ADAPTER | {"says": "x", "against": ["ours"]}, QUANTISED) == before
    hotter = keys(OURS | {"overrides": {"learning_rate": 1e-3}}, ADAPTER, QUANTISED)
    assert {name for name in before if before[name] == hotter[name]} == {"base"}  # children of a changed run change too
    smaller = keys(OURS, ADAPTER | {"overrides": {"lora_r": 8}}, QUANTISED | {"quantised": {"load_in_4bit": True}})
    assert {name for name in before if before[name] == smaller[name]} == {"base", "ours-1", "ours-2"}
    for more in ({"base": "other"}, {"data": DATA | {"2c": "d"}}):
        assert not set(keys(OURS, ADAPTER, QUANTISED, **more).values()) & set(before.values())
    monkeypatch.setattr(sweep, "VERSION", 0)
    assert not set(keys(OURS, ADAPTER, QUANTISED).values()) & set(before.values())


def test_two_processes_share_the_runs(tmp_path: Path) -> None:
    """Each run is had by one process; what builds on it waits for it."""
    runs = runs_of(tmp_path, OURS, ADAPTER)
    locks: dict[str, Any] = {}  # of runs that are being trained
    (tmp_path / "results").mkdir()

    def claim() -> str | None:
        claimed = sweep.claim(list(runs.values()), tmp_path)
        if claimed is None:
            return None
        locks[claimed[0].id] = claimed[1]
        return claimed[0].id

    assert [claim(), claim()] == ["base", None]
    sweep.store({}, sweep.result_file(runs["base"], tmp_path))
    assert [claim(), claim(), claim()] == ["ours-1", "ours-2", None]
    locks["ours-1"].lock.release()  # as when its process is killed
    assert [claim(), claim()] == ["ours-1", None]
    sweep.store({}, sweep.result_file(runs["ours-1"], tmp_path))
    assert [claim(), claim()] == ["adapter-1", None]


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("train*.yml")), ids=lambda path: path.stem)
def test_a_shipped_plan_is_good_and_axolotl_knows_its_keys(path: Path) -> None:
    plan = sweep.load_plan(path)
    for variant in plan["variants"].values():
        settings = sweep.settings(variant | {"curve": True}, plan, 1)
        assert settings.pop("plugins") == ["bench.sweep_plugin.Plugin"]  # it adds no keys; Liger's need Liger's plugin
        read = {key: value for key, value in settings.items() if not key.startswith("liger_")}
        assert unknown_keys({"test_datasets": [], **read}) == []


# --- report -----------------------------------------------------------------------------------------------------------


def result(shift: float, trained: bool = True) -> dict[str, Any]:
    """Invented: each unit's nats are its own, plus `shift` nats per byte, a little unevenly."""
    nll = [60 + i + 100 * shift * (1 + i / 100) for i in range(12)]
    run = {"nll": dict.fromkeys(sweep.TASKS, nll), "token_probability": {"train": 0.1, "heldout": 0.2}}
    log = [[0, None, 3.0], [1, 2.9, None], [4, 2.7, 2.6]]
    moved = {"changed": 0.987, "relative": 0.01}
    return run | ({"steps": 4, "tokens_per_step": 2048, "moved": moved, "log": log} if trained else {})


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    """Ours with both seeds, the adapter not yet run."""
    theirs = {"name": "kafka", "recipe": "bench/kafka/2a.yml", "against": ["ours"], "seeds": [1]}
    plan = plan_of(tmp_path, OURS | {"curve": True}, QUANTISED, ADAPTER | {"start": "quantised"}, theirs)
    runs = {"base": 0.3, "ours-1": 0.1, "ours-2": 0.15, "quantised-1": 0.12, "quantised-2": 0.12, "kafka-1": 0.2}
    return {
        "format": sweep_report.FORMAT, "date": "today", "plan": plan,
        "environment": {"cpu": "a machine", "threads": 2, "git": None},
        "manifests": {stage: {"train": {"windows": 4}, "sequence_len": 512} for stage in DATA},
        "validation": {stage: {"tokens": 10, "bytes": 30} for stage in DATA},
        "texts": {task: {"tokens": 400, "unit": "work", "bytes": [100] * 12} for task in sweep.TASKS},
        "recipes": {path: {"learning_rate": 1e-4} for path in ("recipes/2a.yml", "recipes/2b.yml", "bench/kafka/2a.yml")},
        "variants": plan["variants"],
        "runs": {name: result(shift, trained="quantised" not in name) for name, shift in runs.items()},
    }  # fmt: skip


def test_differences_are_paired_by_seed_and_by_mean(report: dict[str, Any]) -> None:
    found = sweep_report.Sweep(report)
    for name, other, seeds, shift in (("kafka", "ours", 1, 0.1), ("ours", "base", 2, -0.175)):
        less = found.less(name, other, "gallica_heldout")
        assert less and less["bits_per_byte"] == pytest.approx(shift / 0.693147, rel=0.1)
        low, high = less["interval"]
        assert low <= less["bits_per_byte"] <= high and low * high > 0
        assert len([seed for seed in (1, 2) if found.less(name, other, "gallica_heldout", seed)]) == seeds
    assert found.less("adapter", "quantised", "gallica_heldout") is None
    assert found.spread() == pytest.approx(0.05 * 1.055 / 0.693147, rel=1e-3)  # ours less base, of its two seeds


def test_the_tables_say_what_was_measured_and_what_not(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(sweep_report.dumped(report))
    assert json.loads(path.read_text()) == report
    sweep_report.write(path)
    page = path.with_suffix(".md").read_text()
    rows: dict[str, list[list[str]]] = {}
    for line in page.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        rows.setdefault(cells[0], []).append(cells)
    value = sweep_report.Sweep(report).bits("ours", "gallica_heldout")
    assert rows["ours"][0][1:6] == ["base", "1e-4", "4 x 2,048", "2", f"{value:.3f}"]
    assert rows["quantised"][0][1:5] == ["ours", "–", "–", "2"] and "+0.0" not in rows["ours"][0][6]
    assert rows["adapter"][0] == ["adapter", "quantised", "1e-4", "–", "0", *["–"] * 4]
    assert rows["kafka"][1][1] == "ours" and rows["kafka"][1][2].endswith("*") and rows["kafka"][1][4] == "1"
    assert rows["ours"][1] == ["ours", "98.7%", "0.01"] and rows["ours"][2][3:] == ["0.100", "0.200"]
    assert "400 (12 works)" in page and "tokens seen" in path.with_suffix(".svg").read_text()


def test_the_curve_is_in_bits_per_byte(report: dict[str, Any]) -> None:
    scale = 10 / 30 / 0.693147
    expected = [(0, pytest.approx(3 * scale)), (8192, pytest.approx(2.6 * scale))]
    assert sweep_report.Sweep(report).curve("ours") == expected
    assert sweep_report.Sweep(report).curve("adapter") == []


@pytest.mark.parametrize("text", ["{", '{"format": 1}'])
def test_a_damaged_or_older_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(BadInput, match="make bench-train"):
        sweep_report.load(tmp_path / "train.json")


@pytest.mark.parametrize("committed", REPORTS, ids=lambda path: path.stem)
def test_the_committed_page_and_picture_follow_from_the_json(committed: Path, tmp_path: Path) -> None:
    copy = tmp_path / committed.name
    copy.write_text(committed.read_text())
    sweep_report.write(copy)
    for suffix in (".md", ".svg"):
        assert copy.with_suffix(suffix).read_text() == committed.with_suffix(suffix).read_text(), suffix
    assert '"/' not in committed.read_text()  # no folder of the machine


def test_recipes_point_to_variants_that_were_measured() -> None:
    found = sweep_report.load(ROOT / "bench/reports/train.json")
    pointers = re.findall(r"bench: ([\w.-]+)", "".join(path.read_text() for path in (ROOT / "recipes").glob("*.yml")))
    assert pointers and all(found.runs(name) for name in pointers)


# --- the real thing, small --------------------------------------------------------------------------------------------

TINY = """
profile: cpu
seeds: [1]
threads: 1
all: {logging_steps: 1, eval_steps: null, save_steps: null, evals_per_epoch: 2, saves_per_epoch: 2, bf16: true, plugins: [bench.sweep_plugin.Plugin], curriculum_sampling: null}
batch_divisor: {2a: 16, 2b: 16, 2c: 4}
largest_batch: 2048
data:
  - '"$PYTHON" "$ROOT/demo/corpus.py" --out sources'
  - '"$PYTHON" "$ROOT/prep/gallica.py" --source sources/gallica --tokenizer models/base --sequence-len 512 --windows 8 --split 1/2 --holdout 0.2 --heldout-windows 2 --out data/2a.jsonl'
  - '"$PYTHON" "$ROOT/prep/gallica.py" --source sources/gallica --tokenizer models/base --sequence-len 2048 --windows 4 --split 2/2 --holdout 0.2 --heldout-windows 2 --out data/2b.jsonl'
  - '"$PYTHON" "$ROOT/prep/castle.py" --book "$ROOT/demo/corpus/novella.txt" --tokenizer models/base --holdout 0.2 --out data/2c.jsonl'
variants:
  - {name: full, recipe: recipes/2a.yml, curve: true}
  - {name: full-4bit, recipe: recipes/2a.yml, parent: full, quantised: {load_in_4bit: true}}
  - {name: adapter, recipe: recipes/2b.yml, parent: full, start: full-4bit, overrides: {learning_rate: 1e-2}, against: [full]}
  - {name: merged, recipe: recipes/2c.yml, parent: adapter, overrides: {base_model: outputs/merged, lora_model_dir: null}}
"""


def bench(folder: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "bench/sweep.py", "--plan", folder / "tiny.yml", "--base", folder / "base",
         "--work", folder / "work", "--out", folder / "reports", *map(str, arguments)],
        env=os.environ | {"CORPUS_DIR": str(folder), "HF_HUB_OFFLINE": "1"}, text=True, capture_output=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def side_by_side(folder: Path) -> tuple[list[str], set[str]]:
    """What two sweeps at once print, and OMP_NUM_THREADS of the processes that they start."""
    threads = set()
    with ThreadPoolExecutor(2) as pool:
        sweeps = [pool.submit(bench, folder) for _ in range(2)]
        while not all(each.done() for each in sweeps):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(word in " ".join(process.cmdline()) for word in ("axolotl.cli", "spawn_main")):
                        threads.add(process.environ().get("OMP_NUM_THREADS", "as many as cores"))
            time.sleep(0.2)
        return [each.result() for each in sweeps], threads


@pytest.mark.slow
def test_four_variants_end_to_end(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    (tmp_path / "tiny.yml").write_text(TINY)

    def runs() -> dict[str, Any]:
        return json.loads((tmp_path / "reports/tiny.json").read_text())["runs"]

    assert "2 of 5 runs finished" in bench(tmp_path, "--at-most", 2)
    assert set(runs()) == {"base", "full-1"}
    full = runs()["full-1"]

    # Two at once share the rest, and neither trains, merges or scores with more threads than the plan says.
    both, threads = side_by_side(tmp_path)
    assert sorted(re.findall(r"^([\w-]+)-1-\w+: started", "".join(both), re.M)) == ["adapter", "full-4bit", "merged"]
    assert all("5 of 5 runs finished" in each for each in both) and threads == {"1"}
    assert runs()["full-1"] == full
    adapter, quantised = runs()["adapter-1"], runs()["full-4bit-1"]
    assert full["steps"] == 4 and full["tokens_per_step"] == 1024 and full["moved"]["changed"] > 0.5
    assert adapter["steps"] == 4 and adapter["tokens_per_step"] == 2048 and adapter["moved"] is None
    assert [loss for step, _, loss in full["log"] if step in (0, 4) and loss] and "steps" not in quantised
    scores = [
        sum(runs()[name]["nll"]["gallica_heldout"])
        for name in ("base", "full-1", "full-4bit-1", "adapter-1", "merged-1")
    ]
    assert len(set(scores)) == 5

    # Axolotl shuffles the rows it keeps by the seed of the run that tokenises them; here every seed has the same order.
    kept = [load_from_disk(path.parent) for path in (tmp_path / "work/data/prepared").glob("2a-*/*/state.json")]
    (rows,) = [each["input_ids"] for each in kept if len(each) == 8]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    windows = [tokenizer(row["text"])["input_ids"][:100] for row in read_rows(tmp_path / "work/data/2a.jsonl")]
    # Each window has a tail, its end of text, which is shuffled along and then left out.
    parts = Dataset.from_list([part for window in windows for part in ({"window": window}, {"window": None})])
    order = [window for window in parts.shuffle(seed=sweep_plugin.ORDER)["window"] if window]
    assert [row[:100] for row in rows] == order

    # `merged` trained a new adapter on its parent's, merged into the model below.
    (merged,) = (tmp_path / "work").glob("merged-1-*/outputs/merged/model.safetensors")
    (before,) = (tmp_path / "work").glob("full-1-*/outputs/2a/model.safetensors")
    with safe_open(merged, "pt") as with_adapter, safe_open(before, "pt") as without:
        name = "model.layers.0.mlp.down_proj.weight"
        assert not torch.equal(with_adapter.get_tensor(name).float(), without.get_tensor(name).float())

    # A sweep that was killed has no result yet: that run, and no other, is made again.
    next((tmp_path / "work/results").glob("adapter-*.json")).unlink()
    assert re.findall(r"^([\w-]+)-1-\w+: started", bench(tmp_path), re.M) == ["adapter"]
    assert re.findall(r"^finished (\w+)", bench(tmp_path, "--list"), re.M) == [
        "base",
        "full",
        "full",
        "adapter",
        "merged",
    ]
