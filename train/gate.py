"""Did a stage train as planned? Writes outputs/2X/trained.json if it did, and says why if it did not.

A failed training often looks like a good one: an adapter that was loaded frozen, updates lost to bf16 rounding, weights
saved half-trained by Ctrl-C, a cache of older rows. A stage counts as trained when:

  steps      the last checkpoint is at the last planned step, and the final weights are that checkpoint's (with
             `load_best_model_at_end`: those of the one with the lowest validation loss)
  data       the rows are those of their manifest, and those the training started with
  inputs     the model (and adapter) it builds on is, byte for byte, what was collected or trained before
  movement   full weights moved as far as FULL_WEIGHTS asks, an adapter away from what it started from: in every module;
             full copies beside an adapter (`lora_modules_to_save`) too, or not at all where `unfrozen_parameters` freezes them

train/plugins.py calls it at the end of every training. The command checks what is on disk:

  python train/gate.py            every stage that has an output (make check)
  python train/gate.py 2b         one, and what it builds on
"""

from prep.command import run

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prep.common import BadInput, digest, hashed, read_json, versions, write_json
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

COPIES = "lora_modules_to_save"  # the recipe's list of modules of which full copies are trained
COPY = ".modules_to_save.default.weight"  # ends the name of such a copy in the model that is trained
# A loaded adapter keeps its own settings, whatever the recipe says: {recipe's key: adapter_config.json's}.
ADAPTER_SETTINGS = {"lora_r": "r", "lora_alpha": "lora_alpha", "peft_use_rslora": "use_rslora"}


def make(step: str, stage: Stage) -> str:
    """How to make what a stage's step makes, for messages: ("prep", 2b) -> `make prep-b`."""
    number, letter = re.fullmatch(r"(\d*)(.*)", stage.name, re.S).groups()  # type: ignore[union-attr]
    if number == "2":
        return f"`make {step}-{letter}`"
    return f"`make {step}-{letter} CURRICULUM={number}`" if step == "stage" else f"the command in {stage.recipe}'s head"


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model or adapter folder. Raises BadInput when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{folder} holds no weights (*.safetensors)")
    return files


def described(folder: Path) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of each weight file, as source.json has them of a collected model."""
    return [{"name": path.name, "bytes": path.stat().st_size, "sha256": hashed(path)} for path in weight_files(folder)]


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor of a folder, one at a time."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    yield name, handle.get_tensor(name)
        except SafetensorError as error:
            raise BadInput(f"{path} is damaged ({error}); train that stage again") from error


def before_and_after(before: Path, after: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each tensor of `after` with its value in `before`. Raises BadInput on NaN and when they are not the same model."""
    old = dict(tensors(before))
    for name, new in tensors(after):
        if not torch.isfinite(new).all():
            raise BadInput(f"{after}: tensor {name} holds NaN or infinity: the training diverged")
        if name not in old or old[name].shape != new.shape:
            raise BadInput(f"{after}: {before} has no {name} of this shape: not the same model or adapter")
        yield name, old.pop(name), new
    lost = [name for name in old if name != "lm_head.weight"]  # a tied head is saved once
    if lost:
        raise BadInput(f"{after} lacks {len(lost)} tensors of {before}, for example {lost[0]}")


def movement_of_weights(before: Path, after: Path) -> dict[str, dict[str, Any]]:
    """Per tensor, how far full weights moved: {name: {kind, changed, relative}}, measured in the dtype of `after`."""
    return {name: movement(name, old, new) for name, old, new in before_and_after(before, after)}


def movement(name: str, old: torch.Tensor, new: torch.Tensor) -> dict[str, Any]:
    """How far one tensor of full weights moved."""
    was = old.to(new.dtype)
    change = (new.float() - was.float()).norm() / was.float().norm().clamp(min=1e-12)
    return {
        "kind": "vector" if new.dim() < 2 else "embedding" if re.search(r"embed|lm_head", name) else "matrix",
        "changed": round((new != was).float().mean().item(), 6),
        "relative": float(f"{change.item():.4g}"),
    }


def movement_of_adapter(before: Path, after: Path, copies: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Per adapted module, the norm of the change of A and B: {module: {"A": norm, "B": norm}}.

    Per full copy of a module named in `copies`, what `movement_of_weights` says of it.
    """
    moved: dict[str, dict[str, Any]] = {}
    for name, old, new in before_and_after(before, after):
        module = name.removesuffix(".weight")
        if match := re.fullmatch(r"(.+)\.lora_([AB])", module):
            moved.setdefault(match[1], {})[match[2]] = float(f"{(new.float() - old.float()).norm().item():.4g}")
        elif module.rsplit(".", 1)[-1] in copies:
            moved[module] = movement(name, old, new)
        else:
            raise BadInput(f"{after}: {name} is not a LoRA tensor")
    return moved


def is_frozen(parameter: str, config: dict[str, Any]) -> bool:
    """Does the recipe's `unfrozen_parameters` freeze a parameter, under its name in the model that is trained?"""
    patterns = config.get("unfrozen_parameters")
    if not patterns:
        return False
    from axolotl.utils.freeze import LayerNamePattern  # here, for it takes seconds

    return not any(LayerNamePattern(pattern).match(parameter) for pattern in patterns)


# --- what a stage needs before it starts -----------------------------------------------------------------------------


def manifest_of(rows: Path) -> Path:
    """data/2a.jsonl and data/2a.heldout.jsonl share data/2a.manifest.json."""
    return rows.parent / f"{rows.name.removesuffix('.jsonl').removesuffix('.heldout')}.manifest.json"


def check_data(stage: Stage) -> dict[str, str]:
    """{path: sha256} of each JSONL the stage reads, and of the text it was cut from: as their manifest says, or BadInput."""
    remedy = f"{make('prep', stage)} makes it"
    files: dict[str, str] = {}
    for rows in stage.datasets + stage.heldout:
        manifest = manifest_of(rows)
        train, heldout, text = read_json(
            manifest,
            remedy,
            lambda said: (said["train"]["sha256"], said["heldout"]["sha256"], said.get("documents", {}).get("text")),
        )
        expected = {rows: train if rows in stage.datasets else heldout}
        if text:
            expected[rows.parent / text["path"]] = text["sha256"]
        for path, recorded in expected.items():
            if not path.exists():
                raise BadInput(f"{path} is missing; {remedy}")
            if hashed(path) != recorded:
                raise BadInput(f"{path} is not the file that {manifest} describes; {remedy} again")
            files[str(path)] = recorded
    return files


def check_inputs(stage: Stage, chain: list[Stage]) -> dict[str, dict[str, str]]:
    """{folder: {file: sha256}} of the weights it builds on, as collected or as they passed their gate. Raises BadInput."""
    made_by = {other.output_dir: other for other in chain}
    inputs: dict[str, dict[str, str]] = {}
    for folder in filter(None, [stage.base_model, stage.adapter_from]):
        maker = made_by.get(folder)
        record = maker.verdict if maker else folder / "source.json"
        remedy = f"{make('stage', maker) if maker else '`make data`'} makes it"
        if maker and not record.exists():
            raise BadInput(f"stage {stage.name} needs {folder}, which has not passed its gate; `make check` says why")
        expected = read_json(record, remedy, lambda said: {file["name"]: file["sha256"] for file in said["files"]})
        inputs[str(folder)] = {path.name: hashed(path) for path in weight_files(folder)}
        for name, found in inputs[str(folder)].items():
            if expected.get(name) != found:
                raise BadInput(f"{folder / name} is not the file that {record} describes; {remedy} again")
    return inputs


def check_tokenizer(stage: Stage, chain: list[Stage]) -> None:
    """The tokenizer that the rows were cut with is the base model's, and fits its vocabulary. Raises BadInput."""
    base = line_of(stage.name, chain)[0].base_model
    tokenizer, remedy = base / "tokenizer.json", "`make data` collects the base model"

    def highest_id(said: dict[str, Any]) -> int:
        vocab = said["model"]["vocab"]
        ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()  # a list is Unigram's
        # added_tokens has the added tokens of tokenizer_config.json too.
        return max([*ids, *(token["id"] for token in said.get("added_tokens", []))])

    highest = read_json(tokenizer, remedy, highest_id)
    vocabulary = read_json(base / "config.json", remedy, lambda config: config["vocab_size"])
    if highest >= vocabulary:
        raise BadInput(f"{base}: the tokenizer has a token {highest}, but the model's vocabulary is {vocabulary}")
    for rows in stage.datasets + stage.heldout:
        manifest, again = manifest_of(rows), f"{make('prep', stage)} makes it again"
        if read_json(manifest, again, lambda said: said["tokenizer"]["sha256"]) != hashed(tokenizer):
            raise BadInput(f"{rows} was cut into windows with another tokenizer than {tokenizer}; {again}")


def check_window(model: Path, tokens: int) -> None:
    """Raises BadInput where a model that learned its positions, as GPT-2's kind does, has fewer than a window has tokens."""
    again = "collect or train it again"
    positions = read_json(model / "config.json", again, lambda said: said.get("n_positions", tokens))
    if positions < tokens:
        raise BadInput(f"{model} has {positions} positions, too few for a window of {tokens} tokens: take another base")


def check_adapter_settings(stage: Stage, folder: Path) -> None:
    """The adapter in `folder` has the rank, alpha and scaling that the recipe states. Raises BadInput."""
    path = folder / "adapter_config.json"
    saved = read_json(path, f"{folder} holds no adapter", dict)
    for key, name in ADAPTER_SETTINGS.items():
        stated = stage.config.get(key, False)
        if saved.get(name) != stated:
            raise BadInput(
                f"{path}: {name} is {saved.get(name)}, but {stage.recipe} says {key}: {stated}. A continued adapter "
                "keeps its own settings: give both stages the same"
            )
    copies, stated = (set(found or []) for found in (saved.get("modules_to_save"), stage.config.get(COPIES)))
    copies = {name.rsplit(".", 1)[-1] for name in copies}  # of a tied pair it names one, in two ways
    if not copies <= stated or bool(copies) != bool(stated):
        raise BadInput(
            f"{path} has full copies of {sorted(copies)}, but {stage.recipe} says {COPIES}: {sorted(stated)}"
        )


def check_tying(stage: Stage) -> None:
    """Copies of an embedding and a head that the base ties stay one. Raises BadInput where they would drift apart."""
    if not stage.config.get(COPIES) or stage.config.get("peft_ensure_weight_tying"):
        return
    remedy = "the base model is not whole"
    if read_json(stage.base_model / "config.json", remedy, lambda said: said.get("tie_word_embeddings")):
        raise BadInput(
            f"{stage.base_model} ties its head to its embedding, and the copies that {stage.recipe} trains "
            "would drift apart: say `peft_ensure_weight_tying: true`"
        )


def check_ready(stage: Stage, chain: list[Stage]) -> dict[str, Any]:
    """Everything that can be refused before a stage starts. Returns hashes of its data and inputs; raises BadInput."""
    if stage.parent:
        check(line_of(stage.name, chain)[-2], chain)
    ready = {"data": check_data(stage), "inputs": check_inputs(stage, chain)}
    check_tokenizer(stage, chain)
    check_window(line_of(stage.name, chain)[0].base_model, stage.config.get("sequence_len", 0))
    check_tying(stage)
    if stage.adapter_from:
        check_adapter_settings(stage, stage.adapter_from)
    return ready


# --- the verdict -----------------------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """The Trainer's checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def kept_checkpoint(stage: Stage) -> Path:
    """The checkpoint whose weights the stage ends with: the last, or with `load_best_model_at_end` the best."""
    last = checkpoints(stage.output_dir)[-1]
    best = stage.config.get("load_best_model_at_end") and read_json(
        last / "trainer_state.json", f"train {stage.name} again", lambda state: state.get("best_model_checkpoint")
    )
    return stage.output_dir / Path(best).name if best else last


def check_steps(stage: Stage) -> dict[str, Any]:
    """Steps planned and reached, from the last checkpoint; its weights, or the best one's, are final. Raises BadInput."""
    found = checkpoints(stage.output_dir)
    if not found:
        raise BadInput(f"{stage.output_dir} holds no checkpoint; {make('stage', stage)} trains {stage.name}")
    last, resume = found[-1], f"train {stage.name} again, it resumes"
    keys = ("global_step", "max_steps", "epoch", "log_history")
    reached, planned, epoch, history = read_json(
        last / "trainer_state.json", resume, lambda state: [state[k] for k in keys]
    )
    if reached != planned:
        raise BadInput(f"stage {stage.name} stopped at step {reached} of {planned}; {resume} from {last.name}")
    kept = kept_checkpoint(stage)
    for path in weight_files(stage.output_dir):
        saved = kept / path.name
        if not saved.exists() or hashed(saved) != hashed(path):
            raise BadInput(
                f"{path} is not what {kept.name} saved at the {'best' if kept != last else 'last'} step; {resume}"
            )
    return {
        "kept": int(kept.name.split("-")[-1]),
        "planned": planned,
        "reached": reached,
        "epochs": round(epoch, 4),
        "epochs_of_recipe": stage.config.get("num_epochs", 1),
        "tokens": next((entry["tokens/total"] for entry in reversed(history) if "tokens/total" in entry), None),
    }


def check_movement(stage: Stage) -> dict[str, dict[str, Any]]:
    """Movement per tensor or module. Raises BadInput naming the first that did not move enough."""
    if stage.adapter is None:
        moved = movement_of_weights(stage.base_model, stage.output_dir)
    else:
        moved = movement_of_adapter(stage.start, stage.output_dir, stage.config.get(COPIES) or [])
    for module, sides in moved.items():
        if "kind" in sides:
            least = FULL_WEIGHTS[sides["kind"]]
            parameter = f"{module}{COPY}" if stage.adapter else module
            if is_frozen(parameter, stage.config):
                if sides["changed"]:
                    raise BadInput(f"stage {stage.name} changed {module}, which its `unfrozen_parameters` freezes")
            elif sides["changed"] < least["changed"] or sides["relative"] < least["relative"]:
                raise BadInput(
                    f"stage {stage.name} hardly trained {module}: {sides['changed']:.2%} of its elements changed (at least "
                    f"{least['changed']:.2%}), by {sides['relative']:.2g} of its norm (at least {least['relative']:.2g}). "
                    "Is the learning rate too low, or lost to bf16 rounding?"
                )
        elif not any(sides.values()):
            raise BadInput(
                f"stage {stage.name} trained nothing in {module}: its adapter is still that of {stage.start}"
            )
    if stage.adapter:
        check_adapter_settings(stage, stage.output_dir)
    return moved


def check_same(stage: Stage, record: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Everything in `record`, in which `now` must still be true. Raises BadInput naming what changed."""
    again = f"remove {stage.output_dir} and train {stage.name} again"
    then = read_json(record, again, lambda said: said | {key: said[key] for key in now})
    changed = [key for key in now if then[key] != now[key]]
    if changed:
        raise BadInput(f"{' and '.join(changed)} of stage {stage.name} changed since {record} was written; {again}")
    return then


def judge(stage: Stage, chain: list[Stage]) -> dict[str, Any]:
    """Check everything; write and return the verdict. Raises BadInput, and leaves no verdict, otherwise."""
    stage.verdict.unlink(missing_ok=True)
    steps, data, inputs = check_steps(stage), check_data(stage), check_inputs(stage, chain)
    check_same(stage, stage.output_dir / "started.json", {"data": data, "inputs": inputs})
    verdict = {
        "stage": stage.name,
        "recipe": {"path": stage.recipe.name, "sha256": digest(stage.config)},
        "steps": steps,
        "data": data,
        "inputs": inputs,
        "files": described(stage.output_dir),
        "thresholds": FULL_WEIGHTS if stage.adapter is None else "every module moved",
        "movement": check_movement(stage),
        "versions": versions("axolotl", "torch", "transformers", "peft", "bitsandbytes"),
    }
    write_json(stage.verdict, verdict)
    return verdict


def recall(stage: Stage, chain: list[Stage]) -> dict[str, Any]:
    """The verdict that was written, if weights, inputs and data are still the same. Raises BadInput."""
    now = {"files": described(stage.output_dir), "inputs": check_inputs(stage, chain), "data": check_data(stage)}
    return check_same(stage, stage.verdict, now)


def check(stage: Stage, chain: list[Stage]) -> dict[str, Any]:
    """The verdict on a stage, after those on all it builds on: the one written before if it still holds, or a new one."""
    for each in line_of(stage.name, chain):
        verdict = recall(each, chain) if each.verdict.exists() else judge(each, chain)
    return verdict


def describe(verdict: dict[str, Any]) -> str:
    """A verdict in a line: "2b: trained, 8 of 8 steps; 210 adapted modules moved ..."."""
    moved, steps = verdict["movement"], verdict["steps"]
    matrices = [tensor for tensor in moved.values() if tensor.get("kind") == "matrix"]
    if matrices:
        changed, relative = (min(tensor[key] for tensor in matrices) for key in ("changed", "relative"))
        how = f"at least {changed:.1%} of each matrix changed, by at least {relative:.2g} of its norm"
    else:
        b = [sides["B"] for sides in moved.values() if "B" in sides]
        how = f"{len(b)} adapted modules moved, B by at least {min(b):.2g} (norm)"
        if copies := [sides["changed"] for sides in moved.values() if "kind" in sides]:
            how += f"; {len(copies)} full copies, " + (
                f"at least {min(copies):.1%} changed" if any(copies) else "frozen"
            )
    whole = steps["epochs"] >= 0.98 * steps["epochs_of_recipe"]
    epochs = "" if whole else f" ({steps['epochs']} of {steps['epochs_of_recipe']} epochs)"
    return f"{verdict['stage']}: trained, {steps['reached']} of {steps['planned']} steps{epochs}; {how}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="recipe names (default: every stage that has an output)")
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="their folder (default: recipes)")
    args = parser.parse_args()
    chain = load_chain(args.recipes)
    names = args.stages or [stage.name for stage in chain if stage.output_dir.exists()]
    if not names:
        raise BadInput("no stage has been trained here; `make stage-a` trains the first")
    failed = 0
    for stage in [line_of(name, chain)[-1] for name in names]:
        try:
            verdict = check(stage, chain)
            print(describe(verdict))
            if verdict["recipe"]["sha256"] != digest(stage.config):
                print(f"{stage.name}: note: {stage.recipe} has been edited since", file=sys.stderr)
        except BadInput as error:
            print(f"{stage.name}: NOT TRAINED: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
