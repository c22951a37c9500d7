"""Train one stage: check what it needs, run the recipe through Axolotl, and print the gate's verdict.

  python train/stage.py 2b                              what `make stage-b` runs
  python train/stage.py 2b --profile cpu                on a machine without a GPU (train/overrides.yml)
  python train/stage.py 2b -- --wandb_project=chateau   anything after -- goes to Axolotl as it is

Interrupted by Ctrl-C, a kill or a power cut, the same command resumes from the last complete checkpoint. What Axolotl
prints goes to outputs/2b/train.log. A stage that has passed its gate is not trained again; remove its output folder to
do so.
"""

from prep.command import run

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml
from tqdm import tqdm

from eval.logs import Run
from prep.common import BadInput, end_with_parent, progress
from train.gate import check_ready, describe, recall
from train.stages import Stage, line_of, load_chain

OVERRIDES = Path(__file__).with_name("overrides.yml")


def load_profile(name: str, stage: str) -> tuple[list[str], dict[str, Any]]:
    """Arguments for `accelerate launch` and overrides of the recipe, of one profile for one stage."""
    profiles = yaml.safe_load(OVERRIDES.read_text())
    if name not in profiles:
        raise BadInput(f"no profile {name} in {OVERRIDES}; there are: {', '.join(profiles)}")
    profile = profiles[name]
    launch, overrides = load_profile(profile["extends"], stage) if "extends" in profile else ([], {})
    return profile.get("launch", launch), overrides | profile.get("all", {}) | profile.get(stage, {})


def check_compiler() -> None:
    """torch and Triton compile kernels at the first step: raises BadInput if they cannot."""
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
    """The plain command that trains this stage."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    return [*accelerate, "-m", "axolotl.cli.train", str(stage.recipe), *as_arguments(overrides), *more]


def launch_and_wait(
    arguments: list[str], log: IO[str] | None = None, each_second: Callable[[], None] = lambda: None
) -> int:
    """Run a command, its output into `log` if given; its exit status. It ends with this process, all it started with it."""
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1"}
    environment.setdefault("HF_HUB_OFFLINE", "1")  # all it needs is on the disk
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(
        arguments, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
    )
    # Killed, this process cannot end all the others; the end of its pipe tells one that can.
    kill_group = ["sh", "-c", 'read _; kill -9 "-$0"', str(process.pid)]
    watcher = subprocess.Popen(kill_group, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while True:
            try:
                return process.wait(1)
            except subprocess.TimeoutExpired:
                each_second()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # checkpoints are complete or set aside: nothing to put in order
        process.wait()
        watcher.kill()
        watcher.communicate()


def follow(stage: Stage, arguments: list[str]) -> None:
    """Train with one bar on the terminal and everything else in train.log. Raises BadInput with the reason of a failure."""
    log, training, started = stage.output_dir / "train.log", Run(stage.output_dir), time.time()
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{stage.name}: training {stage.output_dir}, log in {log}", flush=True)
    bar: tqdm | None = None

    def show() -> None:
        nonlocal bar
        training.refresh()
        now = training.now
        if now and now["time"] > started:  # not of the run that is resumed
            bar = bar or progress(total=now["max_steps"], initial=now["step"], desc=stage.name, unit="step")
            shown = {"loss": training.last("loss"), "tokens/s": training.last("tokens_per_second")}
            bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items() if value}, refresh=False)
            bar.update(now["step"] - bar.n)

    with log.open("a", encoding="utf-8") as handle:
        handle.write(f"\n{shlex.join(arguments)}\n")
        handle.flush()
        start = handle.tell()
        status = launch_and_wait(arguments, handle, show)
    show()
    if bar:
        bar.close()
    if status:
        printed = log.read_bytes()[start:].decode(errors="replace")
        if refusals := re.findall(r"^gate: (.+)$", printed, re.M):
            raise BadInput(refusals[-1])
        killed = re.findall(r"Signal \d+ \((?!SIGTERM)\w+\) received by PID \d+", printed)  # one of several processes
        error = r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?<!CalledProcess)(?:Error|Exception): .+)$"
        errors = re.findall(error, printed, re.M)
        reason = (killed or errors or [f"status {status}"])[-1]
        raise BadInput(f"{stage.name} failed: {reason} (log: {log}); the same command resumes it")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="name of the recipe: 2a, 2b, 2c ...")
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="their folder (default: recipes)")
    parser.add_argument("--profile", default="gpu", help="a section of train/overrides.yml (default: gpu)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show Axolotl's output instead of a bar and a log")
    parser.usage = "%(prog)s [-h] [-v] [--recipes RECIPES] [--profile PROFILE] stage [-- --key=value ...]"
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, more = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]

    chain = load_chain(args.recipes)
    stage = line_of(args.stage, chain)[-1]
    launch, overrides = load_profile(args.profile, stage.name)
    if "deepspeed" in overrides and not importlib.util.find_spec("deepspeed"):
        raise BadInput(
            f"profile {args.profile} needs DeepSpeed, which is not installed: `make setup-gpu`, or PROFILE=fsdp"
        )
    listed = stage.config.get("plugins") or []
    given = [word for word in more if word.startswith("--plugins")]
    plugins = given[-1] if given else overrides.get("plugins", listed)
    needed = {"train.plugins.Gate", *(name for name in listed if name.startswith("train."))}
    if lost := sorted(name for name in needed if name not in plugins):
        raise BadInput(
            f"{stage.name} must list {', '.join(lost)} under plugins: in {stage.recipe}, and where {OVERRIDES} (profile "
            f"{args.profile}) or the command line give others"
        )
    check_ready(stage, chain)
    if stage.verdict.exists():
        print(f"{describe(recall(stage, chain))}. Remove {stage.output_dir} to train it again.")
        return 0
    check_compiler()
    arguments = command(stage, launch, overrides, more)
    if args.verbose:
        print(shlex.join(arguments), flush=True)
        if status := launch_and_wait(arguments):
            raise BadInput(f"{stage.name} failed with status {status}, see above. The same command resumes it")
    else:
        follow(stage, arguments)
    print(describe(recall(stage, chain)))
    return 0


if __name__ == "__main__":
    run(main)
