"""Damaged files, wrong paths, settings that cannot be: one line that says what and where, a status that is not 0, no traceback.

A new case is a row: the script and its arguments, what is done to a small curriculum before, and words of the message.
"""

import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
EVALUATE = "eval/evaluation.py --run x --samples 1 --max-new-tokens 4 --limit 1 --device cpu"
GALLICA = "prep/gallica.py --tokenizer models/base --sequence-len 64 --windows all --out data/new.jsonl --source"
CASTLE = "prep/castle.py --tokenizer models/base --sequence-len 64 --stride 16 --out data/new.jsonl --book"
GATE, START = "train.plugins.Gate", "train.adapter_start.StartAdapter"
ADAPTER = {"bf16": True, "lora_r": 4, "lora_alpha": 4, "lora_target_modules": ["up"], "sequence_len": None}  # blank
INSTRUCTIONS = "prep/instructions.py --tokenizer models/base --out data/new.jsonl --source given.jsonl"
OTHER_BOOK = '{"files": [{"name": "2c.txt", "bytes": 1, "sha256": "0"}]}'
LATIN = "caf\udce9.txt"  # as Python reads the Latin-1 name of a file
CONTINUE = "eval/continuation.py --words 5 --device cpu"
PAIRS = "prep/pairs.py --prompt-words 12 --words 8 --device cpu"
PAIRS_BEGUN = {"2c.manifest.json": '{"tokenizer": {}}', "2d.part.json": "{"}


def nothing() -> None:
    """The arguments are what is wrong."""


def write(path: str, content: str | bytes) -> Callable[[], object]:
    def damage() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def gone(path: str) -> Callable[[], object]:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def cut(path: str) -> Callable[[], object]:
    return lambda: os.truncate(path, os.path.getsize(path) // 2)


def setting(path: str, **changes: object) -> Callable[[], object]:
    """Other values in a JSON or YAML file, which becomes JSON: that is YAML too."""
    return lambda: Path(path).write_text(json.dumps(yaml.safe_load(Path(path).read_text()) | changes))


SERVER = socket.create_server(("127.0.0.1", 0))
PORT = SERVER.getsockname()[1]  # is taken
CASES: list[tuple[str, Callable[[], object], str]] = [
    # recipes
    ("train/stage.py 9z", nothing, "no recipe 9z.yml; there are: 2a, 2b, 2c"),
    ("train/stage.py 2a --recipes nowhere", nothing, "no recipe"),
    ("train/stage.py 2a --profile moon", nothing, "no profile moon"),
    ("train/stage.py 2a", write("recipes/2a.yml", b"base_model: \xff\xfe"), "2a.yml is not valid YAML"),
    ("train/stage.py 2a", write("recipes/2a.yml", "base_model: [1, 2"), "2a.yml is not valid YAML"),
    ("train/stage.py 2a", write("recipes/2a.yml", "- a\n- b\n"), "2a.yml is not a recipe"),
    ("train/stage.py 2a", write("recipes/2a.yml", "output_dir: x\n"), "2a.yml has no base_model, datasets"),
    ("train/stage.py 2a", setting("recipes/2a.yml", datasets="data/2a.jsonl"), "datasets must be a list"),
    ("train/stage.py 2a", setting("recipes/2a.yml", datasets=[{"path": None}]), "datasets must be a list"),
    ("train/stage.py 2a", setting("recipes/2a.yml", output_dir=["outputs/2a"]), "output_dir must be the path"),
    ("train/stage.py 2a", setting("recipes/2b.yml", output_dir="outputs/2a"), "already that of recipe 2a"),
    ("train/stage.py 2a", setting("recipes/2a.yml", base_model="outputs/2c"), "in a circle"),
    ("train/stage.py 2a", nothing, "must list train.plugins.Gate"),
    ("train/stage.py 2a -- --plugins=[]", setting("recipes/2a.yml", plugins=[GATE]), "must list train.plugins.Gate"),
    ("train/stage.py 2a --profile cpu", setting("recipes/2a.yml", plugins=[START, GATE]), f"2a must list {START}"),
    (f"{EVALUATE} --curriculum /", nothing, "no recipe (/*.yml)"),
    # data and inputs of a stage
    ("train/gate.py", gone("outputs"), "no stage has been trained here"),
    ("train/gate.py 2a", nothing, "outputs/2a holds no checkpoint"),
    ("train/gate.py 2a", write("outputs/2a/trained.json", "{"), "models/base/source.json is missing"),
    ("train/gate.py 2a", write("outputs/2a/checkpoint-4/trainer_state.json", "{}"), "trainer_state.json is damaged"),
    ("train/gate.py 2a", gone("outputs/2a/model.safetensors"), "holds no"),
    # the planner
    ("train/memory.py recipes/9z.yml", nothing, "9z.yml"),
    ("train/memory.py recipes/2b.yml", setting("recipes/2b.yml", **ADAPTER), "2b.yml: Target modules {'up'} not found"),
    ("train/memory.py recipes/2a.yml", setting("recipes/2a.yml", lora_r="8"), "2a.yml: lora_r must be a whole number"),
    ("train/memory.py --base nowhere", nothing, "nowhere"),
    ("train/memory.py --base models/base", write("models/base/config.json", "{"), "config.json"),
    ("train/memory.py --base models/base", setting("models/base/config.json", model_type="gpt2"), "knows Llama's kind"),
    # collecting
    ("prep/collect.py base --source nowhere", nothing, "nowhere"),
    ("prep/collect.py base --out new --source given", write("given/model.safetensors", "x"), "given"),
    ("prep/collect.py base --out new --source given.gguf", write("given.gguf", "GGUF but not one"), "given.gguf"),
    ("prep/collect.py gallica --files 0", nothing, "at least 1"),
    ("prep/collect.py gallica --source nowhere", nothing, "nowhere"),
    ("prep/collect.py gallica --source given", lambda: Path("given").mkdir(), "given"),
    ("prep/collect.py gallica --source given", write("given/a.parquet", "PAR1 but no more"), "a.parquet"),
    ("prep/collect.py book --source nowhere.pdf", nothing, "nowhere.pdf"),
    ("prep/collect.py book --source given.epub", write("given.epub", b"PK\x03\x04 but no more"), "a damaged zip"),
    ("prep/collect.py book --source given.png", write("given.png", b"\x89PNG\r\n\x1a\n" + bytes(99)), "is a picture"),
    ("prep/collect.py book --source given.txt", write("given.txt", ""), "given.txt"),
    (f"prep/collect.py book --source {LATIN}", write(LATIN, "Il neigeait."), "name is not UTF-8"),
    # preparing
    (f"{GALLICA} nowhere", nothing, "no file of books in nowhere"),
    (f"{GALLICA} given", lambda: Path("given").mkdir(), "given"),
    (f"{GALLICA} given", write("given/a.parquet", "PAR1 but no more"), "a.parquet"),
    (f"{GALLICA} given", write("given/a.jsonl", '{"text": "Il neig'), "a.jsonl"),
    (f"{GALLICA} given", write("given/a.jsonl", '{"id": "a", "text": "\\ud83d"}\n'), "a.jsonl, line 1 is not"),
    (f"{GALLICA} given", write(f"given/{LATIN}", "Il neigeait."), "name is not UTF-8"),
    (f"{GALLICA} given --tokenizer nowhere", write("given/a.txt", "Il neigeait."), "nowhere"),
    (f"{GALLICA} given --executor ray", write("given/a.txt", "Il neigeait."), "ray is not installed"),
    (f"{GALLICA} given --windows 0", nothing, "at least 1"),
    (f"{GALLICA} given --windows many", nothing, "not a whole number"),
    (f"{GALLICA} given --holdout 0.9", nothing, "between 0 and 0.5"),
    (f"{GALLICA} given --split 3/2", nothing, "invalid split"),
    (f"{GALLICA} given --out 2a.json", write("given/a.txt", "Il neigeait."), "must end in .jsonl"),
    (f"{GALLICA} given --sequence-len 8", write("given/a.txt", "Il neigeait."), "too short"),
    (f"{GALLICA} given --out given/a.jsonl", write("given/a.jsonl", "{}\n"), "given/a.jsonl would be overwritten"),
    (f"{GALLICA} given --against nowhere.txt", write("given/a.txt", "Il neigeait."), "nowhere.txt is no UTF-8 text"),
    (f"{CASTLE} nowhere.txt", nothing, "no such book"),
    (f"{CASTLE} given.txt", write("given.txt", " \r\n\n"), "given.txt is empty"),
    (f"{CASTLE} given.txt", write("given.txt", "Il neigeait."), "too few"),
    (f"{CASTLE} given.txt", write("given.txt", random.Random(1).randbytes(5000)), "convert it to UTF-8"),
    (f"{CASTLE} {LATIN}", write(LATIN, "Il neigeait. " * 99), "name is not UTF-8"),
    (f"{CASTLE} given.pdf", write("given.pdf", b"%PDF-1.7\n%cut off here"), "cannot be read as a PDF"),
    (f"{CASTLE} given.docx", write("given.docx", b"PK\x03\x04 but no more"), "given.docx"),
    (f"{CASTLE} data/2c.txt", write("data/source.json", OTHER_BOOK), "not the file"),
    (f"{CASTLE} data/2c.txt", write("data/source.json", '{"files": 1}'), "source.json is damaged"),
    (f"{CASTLE} data/2c.txt --stride 50", nothing, "must divide"),
    (f"{CASTLE} data/2c.txt --holdout 0.9", nothing, "0.9 is not a share between 0 and 0.5"),
    (f"{CASTLE} data/2c.txt --out data/new.txt", nothing, "data/new.txt must end in .jsonl"),
    (f"{CASTLE} data/2c.txt --tokenizer nowhere", nothing, "no tokenizer.json"),
    (f"{CASTLE} data/2c.txt", write("models/base/tokenizer.json", "{"), "models/base"),
    (f"{CASTLE} data/2c.txt --out data/2c.jsonl", nothing, "data/2c.txt would be overwritten"),
    ("prep/pairs.py --out data/2c.jsonl", nothing, "data/2c.jsonl would be overwritten"),
    (f"{INSTRUCTIONS} --out ./given.jsonl", nothing, "given.jsonl would be overwritten"),
    (INSTRUCTIONS, write("given.jsonl", '{"conversations": []}\n'), "models/base has no chat template"),
    (f"{INSTRUCTIONS} --refusal '('", nothing, "no regular expression"),
    (INSTRUCTIONS, write("given.jsonl", '{"title": "Le sel", "te'), "given.jsonl is no readable file"),
    (INSTRUCTIONS, write("given.jsonl", '{"title": "", "text": ""}\n'), "1 empty article"),
    (f"{PAIRS} --words 90000", nothing, "no row of data/2c.jsonl has 90012 words: lower"),
    (PAIRS, gone("outputs/2c/adapter_model.safetensors"), "stage 2c is missing"),
    (PAIRS, write("data/2c.jsonl", '{"text": "Il'), "data/2c.jsonl, line 1: not whole JSON"),
    (PAIRS, nothing, "2c.manifest.json is missing; prepare the novel again"),
    (PAIRS, lambda: [write(f"data/{name}", made)() for name, made in PAIRS_BEGUN.items()], "remove data/2d.part.json"),
    # evaluating
    (f"{EVALUATE} --run ../x", nothing, "'../x' is a path; give a name"),
    (f"{EVALUATE} --recipes nowhere", nothing, "no recipe"),
    (f"{EVALUATE} --stages 9z", nothing, "no stage 9z"),
    (f"{EVALUATE} --device cuda", nothing, "finds no CUDA device"),
    (f"{EVALUATE} --seed {2**64}", nothing, "--seed must be"),
    (f"{EVALUATE} --prompts nowhere.yml", nothing, "nowhere.yml"),
    (f"{EVALUATE} --prompts given.yml", write("given.yml", "text: Il neigeait."), "given.yml"),
    (f"{EVALUATE} --prompts given.yml", write("given.yml", b"\xff\xfe"), "given.yml"),
    (
        f"{EVALUATE} --prompts given.yml",
        write("given.yml", "[{name: x, tail_of: outputs/2a/model.safetensors, words: 5}]"),
        "model.safetensors is not UTF-8",
    ),
    (f"{EVALUATE} --tasks moon", nothing, "no task moon: neither ours"),
    (f"{EVALUATE} --tasks given.yaml", write("given.yaml", "task: x\ndataset_path: y"), "given.yaml cannot be loaded"),
    (f"{EVALUATE} --stages 2c", gone("outputs/2b"), "stage 2b is missing"),
    (EVALUATE, gone("data/2b.heldout.jsonl"), "2b.heldout.jsonl"),
    (EVALUATE, write("data/2b.heldout.jsonl", '{"text": "Il neig'), "2b.heldout.jsonl"),
    (f"{EVALUATE} --stages 2c", cut("outputs/2c/adapter_model.safetensors"), "outputs/2c"),
    (f"{EVALUATE} --stages 2a", cut("outputs/2a/model.safetensors"), "outputs/2a"),
    (f"{EVALUATE} --stages 2a", write("outputs/2a/config.json", "{"), "outputs/2a"),
    (
        f"{EVALUATE} --stages 2b",
        setting("outputs/2b/adapter_config.json", base_model_name_or_path="elsewhere"),
        "was trained on elsewhere",
    ),
    (EVALUATE, write("outputs/2b/trained.json", "[]"), "trained.json is damaged"),
    (EVALUATE, write("models/base/tokenizer.json", "{"), "tokenizer of models/base"),
    ("eval/report.py nowhere.json", nothing, "nowhere.json"),
    ("eval/report.py given.json", write("given.json", "{"), "given.json"),
    ("eval/report.py given.json", write("given.json", '{"format": 1}'), "given.json"),
    ("eval/reading.py --run x --pairs 5", nothing, "--pairs must be at least 10"),
    ("eval/compare.py full other", nothing, "full.json is missing"),
    # continuing and exporting
    (f"{CONTINUE} --stage 9z", nothing, "9z"),
    (CONTINUE, gone("data/2c.txt"), "make prep-c"),
    (f"{CONTINUE} --from nowhere.txt", nothing, "nowhere.txt is missing"),
    (f"{CONTINUE} --from '{'été' * 60}.txt", nothing, "is missing"),
    (f"{CONTINUE} --from empty.txt", write("empty.txt", " \n"), "empty.txt is empty"),
    (f"{CONTINUE} --from latin.txt", write("latin.txt", b"\xe9t\xe9"), "latin.txt is not UTF-8"),
    (f"{CONTINUE} --window 100 --chunk-tokens 90", nothing, "does not do"),
    (f"{CONTINUE} --window 9000", nothing, "8192 positions"),
    (f"{CONTINUE} --window 160 --chunk-tokens 24 --keep 500", nothing, "lower --keep"),
    (CONTINUE, write("data/2c.txt", b"\xff\xfe\xff"), "2c.txt"),
    (f"{CONTINUE} --from Klamm", write("data/2c.txt", b"\xff\xfe\xff"), "2c.txt is not UTF-8"),
    (f"{CONTINUE} --from \udce9t\udce9", nothing, "--from is not UTF-8"),
    (f"{CONTINUE} --stage nowhere.gguf", nothing, "nowhere.gguf is missing"),
    (f"{CONTINUE} --stage given.gguf", write("given.gguf", "GGUF but no more"), "the tokenizer of given.gguf"),
    ("eval/export.py 9z", nothing, "no recipe 9z.yml"),
    ("eval/export.py 2c", nothing, "holds no checkpoint"),
    ("eval/push.py 2c nobody", nothing, "'nobody' is no repository"),
    ("eval/push.py 2c you/name", nothing, "outputs/export/2c is no finished export"),
    ("eval/serve.py --dir nowhere", nothing, "nowhere"),
    ("eval/serve.py --port 70000", nothing, "between 1 and 65535"),
    (f"eval/serve.py --port {PORT}", nothing, f"choose another port: make notebook PORT={PORT + 1}"),
]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str, str], None]:
    """Runs a script to its refusal."""

    def run(command: str, message: str) -> None:
        script, *arguments = command.split()
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
        monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        said = capsys.readouterr().err.strip().splitlines()
        last = stop.value.code if isinstance(stop.value.code, str) else said[-1]
        assert stop.value.code != 0 and message in last and "\n" not in last.strip(), last
        assert "Traceback" not in "\n".join(said)

    return run


@pytest.mark.parametrize(("command", "damage", "message"), CASES, ids=[f"{n} {c[0]}" for n, c in enumerate(CASES)])
def test_bad_input(place: Path, refused: Callable, command: str, damage: Callable, message: str) -> None:
    before = {path for path in place.rglob("*") if path.is_file()}
    damage()
    refused(command, message)
    left = {path for path in place.rglob("*") if path.is_file()} - before
    assert not [path for path in left if path.parent.name in ("outputs", "data") and path.suffix in (".jsonl", ".txt")]


@pytest.mark.parametrize(
    ("command", "target"),
    [
        ("prep/collect.py book --source data/2c.txt", "data/raw/book"),
        ("eval/export.py 2c", "outputs/export/2c"),
        (EVALUATE, "eval/reports/x.json"),
    ],
)
def test_the_same_command_twice_at_once(
    place: Path, refused: Callable, locked: Callable[..., Any], command: str, target: str
) -> None:
    with locked(target) as other:
        refused(command, f"process {other} is writing {target}")


INTERRUPT = """
import os, signal, sys
class Finder:
    @staticmethod
    def find_spec(*module):
        if hasattr(sys.modules.get("prep.command"), "run"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


SCRIPTS = [path.relative_to(ROOT) for path in ROOT.glob("*/*.py") if "\n    run(" in path.read_text()]
LIGHT = ["push.py"]  # imports no more before `run`


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.name not in LIGHT], ids=str)
def test_ctrl_c_while_python_imports(script: Path, tmp_path: Path) -> None:
    """At the first import after that of prep/command.py."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & makes it ignored
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGINT and not done.stderr, done.stderr
