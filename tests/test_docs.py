"""The commands, options, links and paths in README, CONTRIBUTING and the folders' READMEs exist."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")])
# Made by a run, or yet to be made by the reader.
PRODUCED = ("bench/run", "models/", "data/", "outputs/", "demo/run", ".venv", "eval/reports/", "recipes/5")


@cache
def targets() -> set[str]:
    """What make lists."""
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"make (\S+)", shown))


def commands(text: str) -> list[list[str]]:
    """The words of every make and python command in shell blocks, indented blocks and inline code."""
    text = text.replace("\\\n", " ")
    kinds = (r"```sh\n(.*?)```", r"^((?:    [^\n]*\n)+)", r"`([^`\n]+)`")
    blocks = [block for kind in kinds for block in re.findall(kind, text, re.S | re.M)]
    found = []
    for line in "\n".join(blocks).split("\n"):
        for part in re.split(r"&&|;", re.sub(r"\s+#.*", "", line)):
            if re.search(r"(^|\s)(make|python \S+\.py)\b", part):
                words = shlex.split(part.replace("`", ""))
                words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]
                if words[0] in ("make", "python"):
                    found.append(words)
    return found


def fault(words: list[str]) -> str | None:
    """What a command names that is not there."""
    if words[0] == "make":
        goals = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
        return ", ".join(sorted(goals - targets())) or None
    if not words[1].endswith(".py"):
        return None
    script = words[1].removeprefix("../../")
    if not (ROOT / script).exists():
        return script
    own = words[: words.index("--")] if "--" in words else words
    flags = [word.partition("=")[0] for word in own if re.match(r"--[a-z]", word)]
    source = (ROOT / script).read_text()
    if "models.parse(" in source:  # the options that several scripts share
        source += (ROOT / "eval/models.py").read_text()
    return ", ".join(flag for flag in flags if f'"{flag}"' not in source) or None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path: Path) -> None:
    assert not [(words, fault(words)) for words in commands(path.read_text()) if fault(words)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(path: Path) -> None:
    text = path.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    names = [
        name for name in re.findall(r"`([\w./-]+/[\w.-]+)`", text) if not name.startswith(PRODUCED) and "X" not in name
    ]
    hub = re.compile(r"(Almarch|TinyLlama|PleIAs|biglam)/")
    packages = [Path(folder) for folder in sys.path]
    assert not [link for link in links if not (path.parent / link).exists()]
    places = [ROOT, path.parent, *packages]
    assert not [name for name in names if not hub.match(name) and not any((place / name).exists() for place in places)]


def test_no_lock_names_a_private_index() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert not re.search(r"--(extra-)?index-url|--find-links|file:|https?://", text), path.name
        requirements = [block for block in re.split(r"\n(?=\S)", text) if not block.startswith("#")]
        assert all("==" in block.splitlines()[0] and "--hash" in block for block in requirements), path.name
