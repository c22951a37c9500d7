"""Where and from what a figure was measured: the processor's name and the repository's commit. Imports nothing heavy."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def cpu_name() -> str:
    """The processor's model, where Linux tells it; otherwise what Python knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any] | None:
    """Commit of this repository, and whether tracked files differ from it; None outside git.

    In the container's image, which holds no .git, what the build was told: `CHATEAU_COMMIT`, as `git describe --always
    --dirty --abbrev=40` prints it.
    """
    try:
        commit, status = (
            subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        built = os.environ.get("CHATEAU_COMMIT")
        return {"commit": built.removesuffix("-dirty"), "modified": built.endswith("-dirty")} if built else None
    return {"commit": commit.strip(), "modified": bool(status.strip())}


def commit(git: dict[str, Any] | None) -> str:
    """What `git_state` found, in words."""
    return f"commit {git['commit'][:12]}{' with changes' if git['modified'] else ''}" if git else "no git commit"
