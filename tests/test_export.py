"""Exports by the real converter and the real llama.cpp, on tiny models; pushes against a server that speaks the hub's protocol.

The whole command runs on a trained chain in test_smoke.py.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from huggingface_hub import constants
from tiny_curriculum import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import export, llamacpp, models
from eval.generation import decoding, draw, encode
from eval.push import SUMS, sums
from eval.push import main as push_main
from prep.common import BadInput, sha256
from train.stages import line_of, load_chain

CORPUS = os.environ.get("CORPUS_DIR", "")


def save_model(tokenizer: Path, folder: Path) -> Path:
    """A tiny Llama of 16-bit weights beside a tokenizer."""
    own = AutoTokenizer.from_pretrained(tokenizer)
    model: Any = tiny_llama(len(own), seed=0)
    model.half().save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def test_llama_cpp_computes_what_the_model_does(tokenizer: Path, tmp_path: Path) -> None:
    folder = save_model(tokenizer, tmp_path / "model")
    llamacpp.convert(folder, folder / "x-F16.gguf")
    for form in llamacpp.QUANTISED:
        llamacpp.quantise(folder / "x-F16.gguf", folder / f"x-{form}.gguf", form)
    own = models.load_tokenizer(folder)
    ids = encode(own, llamacpp.FRENCH)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits.log_softmax(-1)
    far = {}
    for form in ("F16", *llamacpp.QUANTISED):
        engine, beside = llamacpp.load(folder / f"x-{form}.gguf")  # and checks the tokenizer
        assert beside.get_vocab() == own.get_vocab()
        far[form] = float((engine(torch.tensor([ids])).logits.log_softmax(-1) - expected).abs().mean())
    assert far["F16"] < 0.02 and far["F16"] < far["Q8_0"] < 0.3 and far["Q8_0"] < far["Q4_K_M"]

    # Drawn together from one prompt, then from another: what it remembers of each is what it would compute again.
    engine, _ = llamacpp.load(folder / "x-F16.gguf")
    for prompt in (ids, ids[:9] + ids[3:20]):
        for sample in draw(engine, own, prompt, 3, 1, decoding(12), open_ended=True):
            alone = llamacpp.Engine(folder / "x-F16.gguf")(torch.tensor([prompt + sample.tokens])).logits[0]
            chances = alone.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
            assert torch.allclose(chances, torch.tensor(sample.log_probabilities), atol=0.02)


@pytest.mark.skipif(not CORPUS, reason="CORPUS_DIR is not set: a folder with tokenizer/, TinyLlama's")
def test_gguf_carries_the_tokenizer_of_tinyllama(tmp_path: Path) -> None:
    folder = save_model(Path(CORPUS) / "tokenizer", tmp_path / "model")
    export.write_gguf(folder, "x", "F16", folder)  # it compares how both cut llamacpp.FRENCH


def test_a_tokenizer_that_gguf_cannot_carry_is_found(gpt2: Path, tmp_path: Path) -> None:
    folder = save_model(gpt2, tmp_path / "model")
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["byte_fallback"] = True  # as a tokenizer that Transformers reads out of a GGUF has it
    settings["decoder"] = {"type": "Sequence", "decoders": [settings["decoder"]]}
    path.write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=r"x-F16.gguf cuts text into other tokens"):
        export.write_gguf(folder, "x", "F16", folder)
    export.mend_tokenizer(folder)
    export.write_gguf(folder, "x", "F16", folder)


def on_a_full_disk(write: Callable[..., None], *arguments: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        write(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_made_is_one_line(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(llama, tmp_path / "model")
    good, bad, unknown = folder / "x-F16.gguf", tmp_path / "bad.gguf", shutil.copytree(folder, tmp_path / "unknown")
    settings = json.loads((folder / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(settings | {"architectures": ["NobodysForCausalLM"]}))
    llamacpp.convert(folder, good)
    bad.write_bytes(b"GGUF but no more")
    padded = shutil.copytree(folder, tmp_path / "padded")
    tiny_llama(settings["vocab_size"] + 8, seed=0).save_pretrained(padded)
    row = models.Candidate("2a", folder, None, None, None)
    out = export.Folder(tmp_path / "out/2a")
    model = partial(export.write_model, row, models.load_tokenizer(folder))
    cases: list[tuple[str, Callable[[], Any]]] = [
        (r"converter cannot convert .*NobodysForCausalLM", lambda: llamacpp.convert(unknown, bad)),
        (r"GGUF cannot carry this tokenizer", lambda: export.write_gguf(padded, "x", "F16", padded)),
        (r"llama.cpp cannot open .*bad.gguf", lambda: llamacpp.Engine(bad)),
        (r"could not write y-Q8_0.gguf: .* disk full", lambda: on_a_full_disk(llamacpp.quantise, good, folder / "y-Q8_0.gguf", "Q8_0")),
        (r"converter cannot write .*: File too large", lambda: on_a_full_disk(llamacpp.convert, folder, folder / "y-F16.gguf")),
        (r"model could not be written to .*out/2a/.part: .*File too large", lambda: on_a_full_disk(out.step, "model", 1, 9, model)),
        (r"GB are needed", lambda: out.step("model", 1, 10**18, model)),
    ]  # fmt: skip
    for message, attempt in cases:
        with pytest.raises(BadInput, match=message):
            attempt()
    assert not list(out.path.glob("*"))
    monkeypatch.setattr(llamacpp, "CONVERTER", tmp_path)
    with pytest.raises(BadInput, match="converter is not installed"):
        llamacpp.convert(folder, good)
    monkeypatch.setitem(sys.modules, "cyllama.llama.llama_cpp", None)
    with pytest.raises(BadInput, match=r"llama.cpp .* is not installed: `make setup`"):
        llamacpp.Engine(good)


# --- steps and proof --------------------------------------------------------------------------------------------------


def test_a_step_is_made_once_whole_and_again_when_its_inputs_or_files_change(tmp_path: Path) -> None:
    made: list[str] = []

    def step(inputs: Any, text: str) -> None:
        def write(target: Path) -> None:
            (target / "a").write_text(text)
            if text == "one":
                (target / "b").write_text(text)
            made.append(text)
            if text == "broken":
                raise BadInput("the second file fails")

        export.Folder(tmp_path / "x").step("step", inputs, 9, write)

    for inputs, text in ((1, "one"), (1, "one"), (2, "two")):
        step(inputs, text)
    (tmp_path / "x" / SUMS).write_text("whole")
    step(2, "two")
    assert made == ["one", "two"] and (tmp_path / "x" / SUMS).exists()
    assert not (tmp_path / "x/b").exists()  # which it makes no more
    with pytest.raises(BadInput):
        step(3, "broken")
    assert (tmp_path / "x/a").read_text() == "two" and not (tmp_path / "x/.part").exists()
    assert not (tmp_path / "x" / SUMS).exists()  # no whole export any more, until the step succeeds
    (tmp_path / "x/a").write_text("damaged")
    step(2, "two")
    assert (tmp_path / "x/a").read_text() == "two"


def test_a_form_that_is_not_the_stage_fails(place: Path) -> None:
    line = line_of("2c", load_chain(Path("recipes")))
    line[-1].config["test_datasets"] = [{"path": "data/2c.heldout.jsonl"}]
    row, tokenizer = models.candidate(line[-1]), models.load_tokenizer(Path("outputs/2a"))
    folder = export.Folder(Path("out/2c"))
    prove = partial(export.prove, folder.path, row, ["model"], *export.heldout(line), tokenizer)
    folder.step("model", "2c", 9, partial(export.write_model, row, tokenizer))
    folder.step("proof", "2c", 9, prove)
    found = json.loads((folder.path / "proof.json").read_text())["forms"]["model"]
    assert abs(found["difference"]) < 1e-3 and found["greedy_equal"] == export.GREEDY
    folder.step("model", "2b", 9, partial(export.write_model, models.candidate(line[1]), tokenizer))
    with pytest.raises(BadInput, match=r"out/2c is not the stage that was measured: model is .* per byte from 2c"):
        folder.step("proof", "2b", 9, prove)


def test_near_ties_are_no_difference() -> None:
    logits = [torch.tensor([0.0, 1.0, 0.99])] * export.GREEDY
    same, other, tie = [1] * export.GREEDY, [1, 0] + [1] * 30, [1, 1, 2] + [1] * 29
    assert [export.agreed([(same, logits)], [(found, logits)]) for found in (same, other, tie)] == [32, 1, 32]


def test_a_report_that_is_named_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    row = models.Candidate("2c", tmp_path, None, None, None)
    assert export.measured(export.REPORT, row) is None  # an export need not be evaluated
    assert capsys.readouterr().err == "2c is not in eval/reports/full.json: the card has no scores (make eval)\n"
    with pytest.raises(BadInput, match=r"eval/reports/ful\.json is missing; eval/evaluation.py writes it"):
        export.measured(Path("eval/reports/ful.json"), row)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def push(hub: Hub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., str]:
    """Runs the script on a finished export, to a good end or to a refusal; what it said."""
    folder = export.Folder(tmp_path / "outputs/export/2c")

    def write(target: Path) -> None:
        llamacpp.convert(save_model(llama, target), target / "2c-F16.gguf")
        (target / "README.md").write_text("A card.")

    folder.record["memorised"] = "did not memorise"
    folder.step("model", 1, 9, write)
    (folder.path / SUMS).write_text(sums(folder.record))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"):  # the script sets them
        monkeypatch.setenv(name, "0")
    monkeypatch.chdir(tmp_path)

    def call(*words: str, refused: bool = False, token: str = "hf_x") -> str:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(sys, "argv", ["push.py", "2c", *(words or ("you/name", "--yes"))])
        if not refused:
            push_main()
            return capsys.readouterr().out
        with pytest.raises(BadInput) as error:
            push_main()
        return str(error.value)

    return call


def test_a_push_is_private_whole_and_resumed(push: Callable, hub: Hub, tmp_path: Path) -> None:
    assert "nothing was sent" in push("you/name") and hub.private is None

    mine, back = tmp_path / "outputs/export/2c", tmp_path / "back"
    hub.breaks = sha256(mine / "model.safetensors")
    assert "broke off" in push(refused=True)
    assert not hub.files and len(hub.blobs) == 1
    hub.breaks = ""
    assert "pushed: " in push()
    assert hub.private is True and len(hub.puts) == len(set(hub.puts)) == 2  # what had arrived was not sent again

    code = "import sys, huggingface_hub as h; print(h.snapshot_download('you/name', local_dir=sys.argv[1]))"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "other"), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", code, str(back)], env=environment, check=True, capture_output=True)
    done = subprocess.run(["sha256sum", "--check", SUMS], cwd=back, capture_output=True, text=True, check=True)
    sent = {path.name: sha256(path) for path in mine.iterdir() if path.name != "export.json"}
    assert {path.name: sha256(path) for path in back.iterdir() if path.is_file()} == sent
    assert done.stdout.count(": OK") == len(sent) - 1 >= 6


def test_what_is_not_pushed(push: Callable, hub: Hub, tmp_path: Path) -> None:
    assert "no token" in push(refused=True, token="")
    assert "nobody stated the rights" in push("you/name", "--public", refused=True)
    hub.private = False
    assert "is there already and public" in push(refused=True)
    hub.private = None
    answers = {401: "does not accept the token", 403: "no right to write there", 404: "no such name"}
    for status, message in answers.items():
        hub.denies = status
        assert message in (said := push(refused=True)) and "one commit or none" in said
    hub.denies, hub.swaps = 0, True
    assert "changed while pushed" in push(refused=True)
    folder = export.Folder(tmp_path / "outputs/export/2c")
    folder.record["memorised"] = "memorised (9% of trained chunks extractable)"
    folder.save()
    assert "--despite-memorisation" in push(refused=True)
    assert "nothing was sent" in push("you/name", "--despite-memorisation")
    (folder.path / "2c-F16.gguf").write_text("changed")
    assert "not what was exported" in push(refused=True)
    for name, damaged in ((SUMS, b"\xff"), ("export.json", b"[]")):
        (folder.path / name).write_bytes(damaged)
        assert "no finished export" in push(refused=True)
    (folder.path / SUMS).unlink()
    assert "no finished export" in push(refused=True)
