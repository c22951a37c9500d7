"""An output folder between runs: which checkpoints and tokenised rows are complete, whether they are this run's."""

import json
import shutil
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from prep.common import SEAL, BadInput, is_whole, read_json, reason, seal, write_json
from train.gate import checkpoints, kept_checkpoint
from train.stages import LOG, Stage


def drop_torn_rows(cache: Path) -> None:
    """Remove what was not written to its end or has changed in Axolotl's cache of tokenised rows: it would be trained on."""
    for folder in filter(Path.is_dir, cache.glob("*")):
        try:
            if (folder / SEAL).exists() and not is_whole(folder):
                raise BadInput(f"other files than {SEAL} records")
            load_from_disk(folder)  # not sealed: killed, or made by `axolotl preprocess`
        except Exception as error:  # Arrow, datasets and json each raise their own
            print(f"{folder} is incomplete ({reason(error)}): its rows are tokenised again", flush=True)
            shutil.rmtree(folder)


def seal_rows(cache: Path) -> None:
    """Record the tokenised rows that have just been made."""
    for folder in filter(Path.is_dir, cache.glob("*")):
        if not (folder / SEAL).exists():
            seal(folder)


def prepare_output(stage: Stage, plan: dict[str, Any]) -> None:
    """Ready the output folder to start the run that `plan` describes, or to resume it. Raises BadInput if it is another's."""
    for checkpoint in checkpoints(stage.output_dir):
        if not is_whole(checkpoint):
            aside = checkpoint.with_name(f"incomplete-{checkpoint.name}")
            print(f"{checkpoint} is incomplete: it is now {aside}", flush=True)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
    started = stage.output_dir / "started.json"
    if checkpoints(stage.output_dir):
        remedy = f"remove {stage.output_dir} to train the stage again"
        earlier = read_json(
            started, f"nothing says which run the checkpoints in {stage.output_dir} are of; {remedy}", dict
        )
        changed = [name for key in plan for name in differences(key, earlier.get(key), plan[key])]
        if changed:
            raise BadInput(
                f"{stage.output_dir} holds checkpoints of a run with other {', '.join(changed)}; "
                f"undo that to resume it, or {remedy}"
            )
        return
    # Logs of a run that never reached a checkpoint would be drawn as if they were this one's.
    shutil.rmtree(stage.output_dir / "runs", ignore_errors=True)
    (stage.output_dir / LOG).unlink(missing_ok=True)
    write_json(started, plan)


def differences(name: str, before: Any, now: Any) -> list[str]:
    """Names of what differs: the keys of two mappings, otherwise `name`."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [name] if before != now else []


def at_the_end(stage: Stage) -> bool:
    """Has its last complete checkpoint reached the last step?"""
    whole = [checkpoint for checkpoint in checkpoints(stage.output_dir) if is_whole(checkpoint)]
    if not whole:
        return False
    state = json.loads((whole[-1] / "trainer_state.json").read_text())
    return state["global_step"] >= state["max_steps"]


def take_weights(stage: Stage) -> None:
    """Copy the last (or best) checkpoint's model into the output folder, as the end of the training would have done.

    The Trainer itself cannot: resumed at `max_steps` it trains one step more.
    """
    only_to_resume = (
        "optimizer*",
        "scheduler*",
        "rng_state*",
        "trainer_state*",
        "training_args*",
        "tokens_state*",
        *("global_step*", "latest", "zero_to_fp32.py"),  # DeepSpeed's
        "pytorch_model_fsdp*",
        SEAL,
    )
    shutil.copytree(
        kept_checkpoint(stage),
        stage.output_dir,
        ignore=shutil.ignore_patterns(*only_to_resume),
        dirs_exist_ok=True,
    )
