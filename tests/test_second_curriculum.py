"""The second curriculum once, small: real Axolotl, real 4-bit, the shipped recipes, on a tiny Llama that is a chat model."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from small_library import rows
from tiny_curriculum import call_script as call
from tiny_curriculum import run_script as python
from tiny_curriculum import save_chat_base
from transformers import AutoTokenizer

from eval.questions import has, language
from prep.instructions import Preparation
from prep.rows import Row
from train.stage import as_arguments, load_profile

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"


def said(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model, collected; ninety of the demo's articles and conversations, and some that must not be trained on."""
    cwd = tmp_path_factory.mktemp("second")
    save_chat_base(cwd / "tiny")
    call(ROOT / "prep/collect.py", "base", "--source", "tiny", "--out", "models/instruct", cwd=cwd)
    for name in ("articles", "instructions"):
        write(cwd / f"{name}.jsonl", rows(ROOT / f"demo/corpus/{name}.jsonl")[:90])
    return cwd


def prepare(cwd: Path, source: Path | str, out: str, *more: str) -> str:
    words = ["--source", source, "--tokenizer", "models/instruct", "--out", out, *more]
    return call(ROOT / "prep/instructions.py", *words, cwd=cwd)


def test_what_is_not_trained_on_is_counted(place: Path) -> None:
    good = said("Quelle est la couleur du ciel ?", "Bleu, quand il n'y a pas de nuages au-dessus de la ville.")
    bad: list[dict[str, Any]] = [
        said("Et la mer ?", "  "),
        said("Et la nuit ?", "Désolé, je ne peux pas répondre à cette question."),
        said("Et le mur ?", "</s>"),
        said("Et la forêt ?", "Verte. " * 2000),
        {"conversations": good["conversations"][:1]},
        {"conversations": good["conversations"][::-1]},
        {"conversations": [{"from": "bard", "value": "Oyez !"}, *good["conversations"]]},
        said("Dis-moi : quelle est la couleur du ciel ?", good["conversations"][1]["value"]),
        {"title": "Une balise", "text": "La fin d'un texte s'écrit </s> dans ce modèle."},
    ]
    printed = prepare(place, write(place / "bad.jsonl", [good, *bad]), "bad/rows.jsonl", "--holdout", "0")
    assert rows(place / "bad/rows.jsonl")[0]["conversations"] == good["conversations"]
    manifest = json.loads((place / "bad/rows.manifest.json").read_text())
    assert manifest["train"]["rows"] == 1 and manifest["documents"]["rejected"] == {
        "empty turn": 1, "refusal": 1, "special token in text": 2, "longer than the window": 1, "fewer than two turns": 1,
        "turns out of order": 1, "role that is neither human, gpt nor system": 1, "near-duplicate": 1,
    }  # fmt: skip
    assert "1 refusal" in printed


def test_what_the_chat_template_refuses_is_counted(place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "models/instruct")
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    tokenizer.chat_template = strict + tokenizer.chat_template
    good = said("Quelle est la couleur du ciel ?", "Bleu, quand il n'y a pas de nuages.")
    ordered = {"conversations": [{"from": "system", "value": "Sois bref."}, *good["conversations"]]}
    preparation = Preparation(tokenizer, 2048, "{text}", [])
    assert preparation.row(ordered, 1, "train") == "refused by the chat template"
    assert isinstance(preparation.row(good, 1, "train"), Row)


def test_held_out_by_title_and_by_first_question(place: Path) -> None:
    article = {"title": "Le sel", "text": "Le sel se tire de la mer ou de la mine. On le met dans la soupe."}
    others = [{"title": f"Ville {n}", "text": f"La ville {n} a {n * n} habitants et {n + 7} ponts."} for n in range(40)]
    source = write(place / "some.jsonl", [article, *others, {**article, "text": "Une autre histoire du même sel."}])
    prepare(place, source, "some/rows.jsonl", "--holdout", "0.3", "--template", "Titre : {title}\\nTexte : {text}")
    train, held = rows(place / "some/rows.jsonl"), rows(place / "some/rows.heldout.jsonl")
    assert len(train) + len(held) == 42 and 5 < len(held) < 22
    assert not {row["title"] for row in train} & {row["title"] for row in held}
    assert any(row["text"] == f"Titre : Le sel\nTexte : {article['text']}" for row in train + held)


def test_records_without_title_question_and_id_are_each_their_own(place: Path) -> None:
    """Also where others of the file have them: Datasets then gives null."""
    texts = [f"La ville {n} a {n * n} habitants et {n + 7} ponts." for n in range(40)]
    records: list[dict] = [{"title": " ", "text": texts[0], "id": "a"}, *({"text": text} for text in texts[1:])]
    source = write(place / "bare.jsonl", records)
    prepare(place, source, "bare/rows.jsonl", "--holdout", "0.3")
    train, held = rows(place / "bare/rows.jsonl"), rows(place / "bare/rows.heldout.jsonl")
    assert len(train) + len(held) == 40 and 5 < len(held) < 22
    assert {row["source"] for row in train + held} == {"a", *map(str, range(2, 41))}


def test_the_files_of_a_folder_are_recorded(place: Path) -> None:
    (place / "folder").mkdir()
    for name in ("a", "b"):
        write(place / f"folder/{name}.jsonl", [{"title": f"{name}{n}", "text": f"{n} fois {name}"} for n in range(20)])
    prepare(place, "folder", "of_folder/rows.jsonl")
    source = json.loads((place / "of_folder/rows.manifest.json").read_text())["source"]
    assert source["path"] == "folder" and source["repo"] is None
    assert [file["name"] for file in source["files"]] == ["a.jsonl", "b.jsonl"]


@pytest.mark.slow
def test_the_three_stages(place: Path) -> None:
    """The gate is asked after each; the copies of the embeddings move in 3a and not in 3b; 3c has none."""
    prepare(place, "articles.jsonl", "data/3a.jsonl", "--holdout", "0.02")
    prepare(place, "instructions.jsonl", "data/3b.jsonl", "--holdout", "0.02")
    for name in ("3a", "3b", "3c"):
        plugins = [*load_profile("smoke", name)[1]["plugins"], "smoke_plugins.KeepRows"]
        more = ["--profile", "smoke", "--", *as_arguments({"plugins": plugins})]
        printed = python(ROOT / "train/stage.py", name, "--recipes", RECIPES, *more, cwd=place)
        assert f"{name}: trained, 4 of 4 steps" in printed
    before, after, alone = (
        load_file(place / f"outputs/{name}/adapter_model.safetensors") for name in ("3a", "3b", "3c")
    )
    copies = {name for name in before if "lora_" not in name}
    assert before.keys() == after.keys() and len(copies) == 2 and not copies & alone.keys()
    assert all(torch.equal(before[name], after[name]) == (name in copies) for name in before)
    started = load_file(place / "outputs/3a/start/adapter_model.safetensors")
    assert not any(torch.equal(started[name], before[name]) for name in copies)

    # The loss is on the answer and its end alone, in the base's own template.
    tokenizer = AutoTokenizer.from_pretrained(place / "models/instruct")
    turns = rows(place / "data/3b.heldout.jsonl")[0]["conversations"]
    caches = [datasets.load_from_disk(path.parent) for path in (place / "rows/3b").glob("*/state.json")]
    held = min(caches, key=len)
    question, answer = turns[0]["value"], turns[1]["value"]
    row = next(row for row in held if answer in tokenizer.decode(row["input_ids"]))
    asked = tokenizer(f"user: {question}\nassistant:", add_special_tokens=False).input_ids
    answered = tokenizer(f"user: {question}\nassistant: {answer}</s>", add_special_tokens=False).input_ids
    assert row["input_ids"] == answered and answered[: len(asked)] == asked and answered[-1] == tokenizer.eos_token_id
    assert row["labels"] == [-100] * len(asked) + answered[len(asked) :]
    # An article ends in EOS, and is learned from its first token.
    caches = [datasets.load_from_disk(path.parent) for path in (place / "rows/3a").glob("*/state.json")]
    article = min(caches, key=len)[0]
    text = rows(place / "data/3a.heldout.jsonl")[0]["text"]
    assert article["input_ids"] == article["labels"] == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    saved, own = (place / folder / "chat_template.jinja" for folder in ("outputs/3b", "models/instruct"))
    assert saved.read_text() == own.read_text()

    options = ["--recipes", RECIPES, "--curriculum", "3", "--run", "second", "--out", "reports", "--limit", "1"]
    options += ["--tasks", "articles_heldout", "conversations_heldout", "--prompts", ROOT / "demo/corpus/questions.yml"]
    call(ROOT / "eval/evaluation.py", *options, "--max-new-tokens", "4", cwd=place)
    report = json.loads((place / "reports/second.json").read_text())
    names = ["base", "base (nf4)", "3a (start)", "3a", "3b", "3b (merged)", "3c (start)", "3c", "3c (merged)"]
    assert list(report["stages"]) == names and "3b - 3c" in report["differences"]
    bits = {name: stage["scores"]["articles_heldout"]["bits_per_byte"] for name, stage in report["stages"].items()}
    assert abs(bits["3b (merged)"] - bits["3b"]) < 0.001
    assert len(report["stages"]["3b"]["answers"]) == 24 and "answers" not in report["stages"]["3b (merged)"]
    page = (place / "reports/second.md").read_text()
    assert "repeats the template" in page and "Combien font 56 et 27" in page

    python(ROOT / "eval/export.py", "3b", "--recipes", RECIPES, "--report", "reports/second.json", cwd=place)
    exported = place / "outputs/export/3b"
    assert GGUFReader(exported / "3b-Q4_K_M.gguf").fields["tokenizer.chat_template"].contents() == own.read_text()
    assert "TEMPLATE" not in (exported / "Modelfile").read_text()  # Ollama takes the GGUF's


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Il en reste 16.", "16", True), ("Il en reste 160.", "16", False), ("Elle vaut 3,16.", "16", False),
        ("C’est ROME.", "Rome", True), ("Antoine de Saint-Exupery", "Saint-Exupéry", True), ("la tablette", "table", False),
    ],
)  # fmt: skip
def test_an_answer_is_right_by_its_words(text: str, answer: str, right: bool) -> None:
    assert has(text, answer) is right


def test_the_language_of_a_short_answer_is_not_guessed() -> None:
    assert language("La capitale de l’Italie est Rome.") == "fr" and language("83") is None
