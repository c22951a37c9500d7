"""Did a stage train? Looks at what is on the disk and says yes, in `trained.json`, or why not.

Training that goes wrong often looks like training that went right: an adapter loaded frozen, a learning rate that bf16
rounding swallows, a run stopped by Ctrl-C whose half-trained weights were saved under the final name, a cached dataset
that is not the one on the disk any more. A stage counts as trained only when all of this holds:

  steps      the last checkpoint is at the last planned step, and the final weights are that checkpoint's
  data       the rows are those their manifest vouches for, and they are older than the training
  inputs     the model (and adapter) it built on are, byte for byte, what was collected or trained before
  movement   full weights: see FULL_WEIGHTS below; a new adapter: no module's B is zero any more;
             a continued adapter: every module differs from the one it started from, rank and targets equal

  python train/gate.py            check every stage there is (make check)
  python train/gate.py 2b         check one
"""

import argparse
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from prep.common import BadInput, atomic_write, run, sha256
from train.stages import Stage, line_of, load_chain

# Least movement of a full-weight stage, by kind of tensor: fraction of elements that changed, and norm of the change
# relative to the norm before, both after casting to the dtype of the trained weights.
#
# matrix     Rounding in bf16 lets a learning rate of 1e-5 change about a tenth of the elements (the smallest ones);
#            a stage that works changes nearly all. 1e-4 is 1/100 of the change that 20 steps at 1e-4 make.
# embedding  Rows of tokens that never occur stay as they are, and a small corpus knows few tokens.
# vector     Norm scales are near 1, where the bf16 grid is coarsest (0.004 to 0.008): reported, not judged.
FULL_WEIGHTS = {
    "matrix": {"changed": 0.5, "relative": 1e-4},
    "embedding": {"changed": 0.001, "relative": 1e-6},
    "vector": {"changed": 0.0, "relative": 0.0},
}

# What 2c must share with 2b: a loaded adapter keeps its own settings, whatever the recipe says.
ADAPTER_SETTINGS = {"lora_r": "r", "lora_alpha": "lora_alpha", "peft_use_rslora": "use_rslora"}


class NotTrained(BadInput):
    """The stage did not train as planned. The message says what is wrong and what to do."""


def config_hash(config: dict[str, Any]) -> str:
    """Hash of what a recipe says; its comments and layout do not count."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def hashed(path: Path) -> str:
    """sha256 of a file, read once as long as nobody writes to it: every later stage asks for 2a's gigabytes again."""
    state = path.stat()
    return _hash_of(path.absolute(), state.st_size, state.st_mtime_ns)


@functools.cache
def _hash_of(path: Path, size: int, written: int) -> str:
    return sha256(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model or adapter folder. Raises NotTrained when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotTrained(f"{folder} holds no weights (*.safetensors)")
    return files


def described(folder: Path) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of each weight file, as source.json has them of a collected model."""
    return [{"name": path.name, "bytes": path.stat().st_size, "sha256": hashed(path)} for path in weight_files(folder)]


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder, one at a time: a model need not fit into memory twice."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield name, handle.get_tensor(name)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise NotTrained(f"{path} is damaged ({error}); train that stage again") from error


def checkpoints(output_dir: Path) -> list[Path]:
    """The Trainer's checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def check_steps(stage: Stage) -> dict[str, Any]:
    """Steps planned and reached, from the last checkpoint, whose weights must be the final ones."""
    found = checkpoints(stage.output_dir)
    if not found:
        raise NotTrained(
            f"{stage.output_dir} holds no checkpoint: stage {stage.name} was not trained; `make {step_of('stage', stage)}` does"
        )
    last = found[-1]
    try:
        state = json.loads((last / "trainer_state.json").read_text())
        reached, planned, epoch = state["global_step"], state["max_steps"], state["epoch"]
    except (OSError, ValueError, KeyError) as error:
        raise NotTrained(f"{last} was not written to its end; run stage {stage.name} again, it resumes") from error
    if reached < planned:
        raise NotTrained(
            f"stage {stage.name} was cut short: step {reached} of {planned}; run it again, it resumes from {last.name}"
        )
    for path in weight_files(stage.output_dir):
        twin = last / path.name
        if not twin.exists() or hashed(twin) != hashed(path):
            raise NotTrained(
                f"{path} is not what {last.name} saved at the last step; run stage {stage.name} again, it resumes"
            )
    return {
        "planned": planned,
        "reached": reached,
        "epochs": round(epoch, 4),
        "epochs_of_recipe": stage.config.get("num_epochs", 1),
        "tokens": next(
            (entry["tokens/total"] for entry in reversed(state["log_history"]) if "tokens/total" in entry), None
        ),
    }


def manifest_of(rows: Path) -> Path:
    """data/2a.jsonl and data/2a.heldout.jsonl share data/2a.manifest.json."""
    return rows.parent / f"{rows.name.removesuffix('.jsonl').removesuffix('.heldout')}.manifest.json"


def check_data(stage: Stage) -> dict[str, str]:
    """sha256 of each JSONL the stage reads, after comparing it with its manifest. Raises BadInput."""
    hashes = {}
    for part, paths in (("train", stage.datasets), ("heldout", stage.heldout)):
        for path in paths:
            manifest = manifest_of(path)
            for needed in (path, manifest):
                if not needed.exists():
                    raise BadInput(f"{needed} is missing; `make {step_of('prep', stage)}` makes it")
            try:
                vouched = json.loads(manifest.read_text())[part]["sha256"]
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{manifest} is damaged; `make {step_of('prep', stage)}` makes it anew") from error
            hashes[str(path)] = hashed(path)
            if hashes[str(path)] != vouched:
                raise BadInput(
                    f"{path} is not the file that {manifest} describes; `make {step_of('prep', stage)}` makes both anew"
                )
    return hashes


def step_of(what: str, stage: Stage) -> str:
    """The Makefile's name of a stage's target: stage-b for 2b."""
    return f"{what}-{re.sub(r'^[0-9]+', '', stage.name)}"


def check_trained_on(stage: Stage, data: dict[str, str], inputs: dict[str, dict[str, str]]) -> None:
    """Did the run see this data and these inputs? Known when train/stage.py started it, told by file times otherwise."""
    started = stage.output_dir / "started.json"
    again = f"remove {stage.output_dir} and train it again"
    if started.exists():
        plan = json.loads(started.read_text())
        if plan["data"] != data:
            raise NotTrained(f"stage {stage.name} was trained on data that has changed since; {again}")
        if plan["inputs"] != inputs:
            raise NotTrained(f"{', '.join(inputs)} changed while stage {stage.name} was trained; {again}")
        return
    # TensorBoard puts the second of its start into the name: events.out.tfevents.1790000000.host.pid.n
    starts = [int(path.name.split(".")[3]) for path in stage.output_dir.glob("runs/**/events.out.tfevents.*")]
    if not starts:
        raise NotTrained(
            f"{stage.output_dir} has neither started.json nor TensorBoard logs: nothing says when it was trained; {again}"
        )
    for path in map(Path, data):
        if path.stat().st_mtime > min(starts):
            raise NotTrained(f"{path} is younger than the training of stage {stage.name}; {again}")
    # The plain command reuses this cache whatever the JSONL holds by now.
    cache = Path(stage.config.get("dataset_prepared_path") or "")
    for folder in cache.glob("*/"):
        oldest = min((file.stat().st_mtime for file in folder.rglob("*.arrow")), default=None)
        newest_rows = max(path.stat().st_mtime for path in map(Path, data))
        if oldest is not None and oldest < newest_rows:
            raise NotTrained(
                f"{folder} was prepared from older rows than {stage.name} has now; remove {cache}, and {again}"
            )


def check_inputs(stage: Stage, chain: list[Stage]) -> dict[str, dict[str, str]]:
    """sha256 of each weight file the stage builds on, after comparing it with what vouches for it. Raises BadInput."""
    made_by = {other.output_dir: other for other in chain}
    inputs: dict[str, dict[str, str]] = {}
    for folder in filter(None, [stage.base_model, stage.adapter_from]):
        maker = made_by.get(folder)
        record = maker.verdict if maker else folder / "source.json"
        missing = f"make {step_of('stage', maker)}" if maker else "make data"
        if not record.exists():
            unproven = folder.exists() and maker is not None
            raise BadInput(
                f"stage {stage.name} needs {folder}, "
                + (
                    f"which has not passed its gate ({record.name} is missing): "
                    if unproven
                    else "which is not there: "
                )
                + (f"`make check` says why, `{missing}` trains it" if unproven else f"`{missing}` makes it")
            )
        try:
            vouched = {file["name"]: file["sha256"] for file in json.loads(record.read_text())["files"]}
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{record} is damaged; `{missing}` makes it anew") from error
        inputs[str(folder)] = {path.name: hashed(path) for path in weight_files(folder)}
        for name, digest in inputs[str(folder)].items():
            if vouched.get(name) != digest:
                raise BadInput(f"{folder / name} is not the file that {record} vouches for; `{missing}` makes it anew")
    return inputs


def check_adapter_settings(stage: Stage) -> None:
    """The adapter to be continued has the rank, alpha and scaling that the recipe states. Raises BadInput."""
    if stage.adapter_from is None:
        return
    path = stage.adapter_from / "adapter_config.json"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is missing or damaged: {stage.adapter_from} holds no adapter to continue") from error
    for key, name in ADAPTER_SETTINGS.items():
        stated = stage.config.get(key, False)
        if saved.get(name) != stated:
            raise BadInput(
                f"{path}: {name} is {saved.get(name)}, but {stage.recipe} says {key}: {stated}. A continued adapter keeps "
                f"its own settings, so the recipe would not hold; give both stages the same"
            )


def movement_of_weights(before: Path, after: Path) -> dict[str, dict[str, Any]]:
    """Per tensor, how far full weights moved: {name: {kind, changed, relative}}, measured in the dtype of `after`."""
    old = dict(tensors(before))
    moved: dict[str, dict[str, Any]] = {}
    for name, new in tensors(after):
        if name not in old or old[name].shape != new.shape:
            raise NotTrained(f"{after}: tensor {name} has no counterpart in {before}; is it another model?")
        was = old.pop(name).to(new.dtype)
        kind = "vector" if new.dim() < 2 else "embedding" if re.search(r"embed|lm_head", name) else "matrix"
        change = (new.float() - was.float()).norm() / was.float().norm().clamp(min=1e-12)
        if not torch.isfinite(new).all():
            raise NotTrained(f"{after}: tensor {name} holds NaN or infinity: the training diverged")
        moved[name] = {
            "kind": kind,
            "changed": round((new != was).float().mean().item(), 6),
            "relative": float(f"{change.item():.4g}"),
        }
    # A tied head is saved once; any other tensor must be there.
    lost = [name for name in old if name != "lm_head.weight"]
    if lost:
        raise NotTrained(f"{after} lacks {len(lost)} tensors of {before}, {lost[0]} among them")
    return moved


def movement_of_adapter(before: Path | None, after: Path) -> dict[str, dict[str, Any]]:
    """Per adapted module, how far A and B moved: from zero for B of a new adapter, from `before` for a continued one.

    {module: {"A": norm of the change, "B": likewise}}; for a new adapter, "A" is None since its random start is not kept.
    """
    old = dict(tensors(before)) if before else {}
    moved: dict[str, dict[str, Any]] = {}
    for name, new in tensors(after):
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise NotTrained(f"{after}: {name} is no LoRA tensor")
        if not torch.isfinite(new).all():
            raise NotTrained(f"{after}: tensor {name} holds NaN or infinity: the training diverged")
        if before and (name not in old or old[name].shape != new.shape):
            raise NotTrained(f"{after}: {name} has another shape or target than in {before}: not the same adapter")
        was = old.pop(name).float() if before else torch.zeros_like(new, dtype=torch.float32)
        module, side = match.groups()
        known = before is not None or side == "B"
        moved.setdefault(module, {})[side] = float(f"{(new.float() - was).norm().item():.4g}") if known else None
    if old:
        raise NotTrained(f"{after} lacks {len(old)} tensors of {before}, {next(iter(old))} among them")
    return moved


def check_movement(stage: Stage) -> dict[str, dict[str, Any]]:
    """Movement per tensor or module, above the thresholds. Raises NotTrained naming the first that stood still."""
    if stage.adapter is None:
        moved = movement_of_weights(stage.base_model, stage.output_dir)
        for name, tensor in moved.items():
            least = FULL_WEIGHTS[tensor["kind"]]
            if tensor["changed"] < least["changed"] or tensor["relative"] < least["relative"]:
                raise NotTrained(
                    f"stage {stage.name} hardly trained {name}: {tensor['changed']:.2%} of its elements changed (at least "
                    f"{least['changed']:.2%}), by {tensor['relative']:.2g} of its norm (at least {least['relative']:.2g}). "
                    f"Too low a learning rate, or bf16 rounding that swallows it?"
                )
        return moved
    moved = movement_of_adapter(stage.adapter_from, stage.output_dir)
    for module, sides in moved.items():
        if set(sides) != {"A", "B"}:
            raise NotTrained(f"{stage.output_dir}: {module} has only lora_{next(iter(sides))}")
        if not any(sides.values()):
            start = f"is still that of {stage.adapter_from}" if stage.adapter_from else "is still zero"
            raise NotTrained(f"stage {stage.name} trained nothing in {module}: its adapter {start}")
    if stage.adapter_from:
        before, after = (
            json.loads((folder / "adapter_config.json").read_text())
            for folder in (stage.adapter_from, stage.output_dir)
        )
        for key in ("r", "lora_alpha", "use_rslora"):
            if before[key] != after[key]:
                raise NotTrained(
                    f"{stage.output_dir}: {key} is {after[key]}, it was {before[key]} in {stage.adapter_from}"
                )
        if set(before["target_modules"]) != set(after["target_modules"]):
            raise NotTrained(f"{stage.output_dir} adapts other modules than {stage.adapter_from}")
    return moved


def judge(stage: Stage, chain: list[Stage]) -> dict[str, Any]:
    """Check everything; write and return the verdict. Raises NotTrained or BadInput, and leaves no verdict, otherwise."""
    stage.verdict.unlink(missing_ok=True)
    steps = check_steps(stage)
    data = check_data(stage)
    inputs = check_inputs(stage, chain)
    check_trained_on(stage, data, inputs)
    verdict = {
        "stage": stage.name,
        "recipe": {"path": stage.recipe.name, "sha256": config_hash(stage.config)},
        "steps": steps,
        "data": data,
        "inputs": inputs,
        "files": described(stage.output_dir),
        "thresholds": FULL_WEIGHTS if stage.adapter is None else "every module moved",
        "movement": check_movement(stage),
        "versions": {name: version(name) for name in ("axolotl", "torch", "transformers", "peft", "bitsandbytes")},
    }
    with atomic_write(stage.verdict) as handle:
        json.dump(verdict, handle, indent=1, ensure_ascii=False)
        handle.write("\n")
    return verdict


def recall(stage: Stage, chain: list[Stage]) -> dict[str, Any]:
    """The verdict of an earlier day, if it still holds: same weights, same inputs, same data. Raises NotTrained."""
    try:
        verdict = json.loads(stage.verdict.read_text())
        recorded = {key: verdict[key] for key in ("data", "inputs", "files", "recipe", "steps", "movement")}
    except (ValueError, KeyError) as error:
        raise NotTrained(f"{stage.verdict} is damaged; remove it and run `make check`") from error
    if described(stage.output_dir) != recorded["files"]:
        raise NotTrained(f"the weights in {stage.output_dir} are not those that passed; train stage {stage.name} again")
    if check_inputs(stage, chain) != recorded["inputs"]:
        raise NotTrained(f"stage {stage.name} was built on other weights than {', '.join(recorded['inputs'])} hold now")
    if check_data(stage) != recorded["data"]:
        raise NotTrained(f"stage {stage.name} was trained on data that has changed since; train it again")
    return verdict


def check(stage: Stage, chain: list[Stage]) -> dict[str, Any]:
    """The verdict on a stage and on all it was built from: recalled where it was given before, judged otherwise."""
    for earlier in line_of(stage.name, chain):
        verdict = recall(earlier, chain) if earlier.verdict.exists() else judge(earlier, chain)
    return verdict


def describe(verdict: dict[str, Any]) -> str:
    """One line for the terminal."""
    moved, steps = verdict["movement"], verdict["steps"]
    matrices = [tensor for tensor in moved.values() if tensor.get("kind") == "matrix"]
    if matrices:
        how = f"{min(t['changed'] for t in matrices):.1%} or more of each matrix changed, by {min(t['relative'] for t in matrices):.2g} of its norm or more"
    else:
        how = f"{len(moved)} adapted modules moved, the least by {min(m['B'] for m in moved.values()):.2g} (norm of B's change)"
    short = (
        ""
        if steps["epochs"] >= 0.98 * steps["epochs_of_recipe"]
        else f" ({steps['epochs']} of {steps['epochs_of_recipe']} epochs)"
    )
    return f"{verdict['stage']}: trained, {steps['reached']} of {steps['planned']} steps{short}; {how}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="recipe names (default: every stage that has an output)")
    parser.add_argument(
        "--recipes", type=Path, default=Path("recipes"), help="folder of the recipes (default: recipes)"
    )
    args = parser.parse_args()
    chain = load_chain(args.recipes)
    names = args.stages or [stage.name for stage in chain if stage.output_dir.exists()]
    if not names:
        raise BadInput("no stage has been trained here; `make stage-a` trains the first")
    stages = [line_of(name, chain)[-1] for name in names]
    failed = 0
    for stage in stages:
        try:
            verdict = check(stage, chain)
            print(describe(verdict))
            if verdict["recipe"]["sha256"] != config_hash(stage.config):
                print(f"{stage.name}: note: {stage.recipe} has been edited since", file=sys.stderr)
        except BadInput as error:
            print(f"{stage.name}: NOT TRAINED: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
