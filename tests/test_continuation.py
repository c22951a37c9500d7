"""The novel goes on, with tiny random models: the rules that choose, the window, and a text that survives a kill."""

import itertools
import json
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
from small_tokenizers import tales
from tiny_curriculum import always, call_main, tiny_llama
from transformers import AutoTokenizer, LlamaForCausalLM

from eval import continuation, generation, metrics
from eval.continuation import Drawn, Settings
from prep.common import ROOT, BadInput

OUT = Path("outputs/continuation")
SMALL = ["--chunk-tokens", "24", "--candidates", "2", "--window", "160", "--device", "cpu"]


@pytest.fixture(scope="session")
def tokenizer(tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer)


@pytest.fixture(scope="session")
def tale() -> str:
    """A text as the preparation leaves one: blank lines between paragraphs."""
    return "\n\n".join(continuation.paragraphs(tales()[0]))


def model_for(tokenizer: Any) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer), seed=0).eval()


def write(*arguments: str, words: int = 60) -> dict[str, Any]:
    """Run eval/continuation.py as from the command line; returns the newest record."""
    call_main(continuation, "--words", words, *SMALL, *arguments)
    path = max(OUT.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(path.read_text(encoding="utf-8"))


# --- text -------------------------------------------------------------------------------------------------------------


def test_chunks_join_as_prose():
    assert continuation.tidy(" Il vint. \n — Oui.\n\n\n— Non. ", "Fin.") == " Il vint.\n\n— Oui.\n\n— Non."
    assert continuation.tidy("Il vint.", "Fin.") == " Il vint." and continuation.tidy("ment.", "lente") == "ment."


# --- the window -------------------------------------------------------------------------------------------------------


def test_a_window_is_the_last_whole_paragraphs_that_fit(tokenizer, tale):
    parts = tale.split("\n\n")
    for room in (300, 900):
        tokens = (generation.encode(tokenizer, "\n\n".join(parts[first:])) for first in range(len(parts)))
        assert continuation.window(tale, "", room, tokenizer) == next(ids for ids in tokens if len(ids) <= room)
    long = " ".join(f"mot{i}" for i in range(400))  # one paragraph is seen from one of its words on
    ids = continuation.window(long, "", 100, tokenizer)
    seen = tokenizer.decode(ids, skip_special_tokens=True)
    assert 80 < len(ids) <= 100 and f" {long}".endswith(f" {seen.strip()}")


def test_the_opening_stays_at_the_head_once_the_window_slides(tokenizer, tale):
    opening = continuation.head(tale, 10)
    assert tale.startswith(opening) and len(opening.split()) >= 10
    assert continuation.head(tale, 0) == ""
    ids = continuation.window(tale, opening, 400, tokenizer)
    seen = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) <= 400 and seen.strip().startswith(opening) and tale.rstrip().endswith(seen[-200:])
    tight = len(generation.encode(tokenizer, opening)) + 39  # room for a few words: too few to go on from
    with pytest.raises(BadInput, match="lower --keep"):
        continuation.window(tale, opening, tight, tokenizer)
    text = tale[:1500]  # one that just fits is seen whole, though its first paragraphs would otherwise go
    whole = generation.encode(tokenizer, text)
    assert continuation.window(text, continuation.head(text, 3), len(whole), tokenizer) == whole
    assert continuation.window(text, continuation.head(text, 3), len(whole) - 1, tokenizer) != whole


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_an_open_end_keeps_the_models_own_likelihoods(tokenizer):
    """The log-probabilities of drawn tokens are those of a plain pass over window and chunk together."""
    model, parameters = model_for(tokenizer), generation.decoding(12)
    ids = continuation.window(tales()[0], "", 80, tokenizer)
    seen = continuation.read(model, ids)
    drawn, again = (generation.draw(model, tokenizer, ids, 3, 5, parameters, True, seen) for _ in range(2))
    assert drawn == again  # what was seen is not written over
    assert len({sample.text for sample in drawn}) == 3
    for sample in drawn:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids + sample.tokens])).logits[0].log_softmax(-1)
        plain = [logits[len(ids) - 1 + i, token].item() for i, token in enumerate(sample.tokens)]
        assert sample.log_probabilities == pytest.approx(plain, abs=1e-3)
        assert len(sample.tokens) == 12 and not sample.ended
        assert tokenizer.decode(ids + sample.tokens, skip_special_tokens=True).endswith(sample.text)


def test_the_repetition_penalty_of_an_open_end_counts_the_chunk_alone(tokenizer):
    """So a single token is drawn as without a penalty; after a prompt whose tokens count, it is not."""
    model, parameters = model_for(tokenizer), generation.decoding(1)
    model.lm_head.weight.data[:] = model.lm_head.weight.data[5].clone()  # every token is as likely as the others
    ids = list(range(3, 103))
    for open_ended in (True, False):
        drawn, plain = (
            generation.draw(model, tokenizer, ids, 64, 5, parameters | {"repetition_penalty": value}, open_ended)
            for value in (5.0, 1.0)
        )
        assert (drawn == plain) is open_ended


def test_the_end_of_the_text_is_never_drawn(tokenizer):
    """Not even by a model that wants nothing else."""
    model = always(model_for(tokenizer), tokenizer.eos_token_id)
    for sample in generation.draw(model, tokenizer, [1, 5, 6], 2, 5, generation.decoding(12), True):
        assert len(sample.tokens) == 12 and tokenizer.eos_token_id not in sample.tokens


# --- choosing ---------------------------------------------------------------------------------------------------------

BOOK = "Le village était couvert d'une neige épaisse et personne ne vint à sa rencontre ce soir-là sur le pont."
LONG = len(metrics.words(BOOK))


def judge(tokenizer: Any, text: str, trained_on: str = "", before: str = "Il neigeait.", longest: int = 12) -> Drawn:
    ids = generation.encode(tokenizer, before)
    tokens = generation.encode(tokenizer, before + text)[len(ids) :]
    shown = tokenizer.decode(ids + tokens, skip_special_tokens=True)[len(before) :]
    sample = generation.Sample(shown, tokens, False, [-float(i) for i in range(len(tokens))])
    books = metrics.CopyFinder([trained_on]), metrics.CopyFinder([before])
    return continuation.judged(sample, before, ids, tokenizer, *books, Settings(longest_copy=longest))


@pytest.mark.parametrize(
    ("text", "more", "faults"),
    [
        (" Le vent tomba, et les chiens se turent.", {"trained_on": BOOK}, ()),
        (f" {BOOK}", {"trained_on": BOOK, "longest": LONG - 1}, ("copies",)),
        (f" {BOOK}", {"trained_on": BOOK, "longest": LONG}, ()),  # so many may be shared
        (f" {BOOK}", {"before": BOOK, "longest": LONG}, ()),
        (f" {BOOK}", {"before": BOOK}, ("repeats what is written",)),
        (" Il alla vers la porte, il alla" * 5 + ".", {}, ("loops",)),
        (" sans fin, sans porte et sans", {}, ("no sentence ends",)),
        (" Oui. Puis il alla vers la maison du village où K. dormait encore sans savoir", {}, ("short",)),
    ],
)
def test_rules_are_seen_broken(tokenizer, text, more, faults):
    assert judge(tokenizer, text, **more).faults == faults


def test_the_mean_is_over_the_tokens_kept(tokenizer):
    drawn = judge(tokenizer, " Le vent tomba. « Oui ! » Puis il")
    kept = len(tokenizer.encode("Il neigeait. Le vent tomba. « Oui ! »")) - len(tokenizer.encode("Il neigeait."))
    assert drawn.text == " Le vent tomba. « Oui ! »" and drawn.tokens == kept
    assert drawn.log_probability == pytest.approx(-(kept - 1) / 2)


def test_fewest_faults_come_first_then_likelihood():
    def drawn(text: str, log_probability: float, *faults: str) -> Drawn:
        return Drawn(text, 9, log_probability, 0, 0, faults)

    fair, likely, looping = drawn("a", -3.0), drawn("b", -2.0), drawn("c", -0.1, "loops")
    assert continuation.best([fair, likely, looping]) is likely
    assert continuation.best([looping, drawn("d", -0.01, "loops", "copies")]) is looping
    assert continuation.best([drawn(" ", 0.0), looping]) is looping


def test_other_candidates_are_drawn_when_all_break_a_rule(tokenizer):
    """Three batches at most, and the record says so; six tokens of noise seldom end a sentence."""
    settings = Settings(chunk_tokens=24, candidates=2, window=256)
    model = always(model_for(tokenizer), tokenizer.encode("la porte", add_special_tokens=False)[-1])
    first, second = itertools.islice(continuation.chunks(model, tokenizer, "La", settings), 2)
    for chunk in (first, second):
        assert "loops" in chunk.chosen.faults and chunk.attempts == 3 and len(chunk.candidates) == 6
    assert "repeats what is written" in second.chosen.faults

    settings = Settings(chunk_tokens=6, candidates=2, window=256)
    written = itertools.islice(continuation.chunks(model_for(tokenizer), tokenizer, "La", settings), 12)
    chunk = next(one for one in written if one.attempts > 1)
    likelihoods = [candidate["log_probability"] for candidate in chunk.candidates]
    assert len(set(likelihoods)) == len(likelihoods) == 2 * chunk.attempts  # none of them twice


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_is_the_same_killed_and_resumed_or_begun_again(place):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "eval/continuation.py"), "--words", "150", *SMALL],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        records = list(OUT.glob("2c*.json"))
        if records and len(json.loads(records[0].read_text())["chunks"]) >= 3:
            break
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    (path,) = OUT.glob("2c*.json")
    broken = json.loads(path.read_text())
    assert 0 < broken["words"] < 150

    done = write(words=150)
    assert done["stage"] == "2c" and done["words"] >= 150
    assert done["chunks"][: len(broken["chunks"])] == broken["chunks"]
    assert sum(chunk["chosen"]["tokens"] for chunk in done["chunks"]) > 160  # more than a window
    assert all(chunk["context_tokens"] <= 136 for chunk in done["chunks"])
    (text,) = OUT.glob("*.txt")
    assert len(text.read_text(encoding="utf-8").split()) == done["words"]
    again = write("--fresh", words=150)
    assert (again["sha256"], again["chunks"]) == (done["sha256"], done["chunks"])
    # A record that cannot be read is named and kept.
    for damaged in (path.read_text()[:100], json.dumps(done | {"chunks": [{"chosen": 1}]})):
        path.write_text(damaged)
        with pytest.raises(BadInput, match="is damaged"):
            write(words=5)
        assert path.read_text() == damaged
    for chunk in done["chunks"]:
        chunk["chosen"]["text"] = ""
    path.write_text(json.dumps(done))
    with pytest.raises(BadInput, match="is not of this text"):
        write(words=5)


def test_from_a_sentence_a_file_and_without_the_book(place, capsys):
    assert write("--from", "K. ouvrit  la porte.", words=5)["beginning"]["source"] == "words given"
    Path("page.txt").write_text("L’homme vint.\n\nIl s’assit.", encoding="utf-8")
    assert continuation.beginning_of("page.txt", Path("none")) == ("L'homme vint.\n\nIl s'assit.", "page.txt")
    for missing in ("a folder/page.txt", "data"):  # no words to continue
        with pytest.raises(BadInput, match="name a text file"):
            continuation.beginning_of(missing, Path("none"))
    Path("page.txt").write_text(tales()[0], encoding="utf-8")
    chunks = write("--from", "page.txt", words=20)["chunks"]
    assert all(chunk["context_tokens"] <= 136 for chunk in chunks)
    said = capsys.readouterr()
    assert "136 fit: the model sees its last pages only" in said.err
    assert f"\n{chunks[0]['chosen']['text'].lstrip(' ')}\n" in said.out  # a line of its own, as an error has
    with pytest.raises(BadInput, match="8192 positions"):
        write("--window", "9000")
    assert capsys.readouterr().out.endswith("\n")
    Path("data/2c.txt").unlink()  # copies are not looked for
    record = write("--from", "Il vint.", words=5)
    assert record["not_copied_from"] is None and record["chunks"][0]["chosen"]["copied"] is None


def test_another_seed_stage_or_weight_writes_another_text(place):
    records = [write(words=5), write("--seed", "43", words=5), write("--stage", "2b", words=5)]
    shutil.copy("outputs/2b/adapter_model.safetensors", "outputs/2c/adapter_model.safetensors")
    records.append(write(words=5))
    assert len({record["inputs"] for record in records}) == len(list(OUT.glob("*.json"))) == 4
    assert len({record["chunks"][0]["chosen"]["text"] for record in records}) == 3  # the last writes as 2b does


def test_the_epub_holds_the_text_in_chapters(tmp_path):
    """They end at paragraphs, of 50 words each here; a last one of less than a quarter of a chapter joins the one before."""
    path = tmp_path / "book.epub"
    for count, words, sizes in ((10, 120, [3, 3, 3, 1]), (11, 500, [11]), (11, 120, [3, 3, 3, 2])):
        text = "\n\n".join(f"— Un & deux <{i}> {'mot ' * 44}." for i in range(count))
        given = text.replace(">", ">\x0b\0")  # XML has no place for these
        continuation.write_epub(path, "La suite", "A note.", given, words)
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist()[0] == "mimetype" and archive.read("mimetype") == b"application/epub+zip"
            package = archive.read("EPUB/package.opf").decode()
            ElementTree.fromstring(package)
            pages = sorted(name for name in archive.namelist() if name.startswith("EPUB/page"))
            trees = [ElementTree.fromstring(archive.read(name)) for name in pages]
        assert "<dc:language>fr</dc:language>" in package
        read = [[p.text for p in tree.iter("{http://www.w3.org/1999/xhtml}p")] for tree in trees]
        assert [len(parts) for parts in read] == [*sizes, 1]
        assert list(itertools.chain(*read)) == [*continuation.paragraphs(text), "A note."]
    made = path.read_bytes()
    time.sleep(1.1)  # zip files hold times: the same text gives the same bytes
    continuation.write_epub(path, "La suite", "A note.", given, words)
    assert path.read_bytes() == made
