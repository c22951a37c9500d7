"""What the bench runs, in which order, and the YAML of each run.

A run is a recipe (the shipped one, the reference's, or the shipped one with one lever changed), on a part of the card.
Its YAML is written out, not given as overrides: a lever also takes keys away, and the file is evidence of what ran.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from bench.gpu_device import card_used
from prep.common import BadInput, atomic_write
from train import memory as planner
from train.gate import config_hash
from train.stage import load_profile
from train.stages import Stage

ROOT = Path(__file__).parent.parent
LEVERS = Path(__file__).with_name("ablations.yml")
CARD = 11.0  # GiB free on a 12 GB card: 12 less what the driver and a desktop take


@dataclass(frozen=True)
class Run:
    """One training of the bench."""

    recipe: str
    variant: str  # "shipped", "reference", or the name of a lever
    free_gib: float | None  # of the card; None: all of it
    repetition: int
    config: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        card = "whole card" if self.free_gib is None else f"{self.free_gib:g} GiB"
        return f"{self.recipe}, {self.variant}, {card}, {self.repetition}"

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.]+", "-", self.id)


def load_levers(path: Path = LEVERS) -> list[dict[str, Any]]:
    """The levers, in their order. Raises BadInput on one that is not well formed."""
    known = {"recipe", "name", "changes", "environment", "card"}
    levers = yaml.safe_load(path.read_text(encoding="utf-8"))
    for lever in levers:
        if not {"recipe", "name"} <= set(lever) <= known or not lever.keys() & {"changes", "environment"}:
            raise BadInput(f"{path}: {lever} needs recipe, name, and changes or environment")
        if lever.get("card", "whole") != "whole":
            raise BadInput(f"{path}: {lever['name']}: card is `whole`, or left out")
    return levers


def schedule(shipped: list[Stage], reference: list[Stage], levers: list[dict[str, Any]], repetitions: int) -> list[Run]:
    """Every run, the most wanted first: recipes within 11 GiB, the reference there, both on the whole card; all of that
    again in the same order, so that what drifts drifts for both; then the levers."""
    runs: list[Run] = []
    for repetition in range(1, repetitions + 1):
        runs += [Run(stage.name, "shipped", CARD, repetition, stage.config) for stage in shipped]
        runs += [Run(stage.name, "reference", CARD, repetition, stage.config) for stage in reference]
        for stage in shipped:
            runs.append(Run(stage.name, "shipped", None, repetition, stage.config))
            runs += [
                Run(other.name, "reference", None, repetition, other.config)
                for other in reference
                if other.name == stage.name
            ]
    configs = {stage.name: stage.config for stage in shipped}
    for lever in levers:
        if lever["recipe"] in configs:
            free = None if lever.get("card") == "whole" else CARD
            config, changes = configs[lever["recipe"]], lever.get("changes", {})
            environment = lever.get("environment", {})
            runs.append(Run(lever["recipe"], lever["name"], free, 1, config, environment, changes))
    return runs


def effective(run: Run, tiny: bool) -> dict[str, Any]:
    """The recipe as it is trained: with the lever, without what only a long training needs (validation, checkpoints).

    On a CPU the recipe is first changed as the smoke test changes it (train/overrides.yml).
    """
    overrides = load_profile("smoke", run.recipe)[1] | {"max_steps": None} if tiny else {}
    quiet: dict[str, Any] = {
        "test_datasets": None, "eval_steps": None, "save_steps": None, "save_strategy": "no",
        "auto_resume_from_checkpoints": False, "use_tensorboard": False,
    }  # fmt: skip
    config = run.config | overrides | run.changes | quiet
    return {key: value for key, value in config.items() if value is not None}


def probed(config: dict[str, Any], folder: str, seconds: float, warmup: int, profile: int) -> dict[str, Any]:
    """The same with the probe in it, and an output folder of its own."""
    return config | {
        "output_dir": f"runs/{folder}/output",
        # A few steps on random rows are no stage: the gate would refuse them.
        "plugins": [
            *(name for name in config.get("plugins", []) if name != "train.plugins.Gate"),
            "bench.gpu_plugin.Probe",
        ],
        "probe_record": f"runs/{folder}/record.json",
        "probe_seconds": seconds,
        "probe_warmup": warmup,
        "probe_profile": profile,
    }


def flops_per_token(config: PretrainedConfig, recipe: dict[str, Any]) -> float:
    """Operations that a token of training needs, forward and backward; those made twice by checkpointing count once.

    A weight of a matrix (head included, embedding not) takes 2 forward and 2 for the gradient of its input; 2 more for its
    own gradient if it is trained (Kaplan et al. 2020, 6 N a token; with a frozen base 4 N + 6 N_adapter). Causal
    attention over windows of s tokens takes 2 s q a layer forward, q being the width of all heads, and twice that
    backward (Chowdhery et al. 2022, PaLM, appendix B, halved because the mask leaves half).
    """
    kinds = {kind.kind: kind for kind in planner.tensors(planner.build(config, recipe), recipe)}
    matrices = sum(kinds["matrix"].elements) + config.vocab_size * config.hidden_size
    adapter = sum(kinds["adapter"].elements) if "adapter" in kinds else 0
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head
    attention = 6 * config.num_hidden_layers * recipe["sequence_len"] * queries
    return (4 if adapter else 6) * matrices + 6 * adapter + attention


def planned(config: PretrainedConfig, recipe: dict[str, Any]) -> dict[str, Any]:
    """The planner's figures for one run, or why it has none."""
    try:
        plan = planner.plan(config, recipe)
    except BadInput as error:
        return {"none": str(error)}
    return {
        "loaded": plan.weights + plan.adapter,
        "at_optimizer_step": plan.weights + plan.adapter + plan.optimizer + plan.all_gradients,
        "peak": plan.peak,
    }


def launch(run: Run, work: Path, config: dict[str, Any], tiny: bool, limit: float) -> dict[str, Any]:
    """Train in processes of its own, watching the card; kill it after `limit` seconds. Returns what became of it.

    `status` is one of: ok, out of memory, failed, timed out.
    """
    folder = work / "runs" / run.folder
    with atomic_write(folder / "config.yml") as handle:
        yaml.safe_dump(config, handle, sort_keys=False)
    record = work / config["probe_record"]
    record.unlink(missing_ok=True)
    accelerate = load_profile("smoke", run.recipe)[0] if tiny else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *accelerate]
    command += ["-m", "axolotl.cli.train", str((folder / "config.yml").relative_to(work))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    if not tiny:
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    before = used = 0 if tiny else card_used()
    start, timed_out = time.monotonic(), False
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=work, env=environment | run.environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while process.poll() is None:
                used = max(used, 0 if tiny else card_used())
                if time.monotonic() - start > limit:
                    timed_out = True
                    break
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    outcome: dict[str, Any] = {"wall_s": round(time.monotonic() - start, 1), "driver_peak": used - before or None}
    if timed_out:
        return outcome | {"status": "timed out", "reason": f"after {limit:.0f} s"}
    if process.returncode or not record.exists():
        return outcome | verdict(text, process.returncode)
    return outcome | {"status": "ok", **summary(json.loads(record.read_text()))}


def verdict(log: str, returncode: int) -> dict[str, str]:
    """Why a training ended, from the last error in its log. Out of memory is a result like any other."""
    errors = re.findall(r"^(?:\[rank\d\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Exit): .*)$", log, re.MULTILINE)
    # accelerate's own error follows the training's
    reasons = [error for error in errors if "CalledProcessError" not in error]
    reason = reasons[-1] if reasons else f"status {returncode}, and no error in the log"
    out = re.search(r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory", log)
    return {"status": "out of memory" if out else "failed", "reason": reason[:300]}


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Figures of the steps after the warm-up that had as many tokens as most: the last of an epoch may have fewer."""
    steps = list(zip(record["step_seconds"], record["step_tokens"], strict=True))[record["warmup"] :]
    result: dict[str, Any] = {"memory": record["memory"], "losses": record["losses"]}
    if not all(math.isfinite(loss) and loss > 0 for loss in record["losses"]):
        return result | {"status": "failed", "reason": f"losses of {record['losses']}: this trains nothing"}
    if "profile" in record:
        return result | {"profile": record["profile"]}
    if not steps:
        return result | {"status": "failed", "reason": f"only {len(record['step_seconds'])} steps, all of them warm-up"}
    full = max(tokens for _, tokens in steps)
    times = sorted(seconds for seconds, tokens in steps if tokens == full)
    return result | {
        "steps": len(times),
        "tokens_a_step": full,
        "step_s": times[len(times) // 2],
        "step_s_first_and_last_decile": [times[len(times) // 10], times[-1 - len(times) // 10]],
        "tokens_per_s": full * len(times) / sum(times),
    }


def fingerprint(config: dict[str, Any], run: Run, model: dict[str, Any]) -> str:
    """Changes with everything that a figure depends on: recipe, lever, environment, model."""
    return config_hash({"config": config, "environment": run.environment, "model": model})[:16]
