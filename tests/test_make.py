"""The Makefile: settings reach the commands as they were typed, and nothing in them is run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Stands for .venv/bin/python: records what it was called with, arguments apart by \x1f, calls by \x1e.
RECORDER = r"""#!/bin/bash
{ printf '%s\x1f' "$@"; printf '\x1e'; } >>"$CALLS"
"""
HOSTILE = ("`touch ran`", '"; touch ran; "', "'; touch ran; '", "$(touch ran)", "$$(touch ran)", "$(shell touch ran)",
           "; touch ran #", "a\ntouch ran", "${HOME}", "* ~ é \\ 'x\" $")  # fmt: skip
SETTINGS = ("BOOK", "FILES", "HOLDOUT", "PROFILE", "CURRICULUM", "RUN", "RUNS", "WORDS", "PORT", "ARGS",
            "CORPUS_DIR", "TORCH", "PYTHON", "STAGE", "REPO")  # fmt: skip
TARGETS = ("base", "gallica", "book", "prep", "stage-a", "check", "eval", "export", "merge", "push", "continue", "compare", "notebook", "plan",
           "bench-gpu", "bench-train", "bench-prep", "test-fast", "help")  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile in a folder where every command is only recorded."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "data/raw/book").mkdir(parents=True)
    (tmp_path / "data/raw/book/book.txt").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(RECORDER)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / ".venv/ready").touch()
    return tmp_path


def make(project: Path, *arguments: str, expect: int | None = 0, **environment: str) -> list[list[str]]:
    """Run make; return the command lines that it called. expect: its exit status; None if any will do."""
    calls = project / "calls"
    calls.write_text("")
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS and "MAKE" not in name}
    variables = clean | {"CALLS": str(calls)} | environment
    done = subprocess.run(["make", *arguments], cwd=project, env=variables, capture_output=True, text=True)
    assert expect in (None, done.returncode), done.stdout + done.stderr
    return [call.split("\x1f")[:-1] for call in calls.read_text().split("\x1e")[:-1]]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_setting_arrives_as_it_was_typed_and_nothing_in_it_is_run(project: Path, value: str) -> None:
    before = sorted([*project.rglob("*"), project / "calls"])
    assert make(project, "book", f"BOOK={value}") == [["prep/collect.py", "book", f"--source={value}"]]
    assert make(project, "book", BOOK=value) == [["prep/collect.py", "book", f"--source={value}"]]
    assert value in make(project, "eval", f"RUN={value}")[0]
    # Some of these targets fail: xargs does not split an unfinished quotation.
    every = {name: value for name in SETTINGS}
    called = make(project, "--keep-going", *TARGETS, *(f"{name}={value}" for name in SETTINGS), expect=None)
    make(project, "--keep-going", "book", "stage-a", "plan", expect=None, **every)
    assert ["prep/collect.py", "base"] in called
    assert sorted(project.rglob("*")) == before


def test_arguments_are_split_as_a_shell_would_and_missing_ones_asked_for(project: Path) -> None:
    typed = """ARGS=--learning_rate=1e-4  '--name=two words' "--x=it's" --glob=*"""
    more = ["--learning_rate=1e-4", "--name=two words", "--x=it's", "--glob=*"]
    assert make(project, "stage-b", typed, "PROFILE=cpu") == [["train/stage.py", "2b", "--profile", "cpu", "--", *more]]
    assert make(project, "stage-b", "ARGS='unfinished", expect=2) == []  # no training without the option that was meant
    assert make(project, "stage-c", "CURRICULUM=3") == [["train/stage.py", "3c", "--profile", "gpu", "--"]]
    assert make(project, "compare", "RUNS=small full")[0][-2:] == ["small", "full"]
    for target in ("book", "compare", "bench-prep"):
        assert make(project, target, expect=2) == []


def test_the_demo_s_stages_are_exported_after_it_and_where_they_are(project: Path) -> None:
    script = project / "demo/demo.sh"
    (project / "demo/run").mkdir(parents=True)
    script.write_text('#!/bin/bash\n.venv/bin/python demo "$RUN"\n')
    script.chmod(0o755)
    export = ["../../eval/export.py", "2b", "--recipes", "../../recipes", "--report", "../../eval/reports/demo.json"]
    assert make(project, "demo", "export", "STAGE=2b", "-j2") == [["demo", "demo"], export]
    assert make(project, "export", "STAGE=2b", "RUN=demo") == [export]
    assert make(project, "push", "REPO=you/name", "RUN=demo3") == [["../../eval/push.py", "2c", "you/name"]]
    assert make(project, "merge")[0][:3] == ["eval/export.py", "2c", "--recipes"]


def test_clean_demo_keeps_what_a_user_kept(project: Path) -> None:
    kept = [project / "demo/run/outputs" / name for name in ("kept.jsonl", "continuation/suite.txt")]
    made = [project / "demo/run" / name for name in ("models/base/x", "outputs/2a/checkpoint-8/x", "data/2a.jsonl")]
    for path in kept + made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    make(project, "clean-demo")
    assert sorted(path for path in (project / "demo/run").rglob("*") if path.is_file()) == sorted(kept)
    for path in kept:
        path.unlink()
    make(project, "clean-demo")
    make(project, "clean-demo")  # also where there is nothing
    assert not (project / "demo/run").exists()
