"""The sweep: a wrong plan is refused, what is finished is not run again, the page follows from the JSON report."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from tiny_curriculum import save_base
from transformers import AutoTokenizer

from bench import sweep, sweep_plugin, sweep_report
from eval.tasks.texts import read_rows
from prep.common import BadInput
from train.plugins import unknown_keys

ROOT = Path(__file__).parent.parent
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


def runs_of(folder: Path, *variants: dict[str, Any], data: dict[str, str] = DATA, base: str = "b") -> list[sweep.Run]:
    return sweep.runs_of(plan_of(folder, *variants), data, base)


# --- plan and runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ([OURS | {"override": {}}], "unknown keys: override"),
        ([{"recipe": "recipes/2a.yml"}], "missing keys: name"),
        ([{"name": "ours"}], "missing keys: recipe"),
        ([OURS, OURS], "the name of another: ours"),
        ([ADAPTER, OURS], "not listed before it: ours"),
        ([OURS | {"against": ["theirs"]}], "not listed before it: theirs"),
    ],
)
def test_a_bad_variant_is_refused(variants: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"plan\.yml, variant .*: .*{said}"):
        plan_of(tmp_path, *variants)
    for text in ("", "- a\n", "all: [\n", "profile: cpu\n"):
        (tmp_path / "plan.yml").write_text(text)
        with pytest.raises(BadInput, match=r"plan\.yml"):
            sweep.load_plan(tmp_path / "plan.yml")


def test_settings_are_the_recipe_with_overrides_and_a_smaller_batch(tmp_path: Path) -> None:
    variant = OURS | {"overrides": {"learning_rate": 1e-3, "optim_args": None}}
    plan = plan_of(tmp_path, variant)
    settings = sweep.settings(variant, plan, 7)
    assert settings["learning_rate"] == 1e-3 and settings["seed"] == 7 and settings["bf16"] is True
    assert settings["optimizer"] == "adamw_torch_8bit"
    assert "optim_args" not in settings and "test_datasets" not in settings
    assert sweep.settings(variant | {"curve": True}, plan, 7)["test_datasets"]
    for divisor, batch in {8: (4, 1), 2: (4, 4)}.items():  # of 32 windows; at most 4 at once
        divided = sweep.settings(variant, plan | {"batch_divisor": {"2a": divisor}}, 7)
        assert (divided["micro_batch_size"], divided["gradient_accumulation_steps"]) == batch
    for divisor in (3, 64):
        with pytest.raises(BadInput, match=f"divided by {divisor}"):
            sweep.settings(variant, plan | {"batch_divisor": {"2a": divisor}}, 7)


def test_runs_are_in_order_and_train_in_folders_of_their_own(tmp_path: Path) -> None:
    """Parents come before what builds on them, all of the first seed before the second; null overrides remove keys."""
    again = {"name": "again", "recipe": "recipes/2c.yml", "parent": "adapter"}
    merged = again | {"name": "merged", "overrides": {"base_model": "outputs/merged", "lora_model_dir": None}}
    runs = {run.id: run for run in runs_of(tmp_path, OURS, ADAPTER, again, merged)}
    first = ["ours-1", "adapter-1", "again-1", "merged-1"]
    assert list(runs) == ["base", *first, *(name.replace("1", "2") for name in first)]
    full, adapter, stage, apart = (runs[name].stage for name in first)
    assert full.base_model == Path("models/base") and full.output_dir == Path("outputs", runs["ours-1"].name)
    assert adapter.base_model == stage.base_model == full.output_dir
    assert stage.adapter_from == adapter.output_dir and apart.adapter_from is None
    assert apart.base_model == Path(f"{apart.output_dir}-merged")
    assert len({run.stage.output_dir for run in runs.values() if run.parent}) == 8


def test_a_result_is_reused_only_when_all_that_decides_it_is_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    def names(*variants: dict[str, Any], **more: Any) -> set[str]:
        return {run.name for run in runs_of(tmp_path, *variants, **more)}

    before = names(OURS, ADAPTER, QUANTISED)
    assert len(before) == 7
    assert names(OURS, ADAPTER | {"says": "x", "against": ["ours"]}, QUANTISED) == before
    hotter = names(OURS | {"overrides": {"learning_rate": 1e-3}}, ADAPTER, QUANTISED)
    assert {name.split("-")[0] for name in before & hotter} == {"base"}  # what builds on a changed run changes too
    smaller = names(OURS, ADAPTER | {"overrides": {"lora_r": 8}}, QUANTISED | {"quantised": {"load_in_4bit": True}})
    assert {name.split("-")[0] for name in before & smaller} == {"base", "ours"}
    for more in ({"base": "other"}, {"data": DATA | {"2c": "d"}}):
        assert not names(OURS, ADAPTER, QUANTISED, **more) & before
    monkeypatch.setattr(sweep, "VERSION", 0)
    assert not names(OURS, ADAPTER, QUANTISED) & before


def test_two_processes_share_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run is had by one process; what builds on it waits for it."""
    monkeypatch.chdir(tmp_path)
    runs = runs_of(tmp_path, OURS, ADAPTER)
    by_name = {run.id: run for run in runs}
    locks: dict[str, Any] = {}  # of runs that are being trained

    def claim() -> str | None:
        claimed = sweep.claim(runs)
        return locks.setdefault(claimed[0].id, claimed) and claimed[0].id if claimed else None

    Path("results").mkdir()
    assert [claim(), claim()] == ["base", None]
    by_name["base"].result.write_text("{}")
    assert [claim(), claim(), claim()] == ["ours-1", "ours-2", None]
    locks.pop("ours-1")[1].release()  # as when its process is killed
    assert [claim(), claim()] == ["ours-1", None]
    by_name["ours-1"].result.write_text("{}")
    assert [claim(), claim()] == ["adapter-1", None]


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("[tp]r*.yml")), ids=lambda path: path.stem)
def test_a_shipped_plan_is_good_and_axolotl_accepts_its_recipes(path: Path, axolotl_validates: Any) -> None:
    plan = sweep.load_plan(path)
    liger = ["axolotl.integrations.liger.LigerPlugin"]  # its keys stay in the recipe when a CPU leaves it out
    for variant in plan["variants"].values():
        config = sweep.settings(variant, plan, 1)
        assert unknown_keys({"test_datasets": [], **config}, liger) == []
        axolotl_validates(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # fp32 weights were their own mean once
def test_the_averaged_end_is_the_mean_of_the_second_half(dtype: torch.dtype) -> None:
    model, mean = torch.nn.Linear(1, 1, bias=False, dtype=dtype), sweep_plugin.Mean()
    for step in range(1, 7):
        model.weight.data.fill_(step)
        mean.on_step_end(None, SimpleNamespace(global_step=step, max_steps=6), None, model)
    assert model.weight.item() == (4 + 5 + 6) / 3


# --- report -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["preference", "train", "train-instruct", "train-long", "train-start"])
def test_the_committed_page_and_picture_follow_from_the_json(name: str, tmp_path: Path) -> None:
    committed, copy = ROOT / f"bench/reports/{name}.json", tmp_path / f"{name}.json"
    copy.write_text(committed.read_text())
    sweep_report.write(copy)
    for made in {copy.with_suffix(suffix) for suffix in (".md", ".svg")} & {*tmp_path.iterdir()}:
        assert made.read_text() == (committed.parent / made.name).read_text(), made
    assert sweep_report.dumped(json.loads(copy.read_text())) == committed.read_text()


def test_a_variant_that_has_not_run_yet_has_dashes(tmp_path: Path) -> None:
    report = json.loads((ROOT / "bench/reports/train.json").read_text())
    del report["runs"]["2c-passes-42"], report["runs"]["2c-passes-43"]  # one that has a picture
    (tmp_path / "train.json").write_text(json.dumps(report))
    sweep_report.write(tmp_path / "train.json")
    row = r"`2c-passes` *\| *`2b-ours-8bit` \| *2e-4 \| *– \| *0 \| *– \|"
    assert re.search(row, (tmp_path / "train.md").read_text())


def test_a_damaged_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"runs": {}}')
    with pytest.raises(BadInput, match="make bench-train"):
        sweep_report.load(tmp_path / "train.json")


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
batch_divisor: {2b: 16, 2c: 4}
largest_batch: 2048
texts: {gallica_heldout: Gallica}
samples: {prompts: 2, draws: 2, words: 5}
data:
  - '"$PYTHON" "$ROOT/demo/corpus.py" --out sources'
  - '"$PYTHON" "$ROOT/prep/gallica.py" --source sources/gallica --tokenizer models/base --sequence-len 2048 --windows 4 --split 2/2 --holdout 0.2 --heldout-windows 2 --workers 1 --out data/2b.jsonl'
  - '"$PYTHON" "$ROOT/prep/castle.py" --book "$ROOT/demo/corpus/novella.txt" --tokenizer models/base --holdout 0.2 --out data/2c.jsonl'
variants:
  - {name: adapter, recipe: recipes/2b.yml, overrides: {base_model: models/base, learning_rate: 1e-2}, curve: true}
  - name: full # every weight of the adapter's base, the adapter merged into it
    recipe: recipes/2c.yml
    parent: adapter
    overrides: {base_model: outputs/merged, lora_model_dir: null, load_in_4bit: null, bnb_config_kwargs: null, adapter: null, lora_r: null, lora_alpha: null, peft_use_rslora: null, lora_dropout: null, lora_target_linear: null, optimizer: adamw_torch, max_steps: 2}
    against: [adapter]
  - {name: full-4bit, recipe: recipes/2c.yml, parent: full, quantised: {load_in_4bit: true}}
"""


@pytest.mark.slow
def test_a_sweep_trains_merges_quantises_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base = save_base(tmp_path / "base")
    (tmp_path / "tiny.yml").write_text(TINY)
    folders = {"plan": "tiny.yml", "base": "base", "work": "work", "out": "reports"}
    command = [f"--{option}={tmp_path / name}" for option, name in folders.items()]
    monkeypatch.chdir(tmp_path)
    for name, value in {"CORPUS_DIR": ".", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)

    def started(*arguments: str) -> list[tuple[str, str]]:
        monkeypatch.setattr(sys, "argv", ["sweep.py", *command, *arguments])
        sweep.main()
        said = capsys.readouterr().out
        assert "4 of 4 runs finished" in said or "--list" in arguments
        return re.findall(r"^([\w-]+)-\w+: started| - ([\w-]+)-\w+", said, re.M)

    assert [name for name, _ in started()] == ["base", "adapter-1", "full-1", "full-4bit-1"]
    runs = json.loads((tmp_path / "reports/tiny.json").read_text())["runs"]
    full, adapter = runs["full-1"], runs["adapter-1"]
    assert adapter["steps"] == 4 and adapter["tokens_per_step"] == 2048 and adapter["moved"] is None
    assert full["steps"] == 2 and full["moved"]["changed"] > 0.5 and "steps" not in runs["full-4bit-1"]
    assert [loss for step, _, loss in adapter["log"] if step in (0, 4) and loss]
    assert len({sum(run["nll"]["gallica_heldout"]) for run in runs.values()}) == 4
    assert {len(values) for run in runs.values() for values in run["samples"].values()} == {2}
    assert re.search(r"\| the author +\| +0\.000 ", (tmp_path / "reports/tiny.md").read_text())
    (merged,) = Path("outputs").glob("full-1-*-merged/model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(load_file(merged)[name].float(), load_file(base / "model.safetensors")[name].float())

    # Axolotl shuffles the rows it keeps by the seed of the run that tokenises them; here every seed has the same order.
    kept = [load_from_disk(path.parent) for path in Path("data/prepared").glob("2b-*/*/state.json")]
    (rows,) = [each["input_ids"] for each in kept if len(each) == 4]
    tokenizer = AutoTokenizer.from_pretrained(base)
    windows = [tokenizer(row["text"])["input_ids"][:100] for row in read_rows(Path("data/2b.jsonl"))]
    # Each window has a tail, its end of text, which is shuffled along and then left out.
    parts = Dataset.from_list([part for window in windows for part in ({"window": window}, {"window": None})])
    order = [window for window in parts.shuffle(seed=sweep_plugin.ORDER)["window"] if window]
    assert [row[:100] for row in rows] == order

    # What is finished stays; a run that was killed has no result yet.
    assert started() == []
    next(Path("results").glob("full-4bit-*.json")).unlink()
    assert started("--list") == [("", "full-4bit-1")]
