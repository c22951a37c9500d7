"""The novel goes on, with tiny random models: the rules that choose, the window, and a text that survives a kill."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from small_tokenizers import save_gpt2_like, save_llama_like, tales
from tiny_curriculum import tiny_llama
from transformers import AutoTokenizer, LlamaForCausalLM

from eval import continuation, metrics
from eval.continuation import Drawn, Settings
from prep.common import BadInput

ROOT = Path(__file__).parent.parent
SMALL = ["--passage-tokens", "24", "--candidates", "2", "--window", "160", "--device", "cpu"]


@pytest.fixture(scope="session", params=[save_llama_like, save_gpt2_like])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(request.param(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def tale() -> str:
    """A text as the preparation leaves one: blank lines between paragraphs."""
    return "\n\n".join(continuation.paragraphs(tales()[0]))


def model_for(tokenizer: Any) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer), seed=0).eval()


def write(*arguments: str, words: int = 60) -> dict[str, Any]:
    """Run eval/continuation.py as from the command line; returns its only record."""
    sys.argv = ["continuation.py", "--words", str(words), *SMALL, *arguments]
    continuation.main()
    (path,) = Path("outputs/continuation").glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Il vint. Puis il", " Il vint."),
        (" Il vit K. et M. Klamm sans", ""),
        (" « Venez ! » dit-il. Alors K. se", " « Venez ! » dit-il."),
        (" Il dit : « Venez ! » et", " Il dit : « Venez ! »"),
        (" Il attendait... Il", " Il attendait..."),
        ("\n\n— Oui ?\n\n— Non, fit", "\n\n— Oui ?"),
        (" 3.14 fois MM. Durand", ""),
    ],
)
def test_a_passage_ends_at_a_sentence(text, kept):
    assert continuation.cut(text) == kept


def test_passages_join_as_prose():
    assert continuation.tidy("Il vint.", "Fin.") == " Il vint."
    assert continuation.tidy(" Il vint. \n — Oui.\n\n\n— Non. ", "Fin.") == " Il vint.\n\n— Oui.\n\n— Non."
    assert continuation.tidy("ment.", "lente") == "ment."


def test_chapters_end_at_paragraphs_and_lose_nothing():
    text = "\n\n".join(f"mot {'x ' * 48}fin{i}." for i in range(11))  # 50 words each
    parts = continuation.chapters(text, words=120)
    assert [len(part) for part in parts] == [3, 3, 3, 2]
    assert list(itertools.chain(*parts)) == text.split("\n\n")
    assert [len(part) for part in continuation.chapters(text, words=500)] == [11]  # 50 words are no chapter
    ten = text.rpartition("\n\n")[0]
    assert [len(part) for part in continuation.chapters(ten, words=120)] == [3, 3, 3, 1]  # a quarter of one is


# --- the window -------------------------------------------------------------------------------------------------------


def test_a_window_is_the_last_whole_paragraphs_that_fit(tokenizer, tale):
    text = tale
    for room in (100, 300, 900):
        ids = continuation.window(text, "", room, tokenizer)
        assert ids[0] == tokenizer.bos_token_id and len(ids) <= room
        seen = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert text.rstrip().endswith(seen)
        rest = text.rstrip().removesuffix(seen)
        assert rest.endswith("\n\n") or "\n\n" not in seen  # at a paragraph, or inside the last
        if rest.endswith("\n\n"):  # one paragraph more would not have fitted
            more = rest.rstrip().rpartition("\n\n")[2] + "\n\n" + seen
            assert 1 + len(tokenizer.encode(more, add_special_tokens=False)) > room


def test_a_text_that_fits_is_seen_whole_and_a_long_paragraph_from_a_word(tokenizer):
    assert tokenizer.decode(continuation.window("Il vint.", "", 50, tokenizer), skip_special_tokens=True) == "Il vint."
    long = " ".join(f"mot{i}" for i in range(400))
    ids = continuation.window(long, "", 100, tokenizer)
    seen = tokenizer.decode(ids, skip_special_tokens=True)
    assert 80 < len(ids) <= 100 and f" {long}".endswith(f" {seen.strip()}")


def test_the_opening_stays_at_the_head_once_the_window_slides(tokenizer, tale):
    text = tale
    opening = continuation.head(text, 10)
    assert text.startswith(opening) and len(opening.split()) >= 10
    assert continuation.head(text, 0) == ""
    ids = continuation.window(text, opening, 400, tokenizer)
    seen = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) <= 400 and seen.strip().startswith(opening) and text.rstrip().endswith(seen[-200:])
    with pytest.raises(BadInput, match="lower --keep"):
        continuation.window(text, text[:3000], 400, tokenizer)
    tight = len(tokenizer.encode(opening, add_special_tokens=False)) + 40  # room for a few words: too few to go on from
    with pytest.raises(BadInput, match="lower --keep"):
        continuation.window(text, opening, tight, tokenizer)


def test_a_text_just_as_long_as_the_room_is_seen_whole(tokenizer, tale):
    """Though its first paragraphs would otherwise be the ones that go."""
    text = tale[:1500]
    whole = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    opening = continuation.head(text, 3)
    assert continuation.window(text, opening, len(whole), tokenizer) == whole
    assert continuation.window(text, opening, len(whole) - 1, tokenizer) != whole


def test_the_repetition_penalty_counts_the_passage_alone(tokenizer):
    """A window that says one word for ever does not make that word rarer: the draws differ from penalised ones only
    where the passage repeats itself, so its first token is drawn as without a penalty."""
    model, settings = model_for(tokenizer), Settings(passage_tokens=1, candidates=64)
    ids = continuation.window("porte " * 20, "", 80, tokenizer)
    drawn = continuation.draw(model, tokenizer, ids, continuation.read(model, ids), 5, settings)
    torch.manual_seed(5)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1] / 0.8
    order = logits.argsort(descending=True)
    kept = order[: int((logits.softmax(-1)[order].cumsum(0) < 0.9).sum()) + 1]  # top-p 0.9, unpenalised
    assert {sequence[0] for _, sequence, _ in drawn} <= set(kept.tolist())


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_likelihoods_are_the_models_own(tokenizer):
    """The log-probabilities of drawn tokens are those of a plain pass over window and passage together."""
    model, settings = model_for(tokenizer), Settings(passage_tokens=12, candidates=3)
    ids = continuation.window(tales()[0], "", 80, tokenizer)
    drawn = continuation.draw(model, tokenizer, ids, continuation.read(model, ids), 5, settings)
    assert len(drawn) == 3 and len({text for text, _, _ in drawn}) == 3
    seen = continuation.read(model, ids)
    again = [continuation.draw(model, tokenizer, ids, seen, 5, settings) for _ in range(2)]
    assert again == [drawn, drawn]  # what was seen is not written over
    for text, sequence, logprobs in drawn:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids + sequence])).logits[0].log_softmax(-1)
        plain = [logits[len(ids) - 1 + i, token].item() for i, token in enumerate(sequence)]
        assert logprobs == pytest.approx(plain, abs=1e-3)
        assert tokenizer.eos_token_id not in sequence and len(sequence) == 12
        assert tokenizer.decode(ids + sequence, skip_special_tokens=True).endswith(text)


def judge(tokenizer: Any, text: str, trained_on: list[str], before: str = "Il neigeait.", **settings: Any) -> Drawn:
    ids = [tokenizer.bos_token_id, *tokenizer.encode(before, add_special_tokens=False)]
    sequence = tokenizer.encode(before + text, add_special_tokens=False)[len(ids) - 1 :]
    shown = tokenizer.decode(ids + sequence, skip_special_tokens=True)[len(before) :]
    return continuation.judged(
        shown,
        sequence,
        [-float(i) for i in range(len(sequence))],
        before,
        ids,
        tokenizer,
        metrics.CopyFinder(trained_on),
        metrics.CopyFinder([before]),
        Settings(**settings),
    )


def test_rules_are_seen_broken(tokenizer):
    book = "Le village était couvert d'une neige épaisse et personne ne vint à sa rencontre ce soir-là sur le pont."
    fair = judge(tokenizer, " Le vent tomba, et les chiens se turent.", [book])
    assert fair.faults == () and fair.text == " Le vent tomba, et les chiens se turent."
    copy = judge(tokenizer, f" {book}", [book])
    assert copy.faults == ("copies",) and copy.copied == len(metrics.words(book)) > 12
    assert judge(tokenizer, f" {book}", [book], longest_copy=30).faults == ()
    assert (
        judge(tokenizer, f" {book}", [book], longest_copy=len(metrics.words(book))).faults == ()
    )  # so many may be shared
    assert judge(tokenizer, f" {book}", [], before=book, longest_copy=len(metrics.words(book))).faults == ()
    assert judge(tokenizer, f" {book}", [], before=book).faults == ("repeats what is written",)
    assert judge(tokenizer, " Il alla vers la porte, il alla" * 5 + ".", []).faults == ("loops",)
    assert "no sentence ends" in judge(tokenizer, " sans fin, sans porte et sans", []).faults
    short = judge(tokenizer, " Oui. Puis il alla vers la maison du village où K. dormait encore sans savoir", [])
    assert short.faults == ("short",) and short.text == " Oui."


def test_the_mean_is_over_the_tokens_kept(tokenizer):
    drawn = judge(tokenizer, " Le vent tomba. Puis il", [])
    kept = len(tokenizer.encode("Il neigeait. Le vent tomba.")) - len(tokenizer.encode("Il neigeait."))
    assert drawn.text == " Le vent tomba." and drawn.tokens == kept
    assert drawn.log_probability == pytest.approx(-(kept - 1) / 2)


def test_fewest_faults_come_first_then_likelihood():
    def drawn(text: str, log_probability: float, *faults: str) -> Drawn:
        return Drawn(text, 9, log_probability, 0, 0, faults)

    fair, likely, looping = drawn("a", -3.0), drawn("b", -2.0), drawn("c", -0.1, "loops")
    assert continuation.best([fair, likely, looping]) is likely
    assert continuation.best([looping, drawn("d", -0.01, "loops", "copies")]) is looping
    assert continuation.best([drawn(" ", 0.0), looping]) is looping


def looping_model(tokenizer: Any, token: int) -> LlamaForCausalLM:
    """Whatever it reads, it writes one token for ever."""
    model = model_for(tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[5].clone()
        hidden = model.model(input_ids=torch.tensor([[5]])).last_hidden_state[0, 0]
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 200 * hidden / hidden.dot(hidden)
    return model


def test_a_passage_that_always_breaks_a_rule_is_drawn_three_times_and_the_record_says_so(tokenizer):
    settings = Settings(passage_tokens=24, candidates=2, window=256)
    model = looping_model(tokenizer, tokenizer.encode("la porte", add_special_tokens=False)[-1])
    first, second = itertools.islice(continuation.passages(model, tokenizer, "La", settings), 2)
    for passage in (first, second):
        assert "loops" in passage.chosen.faults and passage.attempts == 3 and len(passage.candidates) == 6
    assert "repeats what is written" in second.chosen.faults


def test_other_candidates_are_drawn_when_all_break_a_rule(tokenizer):
    """Six tokens of noise seldom end a sentence."""
    settings = Settings(passage_tokens=6, candidates=2, window=256)
    written = itertools.islice(continuation.passages(model_for(tokenizer), tokenizer, "La", settings), 12)
    passage = next(one for one in written if one.attempts > 1)
    likelihoods = [candidate["log_probability"] for candidate in passage.candidates]
    assert len(set(likelihoods)) == len(likelihoods) == 2 * passage.attempts  # none of them twice


def test_the_end_of_the_text_is_never_drawn(tokenizer):
    """Not even by a model that wants nothing else."""
    model = looping_model(tokenizer, tokenizer.eos_token_id)
    ids = continuation.window("Il vint.", "", 80, tokenizer)
    seen = continuation.read(model, ids)
    for _, sequence, _ in continuation.draw(model, tokenizer, ids, seen, 5, Settings(passage_tokens=12)):
        assert len(sequence) == 12 and tokenizer.eos_token_id not in sequence


# --- the whole --------------------------------------------------------------------------------------------------------


def test_it_writes_past_the_window_and_twice_the_same(place):
    first = write(words=150)
    assert first["stage"] == "2c" and first["words"] >= 150
    assert sum(passage["chosen"]["tokens"] for passage in first["passages"]) > 160  # more than a window
    assert all(passage["context_tokens"] <= 136 for passage in first["passages"])
    text = next(Path("outputs/continuation").glob("*.txt")).read_text(encoding="utf-8")
    assert len(text.split()) == first["words"]
    again = write("--fresh", words=150)
    assert again["passages"] == first["passages"]
    shutil.rmtree("outputs/continuation")
    other = write("--seed", "43", words=150)
    assert other["passages"][0]["chosen"]["text"] != first["passages"][0]["chosen"]["text"]


def test_every_stage_writes_its_own(place):
    texts = {}
    for stage in ("base", "2a", "2b", "2c"):
        shutil.rmtree("outputs/continuation", ignore_errors=True)
        texts[stage] = write("--stage", stage, words=5)["passages"][0]["chosen"]["text"]
    assert len(set(texts.values())) == 4


def test_more_words_prolong_the_same_text(place):
    short = write(words=30)
    long = write(words=90)
    assert long["passages"][: len(short["passages"])] == short["passages"] and long["words"] >= 90
    shutil.rmtree("outputs/continuation")
    assert write(words=90)["passages"] == long["passages"]


def test_other_weights_begin_another_text(place):
    first = write(words=30)
    shutil.copy("outputs/2b/adapter_model.safetensors", "outputs/2c/adapter_model.safetensors")
    sys.argv = ["continuation.py", "--words", "30", *SMALL]
    continuation.main()
    records = [json.loads(path.read_text()) for path in Path("outputs/continuation").glob("*.json")]
    assert len(records) == 2 and len({record["inputs"] for record in records}) == 2
    assert first in records


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again_it_is_the_same_text(place, how):
    command = [sys.executable, str(ROOT / "eval/continuation.py"), "--words", "150", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
    )
    out = Path("outputs/continuation")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        records = list(out.glob("2c*.json"))
        if records and len(json.loads(records[0].read_text())["passages"]) >= 3:
            break
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), errors
    (path,) = out.glob("2c*.json")
    broken = json.loads(path.read_text())
    assert 0 < broken["words"] < 150
    done = write(words=150)
    assert done["passages"][: len(broken["passages"])] == broken["passages"]
    shutil.rmtree(out)
    undisturbed = write(words=150)
    assert (undisturbed["sha256"], undisturbed["passages"]) == (done["sha256"], done["passages"])


def test_the_epub_holds_the_text_in_chapters(tmp_path):
    text = "\n\n".join(f"— Un & deux <{i}> {'mot ' * 45}." for i in range(3))
    continuation.write_epub(tmp_path / "book.epub", "La suite", "A note.", text, words=40)
    with zipfile.ZipFile(tmp_path / "book.epub") as archive:
        assert archive.namelist()[0] == "mimetype" and archive.read("mimetype") == b"application/epub+zip"
        package = archive.read("EPUB/package.opf").decode()
        ElementTree.fromstring(package)
        pages = sorted(name for name in archive.namelist() if name.startswith("EPUB/page"))
        trees = [ElementTree.fromstring(archive.read(name)) for name in pages]
    assert "<dc:language>fr</dc:language>" in package
    read = [[p.text for p in tree.iter("{http://www.w3.org/1999/xhtml}p")] for tree in trees]
    assert read == [*([part] for part in continuation.paragraphs(text)), ["A note."]]


def test_from_a_sentence_and_from_a_file(place):
    assert write("--from", "K. ouvrit  la porte.", words=5)["beginning"]["source"] == "words given"
    shutil.rmtree("outputs/continuation")
    Path("page.txt").write_text("L’homme vint.\n\nIl s’assit.", encoding="utf-8")
    assert write("--from", "page.txt", words=5)["beginning"]["source"] == "page.txt"
    assert continuation.beginning_of("page.txt", Path("none"))[0] == "L'homme vint.\n\nIl s'assit."


def test_a_prompt_longer_than_the_context_is_said_to_be_cut(place, capsys):
    Path("page.txt").write_text(tales()[0], encoding="utf-8")
    assert all(passage["context_tokens"] <= 136 for passage in write("--from", "page.txt", words=5)["passages"])
    assert "136 fit: the model sees its last pages only" in capsys.readouterr().err


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "2z"], "no stage 2z"),
        (["--from", "nowhere.txt"], "nowhere.txt is missing"),
        (["--from", "empty.txt"], "empty.txt is empty"),
        (["--from", " "], "--from is empty"),
        (["--from", "latin.txt"], "latin.txt is not UTF-8"),
        (["--window", "100", "--passage-tokens", "90"], "does not do"),
        (["--window", "9000"], "8192 positions"),
        (["--keep", "500"], "lower --keep"),
    ],
)
def test_bad_input_is_one_message(place, arguments, message):
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(BadInput, match=message):
        write(*arguments)


def test_a_stage_without_weights_is_named(place):
    shutil.rmtree("outputs/2c")
    with pytest.raises(BadInput, match="stage 2c is missing"):
        write()


def test_a_book_that_was_not_prepared_is_named(place):
    Path("data/2c.txt").unlink()
    with pytest.raises(BadInput, match="make prep-c"):
        write()
    record = write("--from", "Il vint.", words=5)  # nothing to compare with, and the record says that
    assert record["not_copied_from"] is None and record["passages"][0]["chosen"]["copied"] is None


def test_a_tokenizer_without_bos_is_named(place):
    path = Path("outputs/2a/tokenizer_config.json")
    path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key != "bos_token"}))
    with pytest.raises(BadInput, match="no BOS token"):
        write()


def test_a_damaged_record_is_named(place):
    write(words=5)
    (path,) = Path("outputs/continuation").glob("*.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(BadInput, match="is damaged"):
        write(words=5)
    assert math.isfinite(write("--fresh", words=5)["passages"][0]["chosen"]["log_probability"])
