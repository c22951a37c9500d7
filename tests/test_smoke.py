"""The whole curriculum once, small: real Axolotl, real 4-bit, the shipped recipes, on a tiny Llama and the demo's texts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_curriculum import save_base

from train.stage import as_arguments, load_profile
from train.stages import load_chain

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
CHAIN = {stage.name: stage for stage in load_chain(ROOT / "recipes")}
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def python(*arguments: object, cwd: Path, expect: int = 0) -> str:
    """Run a script as a user would; return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def train(name: str, cwd: Path, expect: int = 0, *more: str) -> str:
    arguments = [ROOT / "train" / "stage.py", name, "--recipes", ROOT / "recipes", "--profile", "smoke"]
    return python(*arguments, *(["--", *more] if more else []), cwd=cwd, expect=expect)


def prepare(name: str, cwd: Path, windows: str) -> None:
    stage = CHAIN[name]
    shared = ["--tokenizer", "models/base", "--sequence-len", stage.config["sequence_len"], "--holdout", "0.2"]
    if name == "2c":
        python(ROOT / "prep/castle.py", "--book", "data/raw/book/book.pdf", *shared, "--out", "data/2c.jsonl", cwd=cwd)
        return
    split = {"2a": "1/2", "2b": "2/2"}[name]
    limits = ["--windows", windows, "--split", split, "--heldout-windows", "3"]
    python(
        ROOT / "prep/gallica.py",
        "--source",
        "data/raw/gallica",
        *shared,
        *limits,
        "--out",
        f"data/{name}.jsonl",
        cwd=cwd,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 0 and 1: a tiny Llama with random weights, and the demo's texts, collected and prepared by the real scripts."""
    cwd = tmp_path_factory.mktemp("smoke")
    save_base(cwd / "tiny")
    python(ROOT / "demo/corpus.py", "--out", "sources", cwd=cwd)
    python(ROOT / "prep/collect.py", "base", "--source", "tiny", cwd=cwd)
    python(ROOT / "prep/collect.py", "gallica", "--source", "sources/gallica", cwd=cwd)
    python(ROOT / "prep/collect.py", "book", "--source", "sources/novella.pdf", cwd=cwd)
    for name in CHAIN:
        prepare(name, cwd, "24" if name == "2a" else "6")
    return cwd


@pytest.fixture(scope="module")
def trained(workdir: Path) -> Iterator[dict[str, str]]:
    """The three stages, each in a way people use: made again on new data, interrupted and resumed, by the plain command."""
    output: dict[str, str] = {}

    output["2b too early"] = train("2b", workdir, expect=1)

    # 2a twice, on other rows the second time: the second must not see the first one's.
    output["2a first"] = train("2a", workdir)
    prepare("2a", workdir, "16")
    output["check after new data"] = python(
        ROOT / "train/gate.py", "2a", "--recipes", ROOT / "recipes", cwd=workdir, expect=1
    )
    output["2a on old checkpoints"] = train("2a", workdir, expect=1)
    (workdir / "outputs/2a").rename(workdir / "outputs-2a-first")
    output["2a"] = train("2a", workdir)
    output["2a again"] = train("2a", workdir)

    # 2b: Ctrl-C after its first checkpoint, then the same command.
    arguments = ["train/stage.py", "2b", "--recipes", "recipes", "--profile", "smoke"]
    command = [str(ROOT / part) if "/" in part or part == "recipes" else part for part in arguments]
    with (workdir / "2b.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=workdir,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
        )
        deadline = time.time() + 300
        while not (workdir / "outputs/2b/checkpoint-2/trainer_state.json").exists() and time.time() < deadline:
            assert process.poll() is None, (workdir / "2b.log").read_text()[-3000:]
            time.sleep(0.005)  # two more steps and it would be finished
        process.send_signal(signal.SIGINT)
        output["2b interrupted"] = f"status {process.wait(120)}\n" + (workdir / "2b.log").read_text()
    output["2c on half of 2b"] = train("2c", workdir, expect=1)
    output["2b"] = train("2b", workdir)

    # 2c: by the command that README documents, and judged afterwards.
    launch, overrides = load_profile("smoke", "2c")
    output["2c"] = python(
        "-m", "accelerate.commands.launch", *launch, "-m", "axolotl.cli.train", ROOT / "recipes/2c.yml",
        *as_arguments(overrides), cwd=workdir,
    )  # fmt: skip
    output["check"] = python(ROOT / "train/gate.py", "--recipes", ROOT / "recipes", cwd=workdir)
    yield output


def verdict(workdir: Path, name: str) -> dict:
    return json.loads((workdir / CHAIN[name].verdict).read_text())


def test_a_missing_stage_is_named(trained: dict[str, str]) -> None:
    assert "make stage-a" in trained["2b too early"]
    assert "Traceback" not in trained["2b too early"]


def test_all_three_trained(trained: dict[str, str], workdir: Path) -> None:
    for name in CHAIN:
        assert f"{name}: trained, 4 of 4 steps" in trained["check"]
        assert verdict(workdir, name)["steps"]["reached"] == 4
    assert len(verdict(workdir, "2c")["movement"]) == 14  # 2 layers x 7 linear modules


def test_2c_changed_every_tensor_of_2b(trained: dict[str, str], workdir: Path) -> None:
    before = load_file(workdir / "outputs/2b/adapter_model.safetensors")
    after = load_file(workdir / "outputs/2c/adapter_model.safetensors")
    assert before.keys() == after.keys() and len(after) == 28
    for name in after:
        assert not torch.equal(before[name], after[name]), name


def test_an_adapter_begins_where_its_seed_says(trained: dict[str, str], workdir: Path) -> None:
    """A is moved by 4 steps of 2e-4 at most, and drawn from +- 0.2: trained again it is the same, without the plugin not."""

    def drawn(folder: str) -> dict[str, torch.Tensor]:
        tensors = load_file(workdir / folder / "adapter_model.safetensors")
        return {name: tensor for name, tensor in tensors.items() if "lora_A" in name}

    launch, overrides = load_profile("smoke", "2b")
    changes: dict[str, dict[str, list[str]]] = {"2b-again": {}, "2b-unseeded": {"plugins": []}}
    for folder, more in changes.items():
        arguments = as_arguments(overrides | more | {"output_dir": folder})
        python(
            "-m", "accelerate.commands.launch", *launch, "-m", "axolotl.cli.train", ROOT / "recipes/2b.yml", *arguments,
            cwd=workdir,
        )  # fmt: skip
    chained, again, unseeded = (drawn(folder) for folder in ("outputs/2b", "2b-again", "2b-unseeded"))
    assert len(chained) == 14
    for name, tensor in chained.items():
        assert torch.allclose(tensor, again[name], rtol=0, atol=2e-3), name
        assert not torch.allclose(tensor, unseeded[name], rtol=0, atol=2e-2), name


def test_4_bit_was_real(trained: dict[str, str], workdir: Path) -> None:
    log = (workdir / "outputs/2b/debug.log").read_text()
    assert '"load_in_4bit": true' in log and '"adapter": "qlora"' in log


def test_validation_loss_is_logged(trained: dict[str, str], workdir: Path) -> None:
    for name in CHAIN:
        state = json.loads((workdir / f"outputs/{name}/checkpoint-4/trainer_state.json").read_text())
        losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
        assert len(losses) >= 2 and losses[-1] < losses[0], name
        assert list((workdir / f"outputs/{name}/runs").glob("**/events.out.tfevents.*"))


def test_new_rows_are_really_used(trained: dict[str, str], workdir: Path) -> None:
    """Axolotl's cache would have served the old ones: same path, same settings."""
    assert "changed since" in trained["check after new data"]
    assert (
        "a run with other data" in trained["2a on old checkpoints"]
        or "changed since" in trained["2a on old checkpoints"]
    )
    import datasets

    windows = {
        folder.name: sum(
            len(datasets.load_from_disk(part)) for part in folder.glob("*/") if (part / "state.json").exists()
        )
        for folder in (workdir / "data/prepared").glob("2a-*")
    }
    assert sorted(windows.values()) == [16 + 3, 24 + 3]  # training and held-out windows


def test_a_finished_stage_is_not_trained_again(trained: dict[str, str]) -> None:
    assert "to train it again" in trained["2a again"] and "axolotl.cli.train" not in trained["2a again"]


def test_interrupted_and_resumed(trained: dict[str, str]) -> None:
    assert trained["2b interrupted"].startswith("status 130")
    assert "interrupted" in trained["2b interrupted"]
    assert "2b" in trained["2c on half of 2b"] and "cut short" in trained["2c on half of 2b"]
    assert "resuming from outputs/2b/checkpoint-2" in trained["2b"]


def test_base_is_untouched(trained: dict[str, str], workdir: Path) -> None:
    record = json.loads((workdir / "models/base/source.json").read_text())
    vouched = {file["name"]: file["sha256"] for file in record["files"]}
    assert verdict(workdir, "2a")["inputs"]["models/base"].items() <= vouched.items()


def test_evaluation_of_the_chain(trained: dict[str, str], workdir: Path) -> None:
    python(
        ROOT / "eval/evaluation.py", "--recipes", ROOT / "recipes", "--run", "smoke", "--out", "reports",
        "--max-new-tokens", "8", "--limit", "2", cwd=workdir,
    )  # fmt: skip
    report = json.loads((workdir / "reports/smoke.json").read_text())
    assert list(report["stages"]) == ["base", "2a", "2a 4-bit", "2b", "2c", "2c merged"]
    for name, stage in report["stages"].items():
        assert set(stage["scores"]) >= {"gallica_heldout", "novel_heldout", "english", "code"}
        assert all(0 < score["bits_per_byte"] < 12 for score in stage["scores"].values()), name
    assert (workdir / "reports/smoke.md").exists()
