"""Evaluation, on tiny models whose scores are known, through the real lm-eval and the real adapters."""

import contextlib
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from small_tokenizers import save_gpt2_like, save_llama_like, tales
from tiny_curriculum import RECIPES, always, call_main, save_adapter, tiny_llama, write_rows
from transformers import AutoTokenizer, LlamaForCausalLM

from eval import evaluation, generation, intervals, logs, metrics, models, report, scoring, verdict
from prep.common import BadInput, sha256
from train.stages import load_chain

DEMO = Path(report.__file__).parent / "reports/demo.json"


def evaluate(*arguments: str) -> dict[str, Any]:
    """Run eval/evaluation.py as from the command line; returns its report."""
    call_main(evaluation, "--run", "tiny", "--max-new-tokens", "8", "--device", "cpu", *arguments)
    return json.loads(Path("eval/reports/tiny.json").read_text(encoding="utf-8"))


def scores_of(model: Any, tokenizer: Any, tasks: list[str]) -> dict[str, dict[str, Any]]:
    return scoring.score(scoring.TokenScorer(model, tokenizer, 2, "test"), scoring.load_tasks(tasks), None)


def novel_bits(model: Any, tokenizer: Any) -> float:
    return scores_of(model, tokenizer, ["novel_heldout"])["novel_heldout"]["bits_per_byte"]


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_llama_like, save_gpt2_like])
def test_a_uniform_model_scores_ln_vocabulary_a_token(place, save):
    """Whatever the window: one text shorter than a window, one longer. Every token once, no BOS charged."""
    tokenizer = AutoTokenizer.from_pretrained(save(place / "other"))
    model = tiny_llama(len(tokenizer), seed=0).eval()
    torch.nn.init.zeros_(model.lm_head.weight)

    result = scores_of(model, tokenizer, ["gallica_heldout"])["gallica_heldout"]

    texts = [json.loads(line)["text"] for line in Path("data/2b.heldout.jsonl").read_text().splitlines()]
    tokens = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert tokens[0] < scoring.MAX_LENGTH < tokens[1]
    for text, count, document in zip(texts, tokens, result["documents"], strict=True):
        assert document["tokens"] == count
        assert document["bytes"] == len(text.encode()) == sum(block["bytes"] for block in document["blocks"])
        assert document["nll"] == pytest.approx(count * math.log(len(tokenizer)), rel=1e-6)
        assert document["nll"] == pytest.approx(sum(block["nll"] for block in document["blocks"]), rel=1e-6)
    size = sum(len(text.encode()) for text in texts)
    assert result["token_perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(sum(tokens) * math.log2(len(tokenizer)) / size, rel=1e-6)


def test_scores_are_those_of_lm_eval_alone(place):
    """The same windows and the same sums as lm-eval's own model gives, on a model that is not uniform."""
    tokenizer = AutoTokenizer.from_pretrained("models/base")
    model = LlamaForCausalLM.from_pretrained("models/base").eval()
    names = ["gallica_heldout", "english", "code"]
    plain = HFLM(pretrained=model, tokenizer=tokenizer, max_length=2048, batch_size=1, add_bos_token=False)
    expected = lm_eval.evaluate(plain, scoring.load_tasks(names), bootstrap_iters=0)["results"]
    result = scores_of(model, tokenizer, names)
    for name in names:
        for metric in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
            assert result[name][metric] == pytest.approx(expected[name][f"{metric},none"], rel=1e-5)


@pytest.fixture
def in_four_bits(place: Path) -> Path:
    """The curriculum with recipes that quantise the base under the adapters. A hidden size of 64: blocks are that long."""
    size = len(AutoTokenizer.from_pretrained("models/base"))
    tiny_llama(size, seed=1, hidden=64).save_pretrained("outputs/2a")
    nf4 = {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"}}
    save_adapter(place / "outputs/2a", place / "outputs/2b/start", "outputs/2a", seed=4)
    for seed, name in ((2, "2b"), (3, "2c")):
        save_adapter(place / "outputs/2a", place / "outputs" / name, "outputs/2a", seed=seed)
        recipe = Path(f"recipes/{name}.yml")
        recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | nf4))
    return place


def test_full_copies_of_the_embeddings_are_scored_and_merged(in_four_bits):
    """Beside an adapter, on a quantised base, tied as in small Llamas: the merged model scores as the adapter does."""
    settings = LlamaForCausalLM.from_pretrained("outputs/2a").config
    settings.tie_word_embeddings = True
    base = LlamaForCausalLM(settings)
    base.save_pretrained("outputs/2a")
    copies: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **copies))
    with torch.no_grad():
        adapted.get_input_embeddings().weight.mul_(1.5)
    adapted.peft_config["default"].base_model_name_or_path = "outputs/2a"
    adapted.save_pretrained("outputs/2b")
    row = next(row for row in models.candidates(load_chain(Path("recipes"))) if row.name == "2b")
    bits = []
    for each in (row, models.merged(row), replace(row, adapter=None)):
        [(_, model, tokenizer)] = models.loaded([each], "cpu", torch.float32)
        bits.append(novel_bits(model, tokenizer))
    assert bits[1] == pytest.approx(bits[0], abs=1e-3) and abs(bits[2] - bits[0]) > 0.1


def test_rows_of_several_curricula(place):
    """In one folder of recipes: each with its base, named as its folder."""
    Path("recipes/3a.yml").write_text(RECIPES["2a"].replace("models/base", "models/other").replace("2a", "3a"))
    rows = models.candidates(load_chain(Path("recipes")))
    assert [(row.name, row.parent) for row in rows] == [
        ("base", None), ("2a", "base"), ("2b", "2a"), ("2c", "2b"), ("other", None), ("3a", "other")
    ]  # fmt: skip
    assert [row.name for row in models.candidates(load_chain(Path("recipes"), "3"))] == ["base", "3a"]


def test_an_adapter_is_evaluated_on_its_base_as_its_recipe_quantises_it(in_four_bits):
    """And the other forms: the model below it quantised alike, and the last adapter merged into the 16-bit base."""
    rows = models.with_forms(models.candidates(load_chain(Path("recipes"))))
    assert [(row.name, row.parent) for row in rows] == [
        ("base", None), ("2a", "base"), ("2a (nf4)", "2a"), ("2b (start)", "2a (nf4)"), ("2b", "2b (start)"), ("2c", "2b"),
        ("2c (merged)", "2c")
    ]  # fmt: skip
    bits, layers = {}, {}
    for row, model, tokenizer in models.loaded(rows, "cpu", torch.float32):
        layers[row.name] = {type(module).__name__ for module in model.modules()}
        bits[row.name] = novel_bits(model, tokenizer)
    quantised = [row for row in rows if row.quantization and row.form != models.MERGED]
    assert {row.name for row in quantised} == {"2a (nf4)", "2b (start)", "2b", "2c"}
    for row in quantised:  # what a CPU unpacks once scores as what it would unpack at every pass
        packed = models.load_model(row.model, tokenizer, "cpu", torch.float32, row.quantization)
        assert "Linear4bit" in {type(module).__name__ for module in packed.modules()}
        whole = models.load_adapter(packed, row, tokenizer) if row.adapter else packed
        assert novel_bits(whole, tokenizer) == pytest.approx(bits[row.name], abs=1e-6)
    assert {name for name, types in layers.items() if "PeftModel" in types} == {"2b (start)", "2b", "2c"}
    assert len(set(bits.values())) == len(rows) and all(0 < value < 12 for value in bits.values())

    # A row's score does not depend on what was scored before it.
    [(_, model, tokenizer)] = models.loaded([row for row in rows if row.name == "2c"], "cpu", torch.float32)
    assert novel_bits(model, tokenizer) == bits["2c"]
    # An adapter is merged into the base that it was trained on, which is not the 16-bit one.
    assert bits["2c (merged)"] == pytest.approx(bits["2c"], abs=1e-4)
    plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("outputs/2a"), "outputs/2c").eval()
    assert abs(novel_bits(plain, tokenizer) - bits["2c"]) > 1e-3

    assert [row.name for row in models.present(rows, ["2b", "2a (nf4)"])] == ["2a (nf4)", "2b"]
    for name in ("2b", "2c"):
        shutil.rmtree(f"outputs/{name}")
    assert [row.name for row in models.present(rows, None)] == ["base", "2a"]


def multiple_choice() -> str:
    """A task of lm-eval's kind with a file of its own: the base model is right once in two questions, by its own choice."""
    tokenizer = AutoTokenizer.from_pretrained("models/base")
    model = LlamaForCausalLM.from_pretrained("models/base").eval()
    rows, choices = [], ["ouverte", "lampe", "neige"]
    for number, question in enumerate(["La porte était", "Il prit la"]):
        losses = []
        for choice in choices:
            ids = tokenizer(f"{question} {choice}", return_tensors="pt").input_ids
            losses.append(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        rows.append({"question": question, "choices": choices, "gold": (losses.index(min(losses)) + number) % 3})
    Path("choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "choice", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "choice.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    Path("choice.yaml").write_text(yaml.safe_dump(task))
    return "choice.yaml"


def test_a_task_that_has_changed_is_measured_again(place):
    settings = ("--tasks", multiple_choice(), "--samples", "1")
    base = evaluate(*settings, "--stages", "base", "2a")["stages"]["base"]
    assert list(base["benchmarks"]) == ["choice, acc"] and base["scores"] == {}
    task = Path("choice.yaml")
    task.write_text(task.read_text().replace("metric: acc", "metric: acc_norm"))
    with pytest.raises(BadInput, match="has other arguments, and 2a would be lost"):
        evaluate(*settings, "--stages", "base")
    again = evaluate(*settings)["stages"]
    assert [list(again[name]["benchmarks"]) for name in ("base", "2a")] == [["choice, acc_norm"]] * 2
    Path("eval/reports/tiny.json").write_text("{")
    with pytest.raises(BadInput, match="--stages would lose its other rows"):
        evaluate(*settings, "--stages", "base")


def test_the_report_prices_quantising_and_merging(in_four_bits, capsys, monkeypatch):
    settings = ("--tasks", "gallica_heldout", "novel_heldout", multiple_choice(), "--samples", "1", "--limit", "2")
    load_model = models.load_model
    loaded: list[weakref.ref[Any]] = []
    beside: list[int] = []

    def load(*arguments):
        beside.append(sum(model() is not None for model in loaded))
        model = load_model(*arguments)
        loaded.append(weakref.ref(model))
        return model

    with monkeypatch.context() as patch:
        patch.setattr(models, "load_model", load)
        result = evaluate(*settings)
    assert beside == [0] * 7 + [1]  # one row's weights at a time; the merged row's base is quantised, and in 16 bits
    assert result["stages"]["base"]["benchmarks"] == {"choice, acc": {"value": 0.5, "stderr": 0.5}}
    assert "benchmarks" not in result["stages"]["2c (merged)"] and list(result["tasks"]) == list(settings[1:3])
    bits = {name: stage["scores"]["novel_heldout"]["bits_per_byte"] for name, stage in result["stages"].items()}
    for name, against in (("2a (nf4)", "2a"), ("2b", "2b (start)"), ("2c (merged)", "2c")):
        change = result["differences"][name]
        assert change["against"] == against
        assert change["scores"]["novel_heldout"]["bits_per_byte"] == pytest.approx(bits[name] - bits[against], abs=1e-6)
    for name in ("2a (nf4)", "2c (merged)"):
        stage = result["stages"][name]
        assert (stage["samples"], stage["degeneration"], stage["gate"], stage["training"]) == ([], None, None, None)
    lines = verdict.lines(result)
    assert lines["2a (nf4)"].startswith("the weights of 2a in another form: gallica_heldout ")
    assert "against 2b (start)" in lines["2b"] and "behind 2a on" in lines["2b"] + lines["2c"]
    page = Path("eval/reports/tiny.md").read_text(encoding="utf-8")
    assert re.search(r"\| task, metric +\| +choice, acc \|\n.*\n\| base +\| +0\.500 ± 0\.500 \|", page)
    assert "2c (merged) - 2c" in page and "2c (merged) - 2a" in page and "**2c (merged)**" in page

    # Some stages alone add to the report, and take nothing from it; with other settings they leave the others out.
    alone = evaluate(*settings, "--stages", "2b", "--fresh")
    assert [each["scores"] for each in alone["stages"].values()] == [
        each["scores"] for each in result["stages"].values()
    ]

    # A row whose files are gone stays; one that was trained again since it was measured does not.
    shutil.rmtree("outputs/2c")
    assert evaluate(*settings, "--stages", "2b")["stages"]["2c"] == alone["stages"]["2c"]
    save_adapter(Path("outputs/2a"), Path("outputs/2c"), "outputs/2a", seed=9)
    again = evaluate(*settings, "--stages", "2b")
    assert again["stages"]["base"] and again["stages"]["2b"] and not again["stages"]["2c"]
    assert "left out, trained again since they were measured: 2c, 2c (merged)\n" in capsys.readouterr().err

    others = evaluate("--tasks", "gallica_heldout", "--samples", "1", "--limit", "2", "--stages", "2b", "--fresh")
    assert [name for name, stage in others["stages"].items() if stage] == ["2b"]

    # An adapter whose start is not measured is compared with the full model below, once.
    few = evaluate(*settings, "--stages", "2a", "2b", "--fresh")["differences"]
    assert {name: change["against"] for name, change in few.items()} == {"2b": "2a"}


def test_positions_are_those_of_the_text(place):
    """Each range holds what the model says of the same tokens with just that context, computed one by one."""
    tokenizer = AutoTokenizer.from_pretrained("models/base")
    model = LlamaForCausalLM.from_pretrained("models/base").eval()
    scorer = scoring.TokenScorer(model, tokenizer, 3, "test")
    text, short = tales()[1][:15_000], {"text": "court", "source": "b"}
    ids = tokenizer.encode(text, add_special_tokens=False)
    starts = range(1792, len(ids) - 255, 256)  # all the chunks that have 1,792 tokens before them
    result = scoring.by_position(scorer, [{"text": text, "source": "a"}, short], 99)
    assert result is not None and result["tokens"] == 256 * len(starts) >= 512
    size = sum(scoring.bytes_by_block(text, tokenizer)[7 : 7 + len(starts)])
    for part, ahead in zip(result["ranges"], (0, 256, 768, 1792), strict=True):
        nll = 0.0
        for start in starts:
            before = [([tokenizer.bos_token_id, *ids])[start - ahead], *ids[start - ahead : start + 255]]
            logits = model(torch.tensor([before])).logits[0, -256:]
            wanted = torch.tensor(ids[start : start + 256])
            nll += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        assert part["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    first, last = result["ranges"][1]["bits_per_byte"], result["ranges"][-1]["bits_per_byte"]
    assert result["change"]["bits_per_byte"] == pytest.approx(last - first, abs=1e-6)
    one = scoring.by_position(scorer, [{"text": text, "source": "a"}], 1)
    assert one is not None and one["tokens"] == 256
    assert scoring.by_position(scorer, [short], 4) is None


# --- intervals --------------------------------------------------------------------------------------------------------


def documents(nlls: list[float], sources: list[str] | None = None) -> list[dict[str, Any]]:
    return [
        {"source": source, "nll": nll, "bytes": 100, "blocks": [{"nll": nll, "bytes": 100}]}
        for nll, source in zip(nlls, sources or ["one work"] * len(nlls), strict=True)
    ]


def test_an_interval_is_as_wide_as_the_standard_error_says():
    """400 blocks of standard deviation s: the middle 95 % is 2 x 1.96 x s / sqrt(400) wide, give or take the draws."""
    nlls = torch.normal(200.0, 30.0, (400,), generator=torch.Generator().manual_seed(0))
    low, high = intervals.interval(documents(nlls.tolist()))["bits_per_byte"]
    expected = 2 * 1.96 * float(nlls.std()) / math.sqrt(400) / 100 / math.log(2)
    assert high - low == pytest.approx(expected, rel=0.05)


def test_pairing_sees_a_difference_that_two_intervals_hide():
    before = [100.0 + 10 * i for i in range(30)]
    after = [nll * 0.98 for nll in before]
    first, second = (intervals.interval(documents(nlls))["bits_per_byte"] for nlls in (before, after))
    assert second[1] > first[0]  # they overlap
    change = intervals.difference(documents(before), documents(after))
    assert change is not None
    assert change["bits_per_byte"] == pytest.approx(-0.02 * sum(before) / 3000 / math.log(2))
    assert change["interval"][0] < change["bits_per_byte"] < change["interval"][1] < 0


def test_whole_works_are_drawn_where_there_are_ten():
    """Twenty passages, two a work: the units are the works' sums, in the order of their names."""
    parts = documents([float(i) for i in range(20)], [f"work {9 - i % 10}" for i in range(20)])
    unit, table = intervals.units(parts)
    assert unit == "work" and table.tolist() == [[float(2 * i + 10), 200.0] for i in range(9, -1, -1)]
    assert intervals.units(documents([50.0] * 20, [f"work {i % 9}" for i in range(20)]))[0] == "block"


def test_units_that_do_not_match_or_are_one_have_no_interval():
    longer = documents([1, 2])
    longer[0]["blocks"][0]["bytes"] += 1  # as many blocks, cut elsewhere
    assert intervals.difference(documents([1, 2]), documents([1, 2, 3])) is None
    assert intervals.difference(documents([1, 2]), longer) is None
    alone = intervals.difference(documents([5.0]), documents([4.0]))
    assert alone is not None and alone["interval"] is None and alone["bits_per_byte"] < 0


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_by_their_seed_and_are_the_continuation_alone(place):
    """Prompt and continuation, put together, are what the model wrote, with the space between them."""
    tokenizer = AutoTokenizer.from_pretrained("models/base")
    model = LlamaForCausalLM.from_pretrained("models/base").eval()

    def draw(seed: int, **changes: Any) -> list[dict[str, Any]]:
        return generation.continuations(model, tokenizer, "La porte", 2, seed, generation.decoding(12) | changes)

    first = draw(1)
    assert first == draw(1) != draw(2) and first[0] != first[1]
    ids = [tokenizer.bos_token_id, *tokenizer.encode("La porte", add_special_tokens=False)]
    greedy = draw(1, temperature=1e-6, top_p=1.0, repetition_penalty=1.0)[0]
    for _ in range(greedy["tokens"]):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert "La porte" + greedy["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    # A model that can only write EOS writes nothing, and says that it ended.
    model.model.norm.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 10
    assert draw(0)[0] == {"text": "", "tokens": 0, "ended": True}


def test_a_prompt_from_a_book_is_its_last_whole_paragraphs():
    text = "un deux trois\n\nquatre cinq six sept\n\nhuit neuf"
    assert generation.tail(text, 2) == "huit neuf"
    assert generation.tail(text, 3) == "quatre cinq six sept\n\nhuit neuf"
    assert generation.tail("a b c d e f g h", 3) == "f g h"


# --- prose and memory -------------------------------------------------------------------------------------------------


SIXTY = " ".join("abcdefghijklmnopqrst"[i % 20] * (1 + i // 20) for i in range(60)) + " "


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("Il ouvrit la porte. " * 3, True),
        ("Il ouvrit la porte. " * 2, False),
        ("non " * 8, True),
        ("mot " * 7, False),
        ("Il entra, puis il sortit, et la nuit tomba sur le village. " + "la nuit tomba " * 3, True),
        (SIXTY * 3, True),
        (f"{SIXTY}x " * 3, False),  # sixty-one words
        ("a b c a b d a b e a b f a b g a b h a b i", False),  # what recurs is broken up each time
    ],
)
def test_loops(text, looping):
    assert metrics.loops(text) is looping


def test_a_copy_is_found_in_its_whole_length():
    """Twelve words, over other signs and capitals; the span shows where, and rows do not run into each other."""
    text = "Alors, un homme entra dans la salle basse et s'assit près du feu. Sans un mot il but."
    book, grown = metrics.CopyFinder([text]), metrics.CopyFinder([])
    sample = "Le soir venu, UN HOMME entra dans la salle basse... et s'assit près du lac."
    for part in (text[:30], text[30:-11], "", text[-11:]):
        grown.append(part)
    for finder in (book, grown):  # a text that grows is the whole text
        found = finder.longest(sample)
        assert found["words"] == 12
        assert sample[found["start"] : found["end"]] == "UN HOMME entra dans la salle basse... et s'assit près du"
        assert finder.longest("sans un mot il but encore")["words"] == 5
    assert metrics.CopyFinder(["un deux", "trois quatre"]).longest("deux  trois quatre")["words"] == 0
    assert book.longest("rien de commun ici") == {"words": 0, "start": 0, "end": 0}


def test_spans_have_their_context_and_stay_in_their_window():
    """The probability of 50 tokens is the product of theirs; the first 200 of each window are context."""
    logprobs = np.zeros(scoring.MAX_LENGTH + 300, dtype=np.float32)
    logprobs[200:250] = -0.1
    logprobs[scoring.MAX_LENGTH + 250 : scoring.MAX_LENGTH + 300] = -0.2
    spans = scoring.span_logprobs(logprobs)
    assert len(spans) == 36 + 2  # (2048 - 200) // 50, and (300 - 200) // 50
    assert spans[0] == pytest.approx(-5) and spans[-1] == pytest.approx(-10) and sum(spans) == pytest.approx(-15)


def test_memorisation_by_hand():
    train = {"documents": [{"spans": [math.log(0.5), math.log(1e-3) + 1e-9]}, {"spans": [-200.0, -300.0]}]}
    heldout = {"documents": [{"spans": [-100.0]}]}
    result = metrics.memorisation({"novel_train": train, "novel_heldout": heldout})
    assert result is not None
    assert result["train"]["extractable"] == 0.5 and result["heldout"]["extractable"] == 0
    assert result["train"]["best_span_probability"] == pytest.approx(0.5)
    assert result["heldout"]["token_probability"] == pytest.approx(math.exp(-2))
    assert metrics.memorisation({"novel_train": train}) is None
    assert metrics.memorisation({"novel_train": train, "novel_heldout": {"documents": [{"spans": []}]}}) is None


def test_degeneration_is_the_mean_over_samples():
    """By hand; what a sample is too short for does not count."""
    texts = {"le chat le chat le chat": True, "un": False, "xqzt " * 8: False}
    result = metrics.degeneration([{"text": text, "ended": ended} for text, ended in texts.items()])
    assert result["rep_4"] == pytest.approx((1 / 3 + 4 / 5) / 2) and result["distinct_2"] == pytest.approx(3 / 12)
    assert result["looping"] == pytest.approx(1 / 3) and result["ended_early"] == pytest.approx(1 / 3)
    assert result["not_french"] == pytest.approx(1 / 2)
    assert metrics.degeneration([])["rep_4"] is None
    assert metrics.foreign("L'œil du cœur, jusqu'à aujourd'hui, regardait la maison.") == 0
    assert metrics.foreign("Le chat xqzt dormait") == pytest.approx(1 / 3) and metrics.foreign("a ! 12") is None
    debris = "Il lut :\n\n— 14 —\n\nLE CHÂTEAU DE SABLE\n\nM. KLAMM,\n\nOUI, OU.\n\n12\n\nEn 1876 il partit.\n\n— Oui."
    assert metrics.degeneration([{"text": debris, "ended": False}])["artefacts"] == 4  # six capitals, at least


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_report_holds_every_stage_gives_its_pages_and_is_continued(place, capsys):
    """From the JSON alone the same pages, byte by byte; only a stage whose weights changed is measured again."""
    evaluated = evaluate("--positions", "4")
    alone, page = place / "alone", Path("eval/reports/tiny.md").read_text(encoding="utf-8")
    assert list(evaluated["stages"]) == ["base", "2a", "2b", "2c", "2c (merged)"]
    for name, stage in evaluated["stages"].items():
        assert list(stage["scores"]) == ["gallica_heldout", "novel_heldout", "novel_train", "english", "code"]
        assert len(stage["samples"]) == (0 if stage["form"] else 2 * len(evaluated["prompts"]))
        assert f"{stage['scores']['code']['bits_per_byte']:.3f}" in page and f"**{name}**" in page
    # The rows overlap, as those of the novel's four phases do.
    assert evaluated["style"]["the novel"]["words"] == sum(len(metrics.words(tale)) for tale in tales()[3:5])
    alone.mkdir()
    shutil.copy("eval/reports/tiny.json", alone)
    with contextlib.chdir(alone):
        call_main(report, "tiny.json")
    made = sorted({path.name for path in alone.iterdir()} - {"tiny.json"})  # no plot of losses: there is no log
    assert made == ["tiny.bpb.svg", "tiny.html", "tiny.md", "tiny.memory.svg", "tiny.position.svg"]
    for name in made:
        assert (alone / name).read_bytes() == Path("eval/reports", name).read_bytes(), name

    for name, below in (("2b", ["outputs/2a"]), ("2c", ["outputs/2a", "outputs/2b"])):
        files = Path("outputs", name).glob("*.safetensors")
        record = {
            "files": [{"name": path.name, "sha256": sha256(path)} for path in files],
            "inputs": {path: {p.name: sha256(p) for p in Path(path).glob("*.safetensors")} for path in below},
            "steps": {"reached": 4, "planned": 4},
            "data": {},
            "versions": {},
        }
        Path("outputs", name, "trained.json").write_text(json.dumps(record))
    same = evaluate("--positions", "4")["stages"]
    assert "not measured again: base, 2a, 2b, 2c, 2c (merged)" in capsys.readouterr().err
    assert same["2c"]["scores"] == evaluated["stages"]["2c"]["scores"]
    assert [stage["gate"] and stage["gate"]["passed"] for stage in same.values()] == [None, None, True, True, None]

    shutil.copy("outputs/2b/adapter_model.safetensors", "outputs/2c/adapter_model.safetensors")
    with pytest.raises(BadInput, match=r"2c/adapter_model\.safetensors is not the file that .*: train 2c again"):
        evaluate("--positions", "4")
    Path("outputs/2c/trained.json").unlink()
    swapped = evaluate("--positions", "4")
    assert "not measured again: base, 2a, 2b\n" in capsys.readouterr().err
    assert "did not learn (against 2b)" in verdict.lines(swapped)["2c"]
    change = swapped["differences"]["2c"]["scores"]["novel_heldout"]
    assert change["bits_per_byte"] == 0 and change["interval"] == [0, 0]


def test_a_damaged_report_and_one_of_another_version_are_refused():
    demo = report.load(DEMO)
    with pytest.raises(BadInput, match="format"):
        report.check(demo | {"format": 2}, DEMO)
    stage = demo["stages"]["2a"]
    for part, where, key in (
        (demo["arguments"], "arguments", "decoding"),
        (demo["environment"], "environment", "cpu"),
        (stage["gate"], "stages.2a.gate", "data"),
        (stage["scores"]["code"], "stages.2a.scores.code", "bits_per_byte"),
    ):
        value = part.pop(key)
        with pytest.raises(BadInput, match=f"{where}: '{key}' is a required"):
            report.check(demo, DEMO)
        part[key] = value


def test_signs_in_a_sample_are_text_and_its_copy_is_marked(tmp_path):
    demo = report.load(DEMO)
    sample = {"text": "*Il* dit <b> & « un homme entra » puis", "copied": {"words": 3, "start": 17, "end": 31}}
    demo["stages"]["2c"]["samples"][0].update(sample)
    page = report.write(demo, tmp_path)
    text = page.with_suffix(".html").read_text(encoding="utf-8")
    assert "*Il* dit &lt;b&gt; &amp; « <mark>un homme entra</mark>" in text
    assert "\n> \\*Il\\* dit \\<b\\> & «" in page.read_text(encoding="utf-8")


def test_the_pages_of_a_copy_are_beside_those_of_the_original(tmp_path):
    shutil.copy(DEMO, tmp_path / "my copy (2).json")
    call_main(report, tmp_path / "my copy (2).json")
    assert all(path.name.startswith("my copy (2).") for path in tmp_path.iterdir())
    page = (tmp_path / "my copy (2).md").read_text(encoding="utf-8")
    assert "# Evaluation: my copy (2)\n" in page and "](my%20copy%20%282%29.bpb.svg)" in page


def judged(**changes: Any) -> str:
    """The verdict on a stage in order, but for the changes."""
    span = {"spans": 10, "token_probability": 0.1, "best_span_probability": 1e-9, "extractable": 0.0}
    sound = {"rep_4": 0.02, "looping": 0.0, "not_french": 0.05, "artefacts": 0.0}
    change = {"gallica_heldout": {"bits_per_byte": -0.1, "interval": [-0.15, -0.05]}}
    stage = {
        "gate": None,
        "form": None,
        "memorisation": {"train": span | {"extractable": changes.get("extractable", 0.0)}, "heldout": span},
        "samples": [{"copied": {"words": changes.get("copied", 6)}}],
        "degeneration": {key: changes.get(key, value) for key, value in sound.items()},
    }
    difference = {"against": "2b", "scores": changes.get("scores", change)}
    reference = {"copied": changes.get("usual", [4, 8]), "degeneration": sound}
    return verdict.lines({"stages": {"2c": stage}, "differences": {"2c": difference}, "reference": reference})["2c"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "learned (gallica_heldout -0.100 bits per byte against 2b); did not memorise; did not degenerate."),
        ({"scores": {"novel_heldout": {"bits_per_byte": -0.1, "interval": [-0.2, 0.01]}}}, "did not learn"),
        ({"scores": {"novel_heldout": {"bits_per_byte": 0.1, "interval": [0.1, 0.2]}}}, "worse on novel_heldout +0.1"),
        ({"extractable": 0.06}, "memorised (6% of trained chunks"),
        ({"extractable": 0.04, "copied": 14, "usual": [3]}, "did not memorise"),
        ({"copied": 15, "usual": [3]}, "memorised (a sample copies 15 words)"),
        ({"copied": 15}, "did not memorise"),
        ({"copied": 16}, "memorised (a sample copies 16 words)"),
        ({"looping": 0.1, "rep_4": 0.065, "not_french": 0.14}, "did not degenerate"),
        ({"looping": 0.5}, "degenerated (50% of samples loop)"),
        ({"rep_4": 0.08}, "degenerated (8% of 4-grams"),
        ({"not_french": 0.16}, "degenerated (16% of words are not French)"),
        ({"artefacts": 0.6}, "degenerated (0.6 lines of OCR debris"),
    ],
)
def test_verdicts(changes, words):
    assert words in judged(**changes)


def test_the_loss_curve_is_that_of_the_last_checkpoint(tmp_path):
    for step in (9, 10):  # "checkpoint-9" sorts behind "checkpoint-10"
        log = [
            {"step": 1, "loss": 3.5, "epoch": 0.1, "tokens/total": 512},
            {"step": step, "loss": 3.0, "epoch": 1.0, "tokens/total": 512 * step},
            {"step": step, "eval_loss": 3.25, "epoch": 1.0},
            {"step": step, "train_runtime": 12.0},
        ]
        state = tmp_path / f"checkpoint-{step}/trainer_state.json"
        state.parent.mkdir()
        state.write_text(json.dumps({"global_step": step, "log_history": log}))
    assert logs.training_log(tmp_path) == [
        {"step": 1, "epoch": 0.1, "tokens": 512, "loss": 3.5, "eval_loss": None},
        {"step": 10, "epoch": 1.0, "tokens": 5120, "loss": 3.0, "eval_loss": 3.25},
    ]


# --- whole runs that went wrong ---------------------------------------------------------------------------------------


def know_by_heart(tokenizer: Any, page: str) -> LlamaForCausalLM:
    """A small model trained on one page, a hundred times over."""
    model = tiny_llama(len(tokenizer), seed=0, hidden=64)
    for parameter in model.parameters():
        parameter.data *= 0.1  # from random noise of this size nothing learns
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(page, add_special_tokens=False)]])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.slow
def test_a_model_that_memorised_or_loops_is_called_so(place):
    """The base recites its page; 2a says one word for ever."""
    tokenizer = AutoTokenizer.from_pretrained("models/base")
    page = tales()[3][:2_000]
    write_rows(place / "data/2c.jsonl", [page])
    Path("prompts.yml").write_text(json.dumps([{"name": "page", "text": page[:300]}], ensure_ascii=False))
    know_by_heart(tokenizer, page).save_pretrained("models/base")
    word = tokenizer.encode("la porte", add_special_tokens=False)[-1]
    always(tiny_llama(len(tokenizer), seed=1), word).save_pretrained("outputs/2a")
    arguments = ("--prompts", "prompts.yml", "--max-new-tokens", "80", "--samples", "1", "--stages", "base", "2a")
    lines = verdict.lines(evaluate("--tasks", "novel_heldout", "novel_train", *arguments))
    memorised = r"memorised \((9\d|100)% of trained chunks extractable, a sample copies \d\d words\)"
    assert re.match(memorised, lines["base"]) and "loop" not in lines["base"]
    assert "did not memorise" in lines["2a"]
    assert "degenerated (100% of samples loop, " in lines["2a"] and "of 4-grams are repeated" in lines["2a"]
    assert "100% of samples loop" in Path("eval/reports/tiny.html").read_text(encoding="utf-8")


# --- bad input --------------------------------------------------------------------------------------------------------


def other_shape(place: Path) -> None:
    size = len(AutoTokenizer.from_pretrained("models/base"))
    tiny_llama(size, seed=0, hidden=64).save_pretrained(place / "wide")
    save_adapter(place / "wide", place / "outputs" / "2b", "outputs/2a", seed=2)


def other_modules(place: Path) -> None:
    """More layers than the base has: PEFT drops them without a word."""
    from safetensors.torch import load_file, save_file

    path = place / "outputs/2b/adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "layers.0." in key)
    save_file({**tensors, key.replace("layers.0.", "layers.7."): tensors[key].clone()}, path)


def torn_log(place: Path) -> None:
    (place / "outputs/2a/checkpoint-4").mkdir()
    (place / "outputs/2a/checkpoint-4/trainer_state.json").write_text('{"global_st')


def no_bos(place: Path) -> None:
    path = place / "models/base/tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["bos_token"]
    path.write_text(json.dumps(settings))


def few_positions(place: Path) -> None:
    path = place / "models/base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_positions": 1024}))


def long_prompt(place: Path) -> None:
    (place / "data/2c.txt").write_text("mot " * 5_000)
    (place / "prompts.yml").write_text("- {name: long, tail_of: data/2c.txt, words: 4000}\n")


def diverged(place: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(place / "models/base")
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    model.save_pretrained(place / "outputs/2a")


def prompts(text: str) -> Callable[[Path], Any]:
    return lambda place: (place / "prompts.yml").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda p: (p / "eval").write_text(""), [], "File exists|Not a directory"),
        (lambda p: (p / "data/2b.heldout.jsonl").write_text(""), [], "2b.heldout.jsonl is empty"),
        (lambda p: (p / "data/2b.heldout.jsonl").write_text('{"text": " "}\n'), [], "line 1: no text"),
        (lambda p: (p / "data/2b.heldout.jsonl").write_text('{"text": "\\ud83d"}'), [], "line 1: not whole JSON"),
        (lambda p: (p / "data/2c.txt").unlink(), [], "data/2c.txt is missing"),
        (torn_log, [], "trainer_state.json is damaged; train the stage again"),
        (no_bos, [], "no BOS token"),
        (few_positions, [], "models/base has 1024 positions, too few for a window of 2048 tokens"),
        (long_prompt, ["--prompts", "prompts.yml"], "more than the 2048"),
        (prompts("- K. ouvrit la porte."), ["--prompts", "prompts.yml"], "this one has not: K. ouvrit la porte."),
        (prompts("- {name: s, tail_of: data/2c.txt}"), ["--prompts", "prompts.yml"], "tail_of and words"),
        (prompts("- {name: a, question: 'Combien ?', answer: 9}"), ["--prompts", "prompts.yml"], "numbers in quotes"),
        (prompts("- {name: a, text: Il}\n- {name: a, text: Un}"), ["--prompts", "prompts.yml"], "have the name a"),
        (prompts("- {name: a, question: 'Combien ?'}"), ["--prompts", "prompts.yml"], "has no chat template"),
        (diverged, ["--stages", "2a"], "2a predicts NaN"),
        (other_shape, ["--stages", "2b"], "does not fit outputs/2a"),
        (other_modules, ["--stages", "2b"], "2b does not fit outputs/2a: 1 of its tensors"),
        (lambda p: save_gpt2_like(p / "outputs/2b"), ["--stages", "2b"], "another vocabulary"),
        (lambda p: (p / "outputs/2b/tokenizer.json").write_text("{"), ["--stages", "2b"], "tokenizer of outputs/2b"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(place, monkeypatch, spoil, arguments, message):
    """What a user can damage in more ways is in test_bad_input.py."""
    if "--stages" not in arguments:  # known before anything is scored
        monkeypatch.setattr(models, "loaded", lambda *_: pytest.fail("scored"))
    spoil(place)
    with pytest.raises((BadInput, OSError), match=message):
        evaluate("--tasks", "gallica_heldout", "--limit", "1", *arguments)
    assert not Path("eval/reports/tiny.json").exists()
