"""What the documents say is there: commands, flags, targets, paths, figures; and no word or path that should not be."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from eval import readme
from prep.common import BadInput

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *(
        path
        for folder in ("recipes", "prep", "eval", "train", "demo", "docker", "bench")
        for path in sorted((ROOT / folder).glob("README.md"))
    ),
]
PRODUCED = (
    "bench/reports/",
    "bench/run",
    "models/",
    "data/",
    "outputs/",
    "demo/run",
    ".venv",
    "eval/reports/",
    "recipes/3",
)  # or yet to be made


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def targets() -> set[str]:
    """What make can make."""
    return set(re.findall(r"^([a-z][a-z-]*)(?::| .*:)", (ROOT / "Makefile").read_text(), re.M)) | {"stage-b", "stage-c"}


@cache
def help_of(script: str, *words: str) -> str:
    return subprocess.run(
        [sys.executable, ROOT / script, *words, "--help"], capture_output=True, text=True, check=True
    ).stdout


def commands(text: str) -> list[str]:
    """Lines of shell blocks and indented blocks, and inline code, that call make or one of our scripts."""
    text = text.replace("\\\n", " ")
    blocks = (
        re.findall(r"```sh\n(.*?)```", text, re.S)
        + re.findall(r"^(?:    .*\n)+", text, re.M)
        + re.findall(r"`([^`\n]+)`", text)
    )
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.split("\n")]
    return [line for line in lines if re.search(r"(^|&& |\s)(make|python \S+\.py)\b", line)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_commands_exist(path: Path) -> None:
    for line in commands(path.read_text()):
        for part in re.split(r"&&|;", line):
            words = shlex.split(part.replace("`", ""))
            while words and "=" in words[0]:
                words.pop(0)
            if words[:1] == ["make"]:
                goals = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
                assert set(goals) <= targets(), f"{path.name}: {line}"
            if words[:1] == ["python"] and words[1].endswith(".py"):
                script = words[1].removeprefix("../../")
                assert (ROOT / script).exists(), f"{path.name}: {line}"
                sub = [words[2]] if script == "prep/collect.py" and len(words) > 2 else []
                for flag in (word for word in words[2:] if re.fullmatch(r"--[a-z-]+", word)):
                    assert flag in help_of(script, *sub), f"{path.name}: {line}: {flag}"


def test_a_wrong_command_would_be_found() -> None:
    assert "stage-z" not in targets()
    assert {"demo", "test", "setup", "stage-a", "prep-c", "data", "eval"} <= targets()
    assert commands("```sh\nmake demo # all\n```") == ["make demo"]
    assert "--no-such-flag" not in help_of("prep/castle.py")


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_paths_exist(path: Path) -> None:
    text = path.read_text()
    linked = [path.parent / link.split("#")[0] for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = [
        name for name in re.findall(r"`([\w./-]+/[\w.-]+)`", text) if not name.startswith(PRODUCED) and "X" not in name
    ]
    for target in linked:
        assert target.exists(), f"{path.name} links {target}"
    for name in named:
        folders = (ROOT, path.parent)
        known = re.fullmatch(r"(TinyLlama|PleIAs|biglam)/\S+", name) or any(
            (folder / name).exists() for folder in folders
        )
        installed = (
            any((Path(folder) / name).exists() for folder in sys.path)
            or (Path(json.__file__).parent.parent / name).exists()
        )
        assert known or installed, f"{path.name} names {name}"


def test_the_figures_are_the_reports() -> None:
    """README's and the recipes' figures come from the committed report, to the digit, and name its machine."""
    for path, expected in readme.pages().items():
        assert path.read_text() == expected, f"{path.name} is not what the report says: make readme"
    report = json.loads((ROOT / "eval/reports/demo.json").read_text())
    bits = f"{report['stages']['2c merged']['scores']['novel_heldout']['bits_per_byte']:.3f}"
    assert bits in (ROOT / "README.md").read_text() and report["environment"]["cpu"] in (ROOT / "README.md").read_text()


def test_a_page_without_marks_is_refused() -> None:
    assert readme.filled("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb", "x", "new\n") == (
        "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb"
    )
    with pytest.raises(BadInput, match="no single pair of marks"):
        readme.filled("a page", "x", "new\n")


def test_the_demo_shows_learning() -> None:
    """The committed report: 2a learns the tales, 2c the novella, every stage past its gate."""
    stages = json.loads((ROOT / "eval/reports/demo.json").read_text())["stages"]
    bits = {
        name: {task: score["bits_per_byte"] for task, score in stage["scores"].items()}
        for name, stage in stages.items()
    }
    assert bits["2a"]["gallica_heldout"] < bits["base"]["gallica_heldout"]
    assert bits["2c"]["novel_heldout"] < bits["2b"]["novel_heldout"]


def test_the_corpus_is_as_large_as_promised() -> None:
    tales = sorted((ROOT / "demo/corpus/contes").glob("*.txt"))
    assert len(tales) >= 10 and min(tale.stat().st_size for tale in tales) >= 12_000
    assert (ROOT / "demo/corpus/novella.txt").stat().st_size >= 50_000


def test_every_target_has_a_line_of_help() -> None:
    text = (ROOT / "Makefile").read_text()
    declared = {name for line in re.findall(r"^\.PHONY: (.*)", text, re.M) for name in line.split()}
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert declared == set(re.findall(r"make (\S+)", shown))


def test_no_lock_names_a_private_index() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert not re.search(r"--(extra-)?index-url|--find-links|file:|https?://", text), path.name
        assert all(
            "==" in line and "--hash" in block
            for block in re.split(r"\n(?=\S)", text)
            for line in block.splitlines()[:1]
            if not line.startswith("#")
        )
