"""Shared helpers: atomic writes, sha256, one-line errors, versions, progress."""

import argparse
import contextlib
import ctypes
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
_locks: list[IO[str]] = []


class BadInput(Exception):
    """The user's files or arguments are wrong. The message says what, where, and what to do."""


def reason(error: BaseException) -> str:
    """What an exception says, on one line; the name of its kind when it says nothing. PEFT, for one, lists every tensor."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path` and rename it over `path` once the block ends without an exception.

    A reader, or the same command run again after a kill, sees the old file or the whole new one.
    Text is UTF-8 with `\\n` line ends, whatever the platform.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    # A killed run's, up to gigabytes that nobody sees.
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    handle = tempfile.NamedTemporaryFile(  # noqa: SIM115 (closed below, renamed after)
        mode, encoding=encoding, newline=newline, dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
    )
    try:
        with handle:
            with contextlib.suppress(OSError):  # no locks on this file system
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(handle.name, 0o644)  # NamedTemporaryFile makes it 0600; a lab shares its data folder
        os.replace(handle.name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(handle.name)
        raise


def write_text(path: str | Path, text: str) -> None:
    """`atomic_write` of a whole text."""
    with atomic_write(path) as handle:
        handle.write(text)


def read_text(path: Path) -> str:
    """A UTF-8 text. Raises BadInput when it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def write_json(path: str | Path, value: Any) -> None:
    """`atomic_write` of a value as JSON, a key a line."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str, pick: Callable[[Any], Any] = lambda value: value) -> Any:
    """`pick` of a JSON file. Raises BadInput, ending in `remedy`, when it is missing or damaged."""
    try:
        return pick(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing; {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is damaged; {remedy}") from error


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises BadInput when it cannot be read, is not UTF-8 or not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {reason(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid YAML: {reason(error)}") from error


def lock(target: Path) -> None:
    """Hold a file or folder for this process until it ends, however it ends. Raises BadInput naming the process that has it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle = target.with_name(f".{target.name}.lock").open("a+")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by the processes it forks
    except (BlockingIOError, PermissionError) as error:
        handle.seek(0)
        number = handle.read()  # empty where it has just begun
        writer = f"process {number}" if number else "another process"
        raise BadInput(f"{writer} is writing {target}: wait for it, or stop it") from error
    except OSError:  # the file system has no locks
        pass
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    _locks.append(handle)  # closed, it would be free


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hashed(path: Path) -> str:
    """sha256 of a file, read again only when it has changed: every later stage asks for 2a's gigabytes."""
    state = path.stat()
    return _hash_of(path.absolute(), state.st_size, state.st_mtime_ns)


@functools.cache
def _hash_of(path: Path, size: int, written: int) -> str:
    return sha256(path)


def changed(folder: Path, files: dict[str, str]) -> list[str]:
    """Those of {name: sha256} that are not in the folder, or not these."""
    return [name for name, sha in files.items() if not (folder / name).is_file() or hashed(folder / name) != sha]


SEAL = "complete.json"  # in a checkpoint, a folder of tokenised rows or a corpus: {file: sha256}


def seal(folder: Path, *patterns: str) -> None:
    """Record files of a folder (default: all) and their sha256 in it, last of all: what writes them writes in place."""
    found = {path for pattern in patterns or ["**/*"] for path in folder.glob(pattern)}
    files = [path for path in sorted(found) if path.is_file() and path.name != SEAL]
    write_json(folder / SEAL, {str(path.relative_to(folder)): sha256(path) for path in files})


def is_whole(folder: Path) -> bool:
    """Does a folder hold what was recorded at its end, whatever its layout?"""
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return bool(files) and not changed(folder, files)
    except (OSError, ValueError, AttributeError):
        return False


def digest(value: Any) -> str:
    """sha256, hex, of a text or of anything that JSON can hold."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def need_room(folder: Path, size: int) -> None:
    """Raise BadInput where the disk of `folder` has no room for `size` bytes, of which the folder may hold some."""
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + held < size:
        raise BadInput(f"the disk of {folder} has {free / 1e9:.2f} GB free, {(size - held) / 1e9:.2f} GB are needed")


def run_name(text: str) -> str:
    """An argparse type: the name of a report. A path would be written outside the folder of reports."""
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is a path; give a name, as full or small")
    return text


def positive(text: str) -> int:
    """An argparse type: a whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when the one that started it ends, however it ends; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


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
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        state = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        state = os.environ.get("CHATEAU_COMMIT", "")
    return {"commit": state.removesuffix("-dirty"), "modified": state.endswith("-dirty")} if state else None


def commit(git: dict[str, Any] | None) -> str:
    """What `git_state` found, in words."""
    return f"commit {git['commit'][:12]}{' with changes' if git['modified'] else ''}" if git else "no git commit"


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that decide the bytes."""
    return {package: importlib.metadata.version(package) for package in packages}


def collected(folder: Path) -> dict[str, Any]:
    """What collect.py recorded of a folder of sources, its `files` by name. Raises BadInput where that is damaged."""

    def pick(record: dict[str, Any]) -> dict[str, Any]:
        files = [{key: file[key] for key in ("name", "bytes", "sha256")} for file in record["files"]]
        return record | {"files": {file["name"]: file for file in files}}

    path = folder / "source.json"
    return read_json(path, f"remove {folder} and collect it again", pick) if path.is_file() else {"files": {}}


def source_files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of each source file, in the given order.

    Of one that is gone, what the source.json beside it records. Raises BadInput where one is not what that records: it was
    damaged or exchanged since.
    """
    files: list[dict[str, Any]] = []
    recorded = functools.cache(lambda folder: collected(folder)["files"])
    for path in paths:
        known = recorded(path.parent).get(path.name)
        if known and not path.exists():
            files.append(known)
            continue
        files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)})
        if known and known["sha256"] != files[-1]["sha256"]:
            record = path.with_name("source.json")
            raise BadInput(f"{path} is not the file that {record} records: remove it and collect it again")
    return files


def progress(steps: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A tqdm bar on stderr; where stderr is no terminal, a line every minute instead of a bar that is drawn over."""
    screen: IO[str] = settings.get("file") or sys.stderr
    terminal = screen.isatty()
    line = "{l_bar}{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]\n"
    layout = {} if terminal else {"mininterval": 60, "maxinterval": 60, "bar_format": line}
    return tqdm(steps, dynamic_ncols=terminal, **(layout | settings))
