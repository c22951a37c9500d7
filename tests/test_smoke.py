"""The whole curriculum once, small: real Axolotl, real 4-bit, the shipped recipes, on a tiny Llama and the demo's texts."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_curriculum import ENVIRONMENT, save_base
from tiny_curriculum import call_script as call
from tiny_curriculum import run_script as python
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.faults import left_in
from eval import generation
from eval.logs import LOGGED
from train.stage import as_arguments, load_profile
from train.stages import LOG, load_chain

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
CHAIN = {stage.name: stage for stage in load_chain(RECIPES, "2")}
# 2b as on a card: in bf16, with Axolotl's kernels for the adapter's layers (that of the MLP is Triton's, for CUDA alone).
PLUGINS = [*load_profile("smoke", "2b")[1]["plugins"], "smoke_plugins.RecordWindows", "smoke_plugins.KernelsOnCpu"]
AS_ON_A_CARD = {"plugins": PLUGINS, "bf16": True, "lora_qkv_kernel": True, "lora_o_kernel": True}


def stage(name: str, cwd: Path, *more: str) -> str:
    return python(ROOT / "train/stage.py", name, "--recipes", RECIPES, "--profile", "smoke", *more, cwd=cwd)


def accelerate(name: str, cwd: Path, **more: Any) -> str:
    """The command that README documents."""
    launch, overrides = load_profile("smoke", name)
    command = ["-m", "accelerate.commands.launch", *launch, "-m", "axolotl.cli.train", RECIPES / f"{name}.yml"]
    return python(*command, *as_arguments(overrides | more), cwd=cwd)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 0 and 1: a tiny Llama with random weights, and the demo's texts, collected and prepared by the real scripts."""
    cwd = tmp_path_factory.mktemp("smoke")
    save_base(cwd / "tiny", hidden=64)  # half of its embedding is whole blocks of the 8-bit moments too
    call(ROOT / "demo/corpus.py", "--out", "sources", cwd=cwd)
    call(ROOT / "prep/collect.py", "base", "--source", "tiny", cwd=cwd)
    call(ROOT / "prep/collect.py", "gallica", "--source", "sources/gallica", cwd=cwd)
    call(ROOT / "prep/collect.py", "book", "--source", "sources/novella.pdf", cwd=cwd)
    shared = ["--tokenizer", "models/base", "--holdout", "0.2"]
    small = ["--heldout-windows", "3", "--workers", "1"]
    gallica = [ROOT / "prep/gallica.py", "--source", "data/raw/gallica", *shared, *small]
    short = ["--sequence-len", "512", "--windows", "24", "--split", "1/2", "--out", "data/2a.jsonl"]
    long = ["--sequence-len", "2048", "--windows", "6", "--split", "2/2", "--out", "data/2b.jsonl"]
    call(*gallica, *short, cwd=cwd)
    call(*gallica, *long, cwd=cwd)
    book = ["--book", "data/raw/book/book.pdf", "--sequence-len", "2048", "--out", "data/2c.jsonl"]
    call(ROOT / "prep/castle.py", *book, *shared, cwd=cwd)
    return cwd


@pytest.fixture(scope="module")
def trained(workdir: Path) -> dict[str, str]:
    """The stages, each in a way people use: undisturbed, killed and resumed, by the plain command. What they printed."""
    plugins = [*load_profile("smoke", "2a")[1]["plugins"], "smoke_plugins.KeepRows"]
    output = {"2a": stage("2a", workdir, "--", *as_arguments({"plugins": plugins}))}

    # 2b by the plain command, as the yardstick; then again by ours, killed after its first checkpoint, and resumed.
    accelerate("2b", workdir, **AS_ON_A_CARD)
    (workdir / "outputs/2b").rename(workdir / "undisturbed")
    (workdir / "windows.txt").rename(workdir / "undisturbed/windows.txt")
    recorded = ["--", *as_arguments(AS_ON_A_CARD)]
    command = [ROOT / "train/stage.py", "2b", "--recipes", RECIPES, "--profile", "smoke", *recorded]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=workdir, env=ENVIRONMENT)
    state = workdir / "outputs/2b/checkpoint-2/complete.json"
    deadline = time.time() + 300
    while not state.exists() and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.005)  # two more steps and it would be finished
    process.kill()
    process.wait()
    assert left_in(workdir) == []
    output["2b"] = stage("2b", workdir, *recorded)

    output["2c"] = accelerate("2c", workdir)
    sizes = ["--pairs", "4", "--prompt-words", "20", "--words", "10"]
    call(ROOT / "prep/pairs.py", "--recipes", RECIPES, *sizes, cwd=workdir)
    plugins = [*load_profile("smoke", "2d")[1]["plugins"], "smoke_plugins.RecordPairs"]
    output["2d"] = stage("2d", workdir, "--", *as_arguments({"plugins": plugins}))
    output["check"] = call(ROOT / "train/gate.py", "--recipes", RECIPES, cwd=workdir)
    return output


def test_every_launch_is_judged(trained: dict[str, str], workdir: Path) -> None:
    for name, stage in CHAIN.items():
        line = f"{name}: trained, 4 of 4 steps"
        assert line in trained[name] and line in trained["check"]
        assert json.loads((workdir / stage.verdict).read_text())["steps"]["reached"] == 4
    assert len(json.loads((workdir / CHAIN["2c"].verdict).read_text())["movement"]) == 14  # 2 layers x 7 linear modules
    assert [name for name, stage in CHAIN.items() if (workdir / stage.output_dir / "start").exists()] == ["2b"]


def test_our_command_prints_a_screen_and_logs_the_rest(trained: dict[str, str], workdir: Path) -> None:
    lines = trained["2a"].strip().splitlines()
    assert (
        len([line for line in lines if line and "%|" not in line]) < 6
        and "4/4" in trained["2a"]
        and lines[0].endswith("log in outputs/2a/train.log")
    )
    assert "axolotl.cli.train" in (workdir / "outputs/2a/train.log").read_text()


def test_killed_and_resumed_it_ends_in_the_same_bytes(trained: dict[str, str], workdir: Path) -> None:
    """So does a run from the start with the same seed: A is drawn by it."""
    log = (workdir / "outputs/2b/train.log").read_text()
    # Once, not again when it resumes; of 14 modules two v_proj are in 16 bits, the others really in 4.
    assert "checkpoint-2" in log and re.findall(r"adapter start: (\d+) quantised", log) == ["12"]
    name = "adapter_model.safetensors"
    assert (workdir / "outputs/2b" / name).read_bytes() == (workdir / "undisturbed" / name).read_bytes()
    resumed, undisturbed = (
        json.loads((workdir / f"{f}/trained.json").read_text()) for f in ("outputs/2b", "undisturbed")
    )
    assert resumed["steps"] == undisturbed["steps"] and resumed["steps"]["tokens"] == 4 * 2048


def test_killed_and_resumed_it_sees_each_window_once(trained: dict[str, str], workdir: Path) -> None:
    undisturbed = (workdir / "undisturbed/windows.txt").read_text().split()
    seen = (workdir / "windows.txt").read_text().split()
    assert len(set(undisturbed)) == 4 and seen[:2] + seen[-2:] == undisturbed  # killed at step 2 or after


def test_experiment_3_trains_a_mistral(workdir: Path) -> None:
    save_base(workdir / "tiny-mistral", kind="mistral")
    call(ROOT / "prep/collect.py", "base", "--source", "tiny-mistral", "--out", "models/mistral", cwd=workdir)
    for name, rows in {"4a": "2a", "4b": "2c"}.items():  # of the same tokenizer and length
        for kind in ("jsonl", "heldout.jsonl", "manifest.json"):
            shutil.copy(workdir / f"data/{rows}.{kind}", workdir / f"data/{name}.{kind}")
    for name in ("4a", "4b"):
        assert f"{name}: trained, 4 of 4 steps" in stage(name, workdir)
    assert AutoConfig.from_pretrained(workdir / "models/mistral").model_type == "mistral"
    assert [name for name in ("4a", "4b") if (workdir / "outputs" / name / "start").exists()] == ["4a"]
    assert "adapter start: 12 quantised layers corrected" in (workdir / "outputs/4a/train.log").read_text()


def test_2c_changed_every_tensor_of_2b(trained: dict[str, str], workdir: Path) -> None:
    before = load_file(workdir / "outputs/2b/adapter_model.safetensors")
    after = load_file(workdir / "outputs/2c/adapter_model.safetensors")
    assert before.keys() == after.keys() and len(after) == 28
    for name in after:
        assert not torch.equal(before[name], after[name]), name


def test_2d_learns_both_sides_and_no_end(trained: dict[str, str], workdir: Path) -> None:
    """What TRL makes of raw text ends in EOS, where the passage was only cut."""
    tokenizer = AutoTokenizer.from_pretrained(workdir / "models/base")
    pairs = [json.loads(line) for line in (workdir / "data/2d.jsonl").read_text().splitlines()]
    seen = [json.loads(line) for line in (workdir / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == len(seen) == 4
    for side in ("chosen", "rejected"):
        whole = [generation.encode(tokenizer, pair["prompt"] + pair[side]) for pair in pairs]
        lines = [len(generation.encode(tokenizer, pair["prompt"])) for pair in pairs]
        labels = [[-100] * size + ids[size:] for size, ids in zip(lines, whole, strict=True)]
        assert sorted(ids for batch in seen for ids in batch[f"{side}_input_ids"]) == sorted(whole)
        assert sorted(ids for batch in seen for ids in batch[f"{side}_labels"]) == sorted(labels)
        assert not any(tokenizer.eos_token_id in ids for ids in whole)


def test_validation_loss_is_logged(trained: dict[str, str], workdir: Path) -> None:
    """Of 2a too, whose three windows fill no batch of four: Axolotl would leave them out."""
    for name in (name for name, stage in CHAIN.items() if stage.heldout):
        state = json.loads((workdir / f"outputs/{name}/checkpoint-4/trainer_state.json").read_text())
        losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
        assert len(losses) >= 2 and losses[-1] < losses[0], name
        logged = [json.loads(line) for line in (workdir / f"outputs/{name}" / LOG).read_text().splitlines()]
        known = {key for line in logged for key in line}
        assert set(LOGGED.values()) - known <= {LOGGED["memory"]} and logged[-1]["max_steps"] == 4  # no GPU here


def test_the_rows_are_tokenised_whole(trained: dict[str, str], workdir: Path) -> None:
    windows = [len(datasets.load_from_disk(state.parent)) for state in (workdir / "rows/2a").glob("*/state.json")]
    assert sorted(windows) == [3, 24]  # held out, training


def test_nothing_is_left_of_the_tokenised_rows(trained: dict[str, str], workdir: Path) -> None:
    """Trained on where they were saved, not on what `datasets` keeps of their making."""
    mapped = [
        Path(name).relative_to(workdir / "data/prepared").parts for name in (workdir / "mapped.txt").read_text().split()
    ]
    assert {parts[0][:3] for parts in mapped} == {"2b-"} and not any("cache" in parts for parts in mapped)
    assert [*(workdir / "data/prepared").glob("*/*")] == []


def distributed(processes: int, cwd: Path, **more: Any) -> subprocess.Popen:
    """2a by several processes over gloo, in a folder with the same rows."""
    cwd.mkdir()
    for name in ("models", "data"):
        (cwd / name).symlink_to(cwd.parent / name)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "axolotl.cli.train"]
    overrides = as_arguments(load_profile("smoke", "2a")[1] | more)
    command = [sys.executable, *launch, str(RECIPES / "2a.yml"), *overrides]
    with (cwd / "printed").open("w") as said:
        return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, stdout=said, stderr=said)


def apart(one: Path, other: Path) -> float:
    """How far two trainings of one base end from each other, as a share of the way that the first went."""
    base, end, beside = (
        load_file(f / "model.safetensors") for f in (one / "models/base", one / "outputs/2a", other / "outputs/2a")
    )
    way, between = (sum((end[name] - tensors[name]).norm() ** 2 for name in end) ** 0.5 for tensors in (base, beside))
    return float(between / way)


def test_four_processes_train_as_one(trained: dict[str, str], workdir: Path) -> None:
    """By DDP: as many tokens a step, a killed process ends the others, and one process resumes."""
    cwd = workdir / "ddp"
    process = distributed(4, cwd)
    state, deadline = cwd / "outputs/2a/checkpoint-2/complete.json", time.time() + 300
    while not state.exists() and time.time() < deadline:
        assert process.poll() is None, (cwd / "printed").read_text()[-3000:]
        time.sleep(0.005)
    psutil.Process(process.pid).children()[1].kill()
    assert process.wait(120) and left_in(cwd) == []
    assert state.with_name("rng_state_3.pth").exists()
    assert "2a: trained, 4 of 4 steps" in stage("2a", cwd)
    assert 0 < apart(workdir, cwd) < 1e-3
    one, two = (json.loads((f / "outputs/2a/trained.json").read_text())["steps"] for f in (workdir, cwd))
    assert one == two and one["tokens"] == 4 * 4 * 512


@pytest.mark.parametrize(("profile", "plugin"), [("fsdp", "FsdpOnCpu"), ("zero2", "DeepSpeedOnCpu")])
def test_two_processes_share_a_model(trained: dict[str, str], workdir: Path, profile: str, plugin: str) -> None:
    """The optimizer's 8-bit moments are quantised in blocks, which are other ones in half a tensor."""
    if profile == "zero2":
        pytest.importorskip("deepspeed", reason="`make setup-gpu` installs DeepSpeed")
    cwd, sharded = workdir / profile, load_profile(profile, "2a")[1]
    process = distributed(2, cwd, plugins=[f"sharded_on_cpu.{plugin}", "train.plugins.Gate"], **sharded)
    assert process.wait(300) == 0, (cwd / "printed").read_text()[-3000:]
    assert (cwd / "outputs/2a/trained.json").exists() and 0 < apart(workdir, cwd) < 0.05


def test_evaluation_of_the_chain(trained: dict[str, str], workdir: Path) -> None:
    options = ["--recipes", RECIPES, "--run", "smoke", "--out", "reports", "--max-new-tokens", "8", "--limit", "2"]
    said = python(ROOT / "eval/evaluation.py", *options, cwd=workdir)
    # no library's warning, no bar where there is no terminal
    assert "torchao" not in said and "kernels-community" not in said and "█" not in said
    report = json.loads((workdir / "reports/smoke.json").read_text())
    assert list(report["stages"]) == ["base", "2a", "2a (nf4)", "2b (start)", "2b", "2c", "2d", "2d (merged)"]
    for name, scored in report["stages"].items():
        assert set(scored["scores"]) >= {"gallica_heldout", "novel_heldout", "english", "code"}
        assert all(0 < score["bits_per_byte"] < 12 for score in scored["scores"].values()), name
    assert (workdir / "reports/smoke.md").exists()
    bits = {name: scored["scores"]["novel_heldout"]["bits_per_byte"] for name, scored in report["stages"].items()}
    assert abs(bits["2d (merged)"] - bits["2d"]) < 0.001

    command = ["2d", "--recipes", RECIPES, "--report", "reports/smoke.json"]
    said = call(ROOT / "eval/export.py", *command, cwd=workdir)
    assert "outputs/export/2d: 2d in model, F16, Q8_0, Q4_K_M" in said
    folder = workdir / "outputs/export/2d"
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.float16 and not hasattr(merged.config, "quantization_config")
    page = ModelCard.load(folder / "README.md")
    assert {result.dataset_name for result in page.data.eval_results} >= {"gallica_heldout", "novel_heldout"}
    assert "Nobody has stated the rights" in page.text and "| 2d-Q4_K_M" not in page.text and "| Q4_K_M" in page.text
    again = call(ROOT / "eval/export.py", *command, cwd=workdir)
    assert again.count("unchanged") == 8  # adapter, model, three GGUF files, Modelfile, proof, card

    options = ["--recipes", RECIPES, "--stage", folder / "2d-Q4_K_M.gguf", "--words", "20"]
    assert "words in" in call(ROOT / "eval/continuation.py", *options, cwd=workdir)
