"""Run the Dockerfile's instructions, read from the Dockerfile itself, in a bare Debian without Docker.

    sudo python docker/steps.py ROOT                             # the image that `docker build` makes by default
    sudo python docker/steps.py ROOT --build-arg TORCH=cpu -- make demo
    python docker/steps.py --list                                # what would run

ROOT is a new folder: mmdebstrap (a Debian package) puts the release there that FROM names, then every instruction is
carried out inside, by chroot in namespaces of its own, with the environment, folder and user that the image would have.
Then the container's start is played: the entry point with its command, until the health check passes, or what stands
after --. An instruction that this script does not know is an error: nothing of the Dockerfile is passed over.

What differs from an image: Debian's packages are today's, not those in the base image of that digest; nothing limits
memory or network; /dev is this machine's. A second run on the same ROOT goes on after the steps that are done, as long as
they and the files they copy are the same; the layers are not kept apart, so it also finds what earlier runs left.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from dockerfile_parse import DockerfileParser
from pathspec import PathSpec

from prep.common import BadInput, run, sha256

HERE = Path(__file__).resolve().parent
CONTEXT = HERE.parent
KNOWN = {"FROM", "ARG", "SHELL", "RUN", "COPY", "ENV", "WORKDIR", "USER"}  # carried out
AT_START = {"HEALTHCHECK", "ENTRYPOINT", "CMD"}  # carried out when the container starts
PATIENCE = 300  # seconds for the container's command to become healthy
METADATA = {"COMMENT", "EXPOSE", "LABEL", "VOLUME"}  # nothing to do without an engine


@dataclass(frozen=True)
class Step:
    """One instruction, as the Dockerfile has it."""

    instruction: str
    value: str


@dataclass
class State:
    """What an image carries from one instruction to the next."""

    root: Path
    arguments: dict[str, str]
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    declared: dict[str, str] = field(default_factory=dict)  # the ARGs of this stage
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    folder: str = "/"
    user: str = "0:0"
    start: dict[str, str] = field(default_factory=dict)  # HEALTHCHECK, ENTRYPOINT, CMD

    def expand(self, text: str) -> str:
        """$NAME and ${NAME} by what ARG and ENV have set."""
        return string.Template(text).safe_substitute(self.declared | self.environment)


def stages(dockerfile: Path) -> tuple[dict[str, str], dict[str, tuple[str, list[Step]]]]:
    """The ARGs before the first FROM, and {stage: (what it is FROM, its steps)}. Raises BadInput on what is unknown."""
    parser = DockerfileParser(fileobj=dockerfile.open("rb"))
    defaults: dict[str, str] = {}
    found: dict[str, tuple[str, list[Step]]] = {}
    for item in parser.structure:
        step = Step(item["instruction"], item["value"])
        if step.instruction not in KNOWN | AT_START | METADATA:
            raise BadInput(f"{dockerfile}: docker/steps.py cannot carry out {step.instruction} {step.value}")
        if step.instruction == "FROM":
            base, _, name = step.value.partition(" AS ")
            found[name] = (base, [])
        elif not found and step.instruction == "ARG":
            name, _, default = step.value.partition("=")
            defaults[name] = default
        elif found and step.instruction != "COMMENT":
            found[list(found)[-1]][1].append(step)
    return defaults, found


def line(target: str, dockerfile: Path, arguments: dict[str, str]) -> tuple[str, list[Step]]:
    """The base image's name, and every step from it to the end of the target stage."""
    defaults, found = stages(dockerfile)
    steps: list[Step] = []
    base = target
    while base in found:
        source, own = found[base]
        steps = own + steps
        base = string.Template(source).substitute(defaults | arguments)
    return base, steps


def context_files(context: Path) -> list[Path]:
    """The files of the build context that .dockerignore lets through, relative to it."""
    lines = (context / ".dockerignore").read_text().splitlines()
    rules = [text.strip() for text in lines if text.strip()]
    # Docker's patterns are anchored at the context, those of gitignore, which pathspec reads, are not.
    anchored = [re.sub(r"^(!?)(?!\*\*/)/?", r"\1/", rule) for rule in rules]
    ignored = PathSpec.from_lines("gitwildmatch", anchored)
    files = subprocess.run(
        ["find", ".", "-mindepth", "1", "(", "-name", ".git", "-o", "-name", ".venv", ")", "-prune", "-o", "-not", "-type", "d", "-print"],
        cwd=context, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return sorted(Path(name) for name in files if not ignored.match_file(name.removeprefix("./")))


def copied(step: Step, state: State, context: Path) -> dict[Path, Path]:
    """What COPY SOURCE... TARGET copies: {file of the context: where it goes, from the root}."""
    *sources, target = shlex.split(state.expand(step.value))
    if any(source.startswith("--") for source in sources):
        raise BadInput(
            f"docker/steps.py cannot carry out COPY {step.value}; build the stage it copies from by --target"
        )
    found = {}
    for source in sources:
        wanted = [path for path in context_files(context) if source == "." or path.is_relative_to(source)]
        if not wanted:
            raise BadInput(f"COPY {step.value}: .dockerignore leaves nothing of {source}")
        for path in wanted:
            inside = path.relative_to(source) if (context / source).is_dir() else Path(path.name)
            found[path] = Path(state.folder, target, inside)
    return found


def copy(step: Step, state: State, context: Path) -> None:
    """COPY, from the context."""
    for path, target in copied(step, state, context).items():
        there = state.root / target.relative_to("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(context / path, there, follow_symlinks=False)


def record(step: Step, state: State, context: Path) -> list[str]:
    """What tells this step from another: its text, what the text stands for, and of COPY every file."""
    known = [step.instruction, step.value, state.expand(step.value)]
    if step.instruction == "COPY":
        files = [
            (str(path), os.lstat(path).st_mode, sha256(path))
            for path in map(context.joinpath, copied(step, state, context))
        ]
        known.append(hashlib.sha256(json.dumps(files).encode()).hexdigest())
    return known


def called(state: State, arguments: list[str]) -> list[str]:
    """`arguments` in the root, with the state's environment, folder and user, and no other."""
    settings = [f"{key}={value}" for key, value in (state.environment | state.declared).items()]
    there = ["chroot", f"--userspec={state.user}", str(state.root), "/usr/bin/env", "-i", "-C", state.folder]
    return [*there, *settings, *arguments]


def inside(state: State, arguments: list[str], binds: list[Path]) -> list[str]:
    """The call that runs `arguments` in the root: its own mounts and processes, the state's environment, folder, user."""
    root = shlex.quote(str(state.root))
    mounts = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    for bind in binds:
        target = shlex.quote(f"{state.root}{bind}")
        make = f"mkdir -p {target}" if bind.is_dir() else f"mkdir -p $(dirname {target}) && touch {target}"
        mounts.append(f"{make} && mount --bind {shlex.quote(str(bind))} {target}")
    script = " && ".join([*mounts, f"exec {shlex.join(called(state, arguments))}"])
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script]


def carry_out(step: Step, state: State, context: Path, binds: list[Path]) -> None:
    """One instruction: on the files, or on the state."""
    match step.instruction:
        case "RUN":
            subprocess.run(inside(state, [*state.shell, step.value], binds), check=True)
        case "COPY":
            copy(step, state, context)
        case "ARG":
            name, _, default = step.value.partition("=")
            state.declared[name] = state.arguments.get(name, default)
        case "ENV":
            for pair in shlex.split(step.value):
                name, _, value = pair.partition("=")
                state.environment[name] = state.expand(value)
        case "WORKDIR":
            state.folder = state.expand(step.value)
            (state.root / state.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            state.user = state.expand(step.value)
        case "SHELL":
            state.shell = json.loads(step.value)
        case _ if step.instruction in AT_START:
            state.start[step.instruction] = step.value


def build(target: str, state: State, binds: list[Path]) -> None:
    """The base system, then every step; those that an earlier run finished are only applied to the state."""
    base, steps = line(target, HERE / "Dockerfile", state.arguments)
    release = re.match(r"debian:([a-z]+)", base)
    if not release:
        raise BadInput(f"docker/steps.py lays out Debian only, and the image starts from {base}")
    done_file = state.root.with_name(state.root.name + ".done.json")
    done: list[list[str]] = json.loads(done_file.read_text()) if done_file.exists() else []
    used = bool(done)
    if not used:
        if state.root.exists():
            raise BadInput(f"{state.root} is there already, and not by this script: give a new folder")
        print(f"--- FROM {base}", flush=True)
        subprocess.run(["mmdebstrap", "--variant=minbase", release[1], str(state.root)], check=True)
    done = done or [["FROM", base]]
    new = [["FROM", base]]
    for step in steps:
        new.append(record(step, state, CONTEXT))
        changes_files = step.instruction in ("RUN", "COPY")
        same = done[: len(new)] == new
        if changes_files and not same:
            done = new[:-1]  # what comes after a changed step is carried out again, should this one fail too
            done_file.write_text(json.dumps(done))
        if not changes_files or not same:
            print(f"--- {step.instruction} {step.value}", flush=True)
            started = time.monotonic()
            try:
                carry_out(step, state, CONTEXT, binds)
            except subprocess.CalledProcessError as error:
                again = "; what an earlier run left may be in its way: remove it, and begin anew" if used else ""
                raise BadInput(
                    f"{state.root}: status {error.returncode} from {step.instruction} {step.value}{again}"
                ) from error
            if step.instruction == "RUN":
                print(f"    {time.monotonic() - started:.0f} s", flush=True)
        if len(new) > len(done):
            done_file.write_text(json.dumps(new))
            done = list(new)


def play(state: State, command: list[str], binds: list[Path]) -> None:
    """What `docker run` would: a command behind the entry point, or the image's own until its health check passes."""
    state.declared = {}  # ARGs end with the build
    entry = json.loads(state.start["ENTRYPOINT"])
    if command:
        if code := subprocess.run(inside(state, entry + command, binds)).returncode:
            raise BadInput(f"the command ended with status {code}")
        return
    check = json.loads(state.start["HEALTHCHECK"].partition("CMD ")[2])
    started = time.monotonic()
    process, said = subprocess.Popen(inside(state, entry + json.loads(state.start["CMD"]), binds)), ""
    try:
        while process.poll() is None and time.monotonic() - started < PATIENCE:
            for child in psutil.Process(process.pid).children():
                # As an engine does: among the container's own processes.
                beside = ["nsenter", f"--target={child.pid}", "--mount", "--pid", *called(state, check)]
                found = subprocess.run(beside, capture_output=True, text=True)
                if not found.returncode:
                    print(f"healthy after {time.monotonic() - started:.0f} s", flush=True)
                    return
                said = found.stderr.strip()
            time.sleep(0.5)
        how = "did not become healthy" if process.poll() is None else f"ended with status {process.poll()}"
        raise BadInput(f"the container's command {how}: {said}")
    finally:
        if process.poll() is None:
            # unshare waits through signals; with its child, process 1 of the namespace, all that runs inside is ended.
            for child in psutil.Process(process.pid).children():
                child.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", help="new folder for the system")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--target", default="workbench", help="stage to build (default: workbench)")
    parser.add_argument(
        "--bind", type=Path, action="append", default=[], metavar="PATH",
        help="a file or folder of this machine shown inside at the same path: a package mirror, its certificates",
    )  # fmt: skip
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="set inside at every step, and at the start"
    )
    parser.add_argument("--list", action="store_true", help="print the steps and leave")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, command = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    pairs: dict[str, Any] = {
        name: dict(pair.split("=", 1) for pair in getattr(args, name)) for name in ("build_arg", "env")
    }

    if args.list:
        base, steps = line(args.target, HERE / "Dockerfile", pairs["build_arg"])
        print("\n".join([f"FROM {base}", *(f"{step.instruction} {step.value}" for step in steps)]))
        return
    if args.root is None:
        parser.error("say where: a new folder")
    if os.geteuid() != 0:
        raise BadInput("laying out a system needs root: sudo python docker/steps.py ...")
    state = State(args.root.resolve(), pairs["build_arg"])
    state.environment |= pairs["env"]
    build(args.target, state, args.bind)
    play(state, command, args.bind)


if __name__ == "__main__":
    run(main)
