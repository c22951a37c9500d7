"""The GPU bench, as far as a CPU can try it: what it would run, what it makes of what ran, and the whole of it, tiny."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from axolotl_preprocessing import axolotl_windows
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench import gpu, gpu_report
from bench.gpu_device import only
from bench.gpu_inputs import check_disk, make_inputs, save_rows, save_tokenizer
from bench.gpu_runs import CARD, effective, fingerprint, flops_per_token, load_levers, schedule, summary, verdict
from prep.common import BadInput
from train.memory import load_config
from train.plugins import unknown_keys
from train.stages import load_chain, load_recipe

ROOT = Path(__file__).parent.parent
SHIPPED = load_chain(ROOT / "recipes")
REFERENCE = [stage for stage in load_chain(ROOT / "bench/kafka") if not stage.adapter_from]
LEVERS = load_levers()
RUNS = schedule(SHIPPED, REFERENCE, LEVERS, repetitions=3)


def bench(*arguments: object, cwd: Path, status: int = 0) -> str:
    """Run the command as a user would, from another folder; what it printed."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench/gpu.py", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


# --- what would run -----------------------------------------------------------------------------------------------


def test_what_matters_most_runs_first() -> None:
    assert [run.id for run in RUNS[:5]] == [
        "2a, shipped, 11 GiB, 1", "2b, shipped, 11 GiB, 1", "2c, shipped, 11 GiB, 1",
        "2a, reference, 11 GiB, 1", "2b, reference, 11 GiB, 1",
    ]  # fmt: skip
    repetitions = [run.repetition for run in RUNS[: -len(LEVERS)]]
    assert repetitions == sorted(repetitions) and repetitions.count(3) == len(repetitions) / 3
    assert [run.variant for run in RUNS[-len(LEVERS) :]] == [lever["name"] for lever in LEVERS]
    assert len({run.id for run in RUNS}) == len({run.folder for run in RUNS}) == len(RUNS)


def test_ours_and_the_reference_alternate_on_the_whole_card() -> None:
    whole = [run.variant for run in RUNS if run.free_gib is None and run.repetition == 2]
    assert whole == ["shipped", "reference", "shipped", "reference", "shipped"]


def test_a_run_is_its_recipe_but_for_what_only_a_long_training_needs() -> None:
    for run in RUNS[:5]:
        config = effective(run, tiny=False)
        changed = {key for key in config.keys() | run.config.keys() if config.get(key) != run.config.get(key)}
        assert changed <= {
            "test_datasets", "eval_steps", "save_steps", "save_strategy", "auto_resume_from_checkpoints", "use_tensorboard",
        }  # fmt: skip
        assert "test_datasets" not in config


@pytest.mark.parametrize("run", RUNS[-len(LEVERS) :], ids=lambda run: f"{run.recipe} {run.variant}")
def test_axolotl_knows_every_lever(run: Any, axolotl_validates: Any) -> None:
    config = effective(run, tiny=False)
    assert config != effective(RUNS[0], tiny=False) or run.environment
    assert unknown_keys(config | {"test_datasets": []}) == []
    validated = axolotl_validates(config)
    for key, value in run.changes.items():
        if value in (None, False):
            assert not validated.get(key) or key == "bnb_config_kwargs", key
        else:
            assert validated.get(key) == value or (value is True and validated.get(key)), key


@pytest.mark.parametrize(
    "lever", [{"recipe": "2a", "name": "x"}, {"name": "x", "changes": {}}, {"recipe": "2a", "name": "x", "change": {}}]
)
def test_a_lever_that_says_nothing_is_refused(lever: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "levers.yml").write_text(yaml.safe_dump([lever]))
    with pytest.raises(BadInput, match=r"levers\.yml"):
        load_levers(tmp_path / "levers.yml")


def test_another_recipe_environment_or_model_is_another_measurement() -> None:
    run, config = RUNS[0], effective(RUNS[0], tiny=False)
    marks = {
        fingerprint(config, run, {}),
        fingerprint(config | {"micro_batch_size": 3}, run, {}),
        fingerprint(config, run, {"hidden_size": 1}),
        fingerprint(config, next(run for run in RUNS if run.environment), {}),
    }
    assert len(marks) == 4


# --- what it runs on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence_len", [512, 2048])
def test_rows_make_whole_windows(sequence_len: int, tmp_path: Path) -> None:
    save_tokenizer(1000, tmp_path)
    save_rows(tmp_path / "rows.jsonl", 40 * sequence_len, sequence_len, 1000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    lengths, kept = axolotl_windows(texts, tmp_path, sequence_len)
    assert lengths == ([sequence_len] * 16 + [1]) * 2 and len(kept) == 32
    assert all(len(window) == sequence_len for window in kept)
    assert kept[0][0] == 1 and max(max(window) for window in kept) < 1000


def test_the_tokenizer_has_the_models_vocabulary(tmp_path: Path) -> None:
    save_tokenizer(32_000, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 32_000 and tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2


def test_no_disk_is_said(tmp_path: Path) -> None:
    check_disk(tmp_path / "new" / "folder", 1)
    with pytest.raises(BadInput, match=r"GiB of disk.*--work"):
        check_disk(tmp_path / "new", 2**60)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(BadInput, match="holds other things"):
        make_inputs(tmp_path, LlamaConfig(), SHIPPED, 1)
    assert (tmp_path / "models").exists()


# --- what is made of it -------------------------------------------------------------------------------------------


def test_operations_are_those_that_torch_counts() -> None:
    """Every weight trained: forward and backward of a small Llama, by torch's counter."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"  # which torch counts on a CPU
    recipe = {"sequence_len": 256, "bf16": True}
    model = LlamaForCausalLM(config)
    ids = torch.zeros(3, 256, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counts = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    attention = counts["aten.bmm"]
    causal = 6 * 2 * 256 * 128 * ids.numel()
    assert sum(counts.values()) - attention == flops_per_token(config, recipe) * ids.numel() - causal
    # torch counts the masked half too; the rotary angles are a product as well, a small one
    assert attention / causal == pytest.approx(2, rel=0.01)


def test_a_frozen_base_costs_no_gradient_of_its_weights() -> None:
    config = load_config(ROOT / "train/tinyllama.json")
    lora = {"adapter": "lora", "lora_r": 64, "lora_alpha": 16, "lora_target_linear": True}
    full, adapter = (flops_per_token(config, recipe | {"sequence_len": 2048}) for recipe in ({}, lora))
    matrices = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632) + 32_000 * 2048
    assert full == 6 * matrices + 6 * 22 * 2048 * 2048
    assert full - adapter == 2 * matrices - 6 * 50_462_720


def test_warm_up_and_a_short_last_step_do_not_count() -> None:
    record: dict[str, Any] = {"step_seconds": [9.0, 2.0, 1.0, 3.0, 0.5], "step_tokens": [64, 64, 64, 64, 16]}
    record |= {"warmup": 1, "memory": {}, "losses": [7.0, 6.9]}
    figures = summary(record)
    assert figures["steps"] == 3 and figures["tokens_a_step"] == 64
    assert figures["tokens_per_s"] == pytest.approx(64 * 3 / 6.0) and figures["step_s"] == 2.0
    assert summary(record | {"warmup": 5})["status"] == "failed"


@pytest.mark.parametrize("loss", [0.0, float("nan")])
def test_a_training_that_learns_nothing_has_no_speed(loss: float) -> None:
    record = {"step_seconds": [1.0, 1.0], "step_tokens": [64, 64], "warmup": 1, "memory": {}, "losses": [7.0, loss]}
    assert summary(record)["status"] == "failed" and "status" not in summary(record | {"losses": [7.0, 6.9]})


@pytest.mark.parametrize(
    ("log", "status", "reason"),
    [
        (
            "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\nx",
            "out of memory",
            "Tried",
        ),
        ("[rank0]: RuntimeError: CUDA error: out of memory\n", "out of memory", "CUDA error"),
        ("ImportError: no flash\nsubprocess.CalledProcessError: Command died\n", "failed", "no flash"),
        ("hello\n", "failed", "status -9"),
    ],
)
def test_a_failure_is_a_result(log: str, status: str, reason: str) -> None:
    found = verdict(log, -9)
    assert found["status"] == status and reason in found["reason"]


def measured(recipe: str, variant: str, free: float | None, tokens_per_s: float, repetition: int = 1) -> dict[str, Any]:
    card = "whole card" if free is None else f"{free:g} GiB"
    return {
        "id": f"{recipe}, {variant}, {card}, {repetition}", "recipe": recipe, "variant": variant, "free_gib": free,
        "repetition": repetition, "fingerprint": "f", "changes": {}, "status": "ok", "wall_s": 30.0,
        "tokens_per_s": tokens_per_s, "step_s": 0.5, "flops_per_token": 1e9, "driver_peak": 10 * 2**30,
        "memory": {"peak_allocated": 8 * 2**30, "peak_reserved": 9 * 2**30, "retries": 0,
        "loaded": 2**31, "at_optimizer_step": 2**32}, "planned": {"peak": 8.4 * 2**30, "loaded": 2**31, "at_optimizer_step": 2**31},
    }  # fmt: skip


def a_report(*runs: dict[str, Any]) -> dict[str, Any]:
    """A report made by hand, to see what the page makes of it."""
    return {
        "what": gpu_report.RECIPES, "commit": {"commit": "c" * 40, "modified": True}, "settings": {}, "model": {"parameters": 1},
        "machine": {"gpu": "G", "gpu_bytes": 2**34, "driver": "1", "cpu": "C", "cores": 2}, "versions": {"torch": "2"},
        "matrix_products": [{"n": 8, "dtype": "bfloat16", "flops": flops} for flops in (4e13, 5e13, 1e13)],
        "runs": list(runs),
    }  # fmt: skip


FULL_REPORT = a_report(
    *(measured("2a", "shipped", CARD, rate, index) for index, rate in enumerate((10_000, 20_000, 12_000))),
    measured("2a", "reference", CARD, 10_000),
    measured("2a", "no packing", CARD, 6_000),
    measured("2b", "reference", CARD, 10_000) | {"status": "out of memory", "reason": "CUDA out of memory"},
    measured("2a", "shipped", None, 30_000),
)


def cells(page: str, start: str, table: int = 0) -> list[str]:
    line = [line for line in page.splitlines() if line.startswith(start)][table]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_says_what_was_measured() -> None:
    page = gpu_report.page(FULL_REPORT)
    assert cells(page, "| 2a | shipped | 11 GiB") == [
        "2a", "shipped", "11 GiB", "12,000 (10,000 to 20,000)", "–", "1.20", "500", "24%", "8.00", "9.00", "10.00", "8.40 (+5%)", "3",
    ]  # fmt: skip
    assert cells(page, "| 2a | no packing")[4:6] == ["0.50", "0.60"]
    assert cells(page, "| 2a | shipped | 11 GiB", 1)[3:] == [
        "2.00 / 2.00 (+0%)",
        "2.00 / 4.00 (-50%)",
        "8.40 / 8.00 (+5%)",
    ]
    assert "**out of memory**: CUDA out of memory" in page
    assert cells(page, "| 2a against the reference within") == [
        "2a against the reference within 11 GiB, tokens a second", "1.3", "1.20", "**no**",
    ]  # fmt: skip
    assert cells(page, "| 2b against the reference")[2:] == ["–", "not measured"]
    assert cells(page, "| 2a on the whole card, share")[2:] == ["0.60", "yes"]
    assert (
        cells(page, "| 2a runs within")[2:] == ["1.00", "yes"] and cells(page, "| 2c runs within")[3] == "not measured"
    )


def test_a_recipe_that_failed_once_has_no_speed() -> None:
    once = measured("2a", "shipped", CARD, 1.0, 4) | {"status": "out of memory", "reason": "r"}
    page = gpu_report.page(FULL_REPORT | {"runs": [*FULL_REPORT["runs"], once]})
    assert "**out of memory**, 3 of 4 were well: r" in page
    assert cells(page, "| 2a runs within")[2:] == ["0.75", "**no**"]
    assert cells(page, "| 2a against the reference within")[3] == "not measured"


def test_a_tiny_report_claims_nothing() -> None:
    page = gpu_report.page(FULL_REPORT | {"what": gpu_report.NOT_RECIPES})
    assert "no measurement of the recipes" in page and "goal" not in page


def test_a_report_is_read_back_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert gpu_report.load(path) is None
    gpu_report.save(path, FULL_REPORT)
    assert gpu_report.load(path) == FULL_REPORT
    assert path.with_suffix(".md").read_text() == gpu_report.page(FULL_REPORT)
    for damaged in ("{", "[]", '{"runs": []}', json.dumps(FULL_REPORT | {"runs": [{"id": "x"}]})):
        path.write_text(damaged)
        with pytest.raises(BadInput, match=r"gpu\.json .*damaged"):
            gpu_report.load(path)


@pytest.mark.parametrize("key", ["machine", "versions", "model", "what", "settings"])
def test_two_machines_do_not_share_a_report(key: str) -> None:
    fresh = copy.deepcopy(FULL_REPORT)
    gpu_report.check_same(Path("gpu.json"), FULL_REPORT, fresh | {"commit": None, "runs": []})
    with pytest.raises(BadInput, match=f"another {key}"):
        gpu_report.check_same(Path("gpu.json"), FULL_REPORT, fresh | {key: "other"})


def test_a_run_measured_again_takes_the_place_of_the_first() -> None:
    report = copy.deepcopy(FULL_REPORT)
    gpu_report.put(report, measured("2a", "no packing", CARD, 7_000))
    assert len(report["runs"]) == len(FULL_REPORT["runs"])
    assert [run["tokens_per_s"] for run in report["runs"] if run["variant"] == "no packing"] == [7_000]


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_names_the_way(tmp_path: Path) -> None:
    said = bench("--work", tmp_path / "work", "--out", tmp_path / "gpu.json", cwd=tmp_path, status=1)
    assert "no NVIDIA GPU" in said and "--tiny" in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_can_be_held() -> None:
    with only(None) as free:
        assert free is None
    with pytest.raises(BadInput, match="ended with status 1"), only(11.0):
        pytest.fail("a training would have started")


def in_this_process(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", *map(str, arguments)])
    gpu.main()


def test_an_unknown_recipe_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"no run is called '9z,\*'; recipes are 2a, 2b, 2c"):
        in_this_process(monkeypatch, "--tiny", "--only", "9z,*", "--work", tmp_path)
    with pytest.raises(BadInput, match="--warmup"):
        in_this_process(monkeypatch, "--warmup", 0)


def test_the_list_says_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_report.save(tmp_path / "gpu.json", FULL_REPORT)
    in_this_process(monkeypatch, "--list", "--out", tmp_path / "gpu.json")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RUNS)
    assert lines[0].split("  ")[0] == "2a, shipped, 11 GiB, 1" and lines[0].endswith("ok")
    assert lines[4].startswith("2b, reference") and lines[4].endswith("out of memory")


@pytest.mark.slow
def test_the_bench_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Continues an adapter, survives a run that fails, goes on where it stopped, profiles; then has nothing to do."""
    lever = {"recipe": "2c", "name": "cannot be", "changes": {"attn_implementation": "flash_attention_2"}}
    (tmp_path / "levers.yml").write_text(yaml.safe_dump([lever]))
    shared = [
        "--tiny",
        "--levers",
        tmp_path / "levers.yml",
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "r/gpu.json",
    ]
    shared += ["--seconds", 0.5, "--warmup", 1, "--tokens", 100_000, "--limit", 800, "--only", "2c, *, 11 GiB, 1"]

    in_this_process(monkeypatch, *shared, "--minutes", 0.001)
    assert "2 of 2 runs are left" in capsys.readouterr().out and not (tmp_path / "r").exists()
    bench(*shared, cwd=tmp_path)
    in_this_process(monkeypatch, *shared)
    assert "all 2 runs are in" in capsys.readouterr().out
    bench(*shared, "--profile", "2c, shipped, 11 GiB, 1", cwd=tmp_path)

    report = gpu_report.load(tmp_path / "r/gpu.json")
    assert report and report["what"] == gpu_report.NOT_RECIPES
    trained, failed, profiled = report["runs"]
    assert failed["status"] == "failed" and "flash" in failed["reason"].lower()
    assert trained["status"] == "ok" and trained["tokens_a_step"] == 2048  # 1 x 1 x 2048, as the smoke test has it
    assert all(6 < loss < 8 for loss in trained["losses"])  # random tokens of 1,000: ln 1000 = 6.9
    assert trained["tokens_per_s"] > 0 and trained["steps"] >= 1 and trained["planned"].keys() == {"none"}
    assert profiled["profile"][0]["microseconds"] >= profiled["profile"][-1]["microseconds"] > 0
    assert len(report["matrix_products"]) == 2 and all(each["flops"] > 1e6 for each in report["matrix_products"])
    page = (tmp_path / "r/gpu.md").read_text()
    assert "no measurement of the recipes" in page and "## Where the time goes" in page and "**failed**" in page

    written = load_recipe(tmp_path / "work/runs/2c-shipped-11-GiB-1/config.yml")
    assert written["lora_model_dir"] == "outputs/2b" and written["plugins"] == ["bench.gpu_plugin.Probe"]
    assert not list((tmp_path / "work/runs").glob("*/output"))
