"""The GPU bench as far as a CPU can test it: what it would run, what it makes of what ran, and all of it with a tiny model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from axolotl_preprocessing import axolotl_windows
from transformers import AutoTokenizer

from bench import gpu, gpu_plugin, rehearsal
from prep.common import BadInput
from train.plugins import unknown_keys
from train.stages import load_chain, load_recipe

ROOT = Path(__file__).parent.parent
OURS = [stage for stage in load_chain(ROOT / "recipes", "2") if not stage.config.get("rl")]
ABLATIONS = gpu.load_ablations(ROOT / "bench/ablations.yml", OURS)


# --- what would run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ABLATIONS, ids=lambda run: f"{run.recipe} {run.variant}")
def test_axolotl_knows_every_ablation(run: gpu.Run, axolotl_validates: Any) -> None:
    config = run.trained(tiny=False)
    assert unknown_keys(config | {"test_datasets": []}) == []
    validated = axolotl_validates(config)
    for key, value in run.overrides.items():
        if value in (None, False):
            assert not validated.get(key) or key == "bnb_config_kwargs", key
        else:
            assert validated.get(key) == value or (value is True and validated.get(key)), key


def test_rows_make_whole_windows(tmp_path: Path) -> None:
    sequence_len = 512
    gpu.save_tokenizer(1000, tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 1000
    gpu.save_rows(tmp_path / "rows.jsonl", 40 * sequence_len, sequence_len, 1000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    lengths, kept = axolotl_windows(texts, tmp_path, sequence_len)
    assert lengths == ([sequence_len] * 16 + [1]) * 2 and len(kept) == 32
    assert all(len(window) == sequence_len for window in kept)
    assert kept[0][0] == 1 and max(max(window) for window in kept) < 1000


def test_a_run_gets_what_a_12_gb_card_has_free_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    limits: list[float] = []
    monkeypatch.setattr(gpu_plugin, "GPU", True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * gpu.GIB, 24 * gpu.GIB))
    for free in (None, gpu.CARD):
        gpu_plugin.Probe().pre_model_load(SimpleNamespace(probe_free_gib=free))
    assert limits == pytest.approx([(11 - 0.74) / 24])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * gpu.GIB, 8 * gpu.GIB))
    with pytest.raises(RuntimeError, match=r"11 GiB of the card must be free: 7\.00 GiB are"):
        gpu_plugin.Probe().pre_model_load(SimpleNamespace(probe_free_gib=gpu.CARD))


# --- what it makes of what ran ----------------------------------------------------------------------------------------


def test_a_record_is_judged() -> None:
    """Warm-up and a shorter last step do not count; a training that learns nothing has no speed."""
    record: dict[str, Any] = {"step_seconds": [9.0, 2.0, 1.0, 3.0, 0.5], "step_tokens": [64, 64, 64, 64, 16]}
    record |= {"warmup": 1, "memory": {}, "losses": [7.0, 6.9]}
    found = gpu.figures(record)
    assert found["status"] == "ok" and found["steps"] == 3 and found["tokens_per_step"] == 64
    assert found["tokens_per_s"] == pytest.approx(64 * 3 / 6.0) and found["step_s"] == 2.0
    for broken in ({"warmup": 5}, {"losses": [7.0, 0.0]}, {"losses": [7.0, float("nan")]}):
        assert gpu.figures(record | broken)["status"] == "failed"


@pytest.mark.parametrize(
    ("log", "status", "reason"),
    [
        ("Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate.\nx", "out of memory", "Tried"),
        ("[rank0]: RuntimeError: CUDA error: out of memory\n", "out of memory", "CUDA error"),
        ("ImportError: no flash\nsubprocess.CalledProcessError: Command died\n", "failed", "no flash"),
        ("hello\n", "failed", "status -9"),
    ],
)
def test_a_failure_is_a_result(log: str, status: str, reason: str) -> None:
    found = gpu.failure(log, -9)
    assert found["status"] == status and reason in found["reason"]


def measured(tokens_per_s: float) -> dict[str, Any]:
    moments = {"loaded": 2.0**31, "at_optimizer_step": 2.0**32, "peak_allocated": 2.0**33}
    return {
        "fingerprint": "f", "status": "ok", "wall_s": 30.0, "tokens_per_s": tokens_per_s, "step_s": 0.5,
        "memory": {**moments, "driver": 10 * 2**30, "peak_reserved": 9 * 2**30, "retries": 2},
        "planned": {**moments, "peak_allocated": 8.4 * 2**30},
    }  # fmt: skip


REPORT: dict[str, Any] = {
    "facts": {"what": "A model.", "parameters": 1, "machine": {"gpu": "G", "cores": 2}, "versions": {"torch": "2"}},
    "commit": {"commit": "c" * 40, "modified": True},
    "runs": {
        **{f"2a, ours, 11 GiB, {i}": measured(rate) for i, rate in enumerate((10_000, 20_000, 12_000), 1)},
        "2a, kafka, 11 GiB, 1": measured(10_000), "2a, no packing, 11 GiB, 1": measured(6_000),
        "2b, kafka, 11 GiB, 1": measured(1) | {"status": "out of memory", "reason": "CUDA out of memory"},
        "2a, ours, whole card, 1": measured(30_000),
    },
}  # fmt: skip


def test_the_page_and_the_list_say_what_was_measured(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(REPORT))
    bench(monkeypatch, "--list", "--out", tmp_path / "gpu.json")
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith("2a, ours, 11 GiB, 1 ") and listed[0].endswith(" ok")
    assert len({line[:60] for line in listed}) == len(listed) > len(ABLATIONS)
    lines = [line for line in gpu.page(REPORT).splitlines() if line.startswith("| 2")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == [
        "2a", "ours", "11 GiB", "3", "12,000 (10,000 to 20,000)", "–", "1.20", "500", "2.00 (planned 2.00, +0%)",
        "4.00 (planned 4.00, +0%)", "8.00 (planned 8.40, +5%)", "9.00 (2 retries)", "10.00",
    ]  # fmt: skip
    assert rows[2][1] == "no packing" and rows[2][5:7] == ["0.50", "0.60"] and rows[4][4:7] == ["30,000", "–", "–"]
    assert rows[3][:5] == ["2b", "kafka", "11 GiB", "0 of 1", "**out of memory**: CUDA out of memory"]
    assert len(rows) == 5


# --- the command ------------------------------------------------------------------------------------------------------


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", *map(str, arguments)])
    gpu.main()


def test_what_cannot_be_measured_or_continued_is_one_clear_error(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    with pytest.raises(BadInput, match="no NVIDIA GPU; `--tiny`"):
        bench(monkeypatch, "--work", tmp_path / "work", "--out", tmp_path / "gpu.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match=r"no run matches 9z,\*; --list"):
        bench(monkeypatch, "--tiny", "--only", "9z,*", "--work", tmp_path)
    out = tmp_path / "gpu.json"
    out.write_text("{")
    with pytest.raises(BadInput, match=r"gpu\.json is damaged"):
        bench(monkeypatch, "--tiny", "--out", out)
    out.write_text(json.dumps(REPORT))  # figures of two machines never meet in one report
    with pytest.raises(BadInput, match="made with another what, machine"):
        bench(monkeypatch, "--tiny", "--out", out)


@pytest.mark.slow
def test_the_bench_with_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continues an adapter; then has nothing to do."""
    arguments: list[object] = ["--tiny", "--work", tmp_path / "work", "--out", tmp_path / "r/gpu.json"]
    arguments += ["--only", "2c, ours, 11 GiB, 1"]
    bench(monkeypatch, *arguments)
    monkeypatch.setattr(gpu, "measure", None)  # nothing is measured twice
    bench(monkeypatch, *arguments)

    (trained,) = json.loads((tmp_path / "r/gpu.json").read_text())["runs"].values()
    assert trained["status"] == "ok" and trained["tokens_per_step"] == 2048  # 1 x 1 x 2048, as in the smoke test
    assert all(6 < loss < 8 for loss in trained["losses"])  # random tokens of 1,000: ln 1000 = 6.9
    assert trained["tokens_per_s"] > 0 and trained["steps"] >= 1 and trained["planned"] == {}
    assert "no measurement of the recipes" in (tmp_path / "r/gpu.md").read_text()

    written = load_recipe(tmp_path / "work/runs/2c-ours-11-GiB-1/config.yml")
    assert written["lora_model_dir"] == "outputs/2b" and written["plugins"][-1] == "bench.gpu_plugin.Probe"
    assert not list((tmp_path / "work/runs").glob("*/output"))
    with pytest.raises(BadInput, match="made with another model"):  # a report is of one model
        monkeypatch.setitem(gpu.TINY, "hidden_size", 32)
        bench(monkeypatch, *arguments)


# --- the dress rehearsal ----------------------------------------------------------------------------------------------


def test_a_command_of_the_rehearsal_is_measured_and_killed_once_it_has_done_enough(tmp_path: Path) -> None:
    script, made = tmp_path / "script.py", tmp_path / "made"
    script.write_text(
        "import time; kept = b'x' * (300 << 20); open('made', 'wb').write(bytes(1 << 20)); time.sleep(60)"
    )
    row = rehearsal.measure((str(script),), tmp_path, tmp_path / "log", made.exists, card=False)
    assert row["seconds"] < 30 and row["disk"] >= 1 << 20 and row["disk_peak"] >= 1 << 20 and row["memory"] > 300 << 20


def test_a_command_of_the_rehearsal_that_fails_ends_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no')")
    with pytest.raises(BadInput, match="failed; its output is in "):
        rehearsal.measure((str(script),), tmp_path, tmp_path / "log", lambda: False, card=False)
    assert (tmp_path / "log").read_text() == "no\n"
