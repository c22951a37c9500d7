"""Train one stage: check what it needs, run the recipe through Axolotl, and let the gate judge the result.

  python train/stage.py 2b                            what `make stage-b` runs
  python train/stage.py 2b --profile cpu              on a machine without a GPU (train/overrides.yml)
  python train/stage.py 2b -- --wandb_project=chateau   anything after -- goes to Axolotl as it is

Interrupted by Ctrl-C, a kill or a power cut, the same command resumes from the last whole checkpoint.
A stage that has passed its gate is not trained again; remove its output folder to do so.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from prep.common import BadInput, atomic_write, run, sha256
from train.gate import (
    NotTrained,
    check,
    check_adapter_settings,
    check_data,
    check_inputs,
    checkpoints,
    config_hash,
    describe,
    judge,
    manifest_of,
    recall,
    step_of,
)
from train.stages import Stage, line_of, load_chain

OVERRIDES = Path(__file__).with_name("overrides.yml")


def load_profile(name: str, stage: str, path: Path = OVERRIDES) -> tuple[list[str], dict[str, Any]]:
    """Arguments for `accelerate launch` and overrides of the recipe, of one profile for one stage."""
    profiles = yaml.safe_load(path.read_text())
    if name not in profiles:
        raise BadInput(f"no profile {name} in {path}; there are: {', '.join(profiles)}")
    profile = profiles[name]
    launch, overrides = load_profile(profile["extends"], stage, path) if "extends" in profile else ([], {})
    return profile.get("launch", launch), overrides | profile.get("all", {}) | profile.get(stage, {})


def check_compiler() -> None:
    """torch and Triton compile the optimiser's and the model's kernels at the first step: raises BadInput if they cannot."""
    compiler = os.environ.get("CXX", "g++")  # as torch._inductor looks for it
    if not shutil.which(compiler):
        raise BadInput(
            f"no C++ compiler ({compiler}): kernels are compiled at the first step. Install one (Debian: apt install g++), "
            "or name it in CXX"
        )


def as_arguments(overrides: dict[str, Any]) -> list[str]:
    """{"bf16": False, "plugins": []} -> ["--bf16=False", "--plugins=[]"], as Axolotl's command line reads them."""
    return [f"--{key}={value}" for key, value in overrides.items()]


def command(stage: Stage, launch: list[str], overrides: dict[str, Any], more: list[str]) -> list[str]:
    """The plain command that this stage stands for."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    return [*accelerate, "-m", "axolotl.cli.train", str(stage.recipe), *as_arguments(overrides), *more]


def check_tokenizer(stage: Stage, chain: list[Stage]) -> None:
    """The rows were cut into windows by the tokenizer of the model that the chain starts from. Raises BadInput."""
    base = line_of(stage.name, chain)[0].base_model
    tokenizer = base / "tokenizer.json"
    if not tokenizer.exists():
        raise BadInput(f"{tokenizer} is missing; `make data` collects the base model")
    for rows in stage.datasets + stage.heldout:
        manifest = manifest_of(rows)
        if json.loads(manifest.read_text()).get("tokenizer", {}).get("sha256") != sha256(tokenizer):
            raise BadInput(
                f"{rows} was cut into windows by another tokenizer than {tokenizer} (see {manifest}); "
                f"`make {step_of('prep', stage)}` makes it anew"
            )
    # The added tokens of tokenizer_config.json count too; tokenizer.json has them all.
    spec = json.loads(tokenizer.read_text())
    highest = max([*spec["model"]["vocab"].values(), *(token["id"] for token in spec.get("added_tokens", []))])
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    if highest >= vocabulary:
        raise BadInput(
            f"{base}: the tokenizer has a token {highest}, the model a vocabulary of {vocabulary}: not a pair"
        )


def is_whole(checkpoint: Path) -> bool:
    """Was this checkpoint written to its end? The Trainer writes them in place, the state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt") as handle:  # compares the header with the length of the file
                handle.keys()
        return bool(weights) and zipfile.is_zipfile(checkpoint / "optimizer.pt")
    except Exception:
        return False


def prepare_output(stage: Stage, plan: dict[str, Any]) -> None:
    """Ready the output folder to start, or to resume the same run: never another one's checkpoints. Raises BadInput."""
    stage.verdict.unlink(missing_ok=True)
    for checkpoint in checkpoints(stage.output_dir):
        if not is_whole(checkpoint):
            print(f"{checkpoint} was not written to its end: removed, the one before it serves", flush=True)
            shutil.rmtree(checkpoint)
    started = stage.output_dir / "started.json"
    whole = checkpoints(stage.output_dir)
    if whole:
        if not started.exists():
            raise BadInput(
                f"{stage.output_dir} holds checkpoints that were not made here; judge them with `make check`, "
                f"or remove the folder to train the stage anew"
            )
        earlier = json.loads(started.read_text())
        differing = [key for key in plan if earlier.get(key) != plan[key]]
        if differing:
            raise BadInput(
                f"{stage.output_dir} holds checkpoints of a run with other {', '.join(differing)}; "
                f"restore what it was started with, or remove the folder to train the stage anew"
            )
        print(f"resuming from {whole[-1]}", flush=True)
    else:
        # Logs of a run that never reached a checkpoint would be drawn as if they were this one's.
        shutil.rmtree(stage.output_dir / "runs", ignore_errors=True)
        with atomic_write(started) as handle:
            json.dump(plan, handle, indent=1)
            handle.write("\n")


def launch_and_wait(arguments: list[str]) -> int:
    """Run the training in a process group of its own; on Ctrl-C or a kill, interrupt all of it once and wait for it."""
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1"}
    environment.setdefault("HF_HUB_OFFLINE", "1")  # all it needs is on the disk
    process = subprocess.Popen(arguments, env=environment, start_new_session=True)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        # accelerate leaves at once, the training itself only when it has put its files away
        for _ in range(600):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            os.killpg(process.pid, signal.SIGKILL)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="name of the recipe: 2a, 2b, 2c ...")
    parser.add_argument(
        "--recipes", type=Path, default=Path("recipes"), help="folder of the recipes (default: recipes)"
    )
    parser.add_argument("--profile", default="gpu", help="a section of train/overrides.yml (default: gpu)")
    parser.usage = "%(prog)s [-h] [--recipes RECIPES] [--profile PROFILE] stage [-- --key=value ...]"
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, more = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]

    chain = load_chain(args.recipes)
    line = line_of(args.stage, chain)
    stage = line[-1]
    launch, overrides = load_profile(args.profile, stage.name)

    if stage.parent:
        try:
            check(line[-2], chain)
        except NotTrained as error:
            raise BadInput(f"stage {stage.name} builds on {stage.parent}, and {error}") from error
    data = check_data(stage)
    inputs = check_inputs(stage, chain)
    check_tokenizer(stage, chain)
    check_adapter_settings(stage)

    if stage.verdict.exists():
        try:
            print(f"{describe(recall(stage, chain))}. Remove {stage.output_dir} to train it again.")
            return 0
        except NotTrained as error:
            raise BadInput(f"{error} (remove {stage.output_dir})") from error

    if not any(path.stat().st_size for path in stage.heldout):
        # Prepared with --holdout 0, for the run on the whole book: there is nothing to validate on.
        overrides |= {"test_datasets": None, "eval_steps": None}
    plan = {
        "recipe": config_hash(stage.config),
        "overrides": [*as_arguments(overrides), *more],
        "data": data,
        "inputs": inputs,
    }
    check_compiler()
    prepare_output(stage, plan)
    # Axolotl's cache of tokenised rows does not notice new rows under an old name; this folder's name does.
    digest = "-".join(data[str(path)][:12] for path in stage.datasets)
    overrides["dataset_prepared_path"] = f"{stage.config['dataset_prepared_path']}-{digest}"
    arguments = command(stage, launch, overrides, more)
    print(" ".join(arguments), flush=True)
    status = launch_and_wait(arguments)
    if status:
        raise BadInput(
            f"the training of {stage.name} failed with status {status}, see above; the same command resumes it"
        )
    print(describe(judge(stage, chain)))
    return 0


if __name__ == "__main__":
    run(main)
