"""Export a stage: adapter, 16-bit model, GGUF files for llama.cpp and Ollama, a model card, and the proof that all are the
stage that was measured.

    python eval/export.py 2c --report eval/reports/full.json      -> outputs/export/2c     (make export STAGE=2c)
    python eval/export.py 2c --forms model                        the 16-bit model alone   (make merge STAGE=2c)

The folder is laid out as a repository of the hub: Transformers loads it as it is. An adapter is merged into its base as it
was quantised (train/dequantise.py), since it is right on no other. Every form is then scored on the same held-out text by the
engine that runs it; one that differs from the stage by more than TOLERANCE fails. A step whose inputs have not changed is
skipped. eval/push.py sends the folder to the hub.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything read is a local file
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from prep.command import run

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from lm_eval.api.instance import Instance
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from eval import generation, llamacpp, models, report, tables, verdict
from eval.push import EXPORTS, RECORD, SUMS, files_of, load, sums
from eval.scoring import TokenScorer
from prep.common import (
    BadInput,
    changed,
    collected,
    digest,
    hashed,
    lock,
    need_room,
    reason,
    versions,
    write_json,
    write_text,
)
from train.gate import check, manifest_of
from train.stages import Stage, line_of, load_chain

# The forms in the order they are made, and how far each may be from the stage, in bits per byte (either way). The merged
# weights are rounded to 16 bits once; llama.cpp computes with 16-bit activations; Q8_0 and Q4_K_M lose what they lose: about
# 0.01 and 0.05 for a model of 135 M parameters, less for larger ones. More is a damaged file, not a small one.
TOLERANCE = {"model": 0.002, "F16": 0.005, "Q8_0": 0.02, "Q4_K_M": 0.12}
EXACT = ("model", "F16")  # these also write what the stage writes: GREEDY tokens after each prompt
GREEDY = 32
TIE = 0.05  # nats: two tokens nearer than this may change places with the order of additions
PROOF_TEXT = 6_000  # characters of held-out text, a window: the same for each form, so their differences are exact
PROMPTS = ("Le soir tombait quand", "— Je ne vous ai pas vu hier, dit-elle.", "Au bout du couloir, il y avait")
LIBRARIES = ("torch", "transformers", "cyllama", "bitsandbytes", "peft")
CARD = Path(__file__).parent / "card.md.jinja"
REPORT = Path("eval/reports/full.json")


class Folder:
    """outputs/export/2c, and from what each step made the files in it."""

    def __init__(self, path: Path):
        self.path = path
        self.record = load(path)

    def step(self, name: str, inputs: Any, size: int, make: Callable[[Path], None]) -> None:
        """Have `make` write files into an empty folder, about `size` bytes, and move them here once all are whole.

        Nothing is done when the same inputs made the files that are here. Raises BadInput when the disk is too small.
        """
        done = self.record["steps"].get(name, {"inputs": None, "files": {}})
        if done["inputs"] == digest(inputs) and not changed(self.path, done["files"]):
            print(f"{name}: unchanged")
            return
        (self.path / SUMS).unlink(missing_ok=True)  # which says that an export is whole
        part = self.path / ".part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            need_room(part, size)
            make(part)
            files = {str(path.relative_to(part)): path for path in sorted(part.rglob("*")) if path.is_file()}
            self.record["steps"][name] = {
                "inputs": digest(inputs),
                "files": {file: hashed(path) for file, path in files.items()},
            }
            for file, path in files.items():
                path.chmod(0o644)  # safetensors makes it 0600
                (self.path / file).parent.mkdir(exist_ok=True)
                path.replace(self.path / file)
            for file in done["files"].keys() - files.keys():  # a chat template, say, that the stage has no more
                (self.path / file).unlink(missing_ok=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.save()
        print(f"{name}: {sum((self.path / file).stat().st_size for file in files) / 1e6:,.1f} MB")

    def save(self) -> None:
        write_json(self.path / RECORD, self.record)


# --- the forms --------------------------------------------------------------------------------------------------------


def write_model(row: models.Candidate, tokenizer: Tokenizer, target: Path) -> None:
    """The stage as one 16-bit model that Transformers loads, with tokenizer and decoding."""
    on_gpu = torch.cuda.is_available()
    whole = models.merged(row) if row.adapter else row
    dtype = models.MERGED_DTYPE if on_gpu else torch.float32
    [(_, model, _)] = models.loaded([whole], "cuda" if on_gpu else "cpu", dtype)
    full: Any = model
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    full.generation_config = GenerationConfig(do_sample=True, **ends, **generation.DECODING)
    try:
        full.to(models.MERGED_DTYPE).save_pretrained(target)
        tokenizer.save_pretrained(target)
    except Exception as error:  # of a full disk safetensors and tokenizers each raise their own
        raise BadInput(f"the model could not be written to {target}: {reason(error)}") from error
    mend_tokenizer(target)


def mend_tokenizer(folder: Path) -> None:
    """Take byte fallback from a byte-level tokenizer: it does nothing there, and GGUF's converter takes it for SentencePiece."""
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if (settings["pre_tokenizer"] or {}).get("type") == "ByteLevel" and settings["model"].get("byte_fallback"):
        settings["model"]["byte_fallback"] = False
        write_json(path, settings)


def write_adapter(row: models.Candidate, target: Path) -> None:
    assert row.adapter
    (target / "adapter").mkdir()
    for path in (*row.weights, row.adapter / "adapter_config.json"):
        shutil.copy(path, target / "adapter")


def write_gguf(folder: Path, name: str, form: str, target: Path) -> None:
    """F16 from the 16-bit model, the others from F16."""
    made = target / f"{name}-{form}.gguf"
    if form == "F16":
        llamacpp.convert(folder, made)
        llamacpp.check_tokenizer(made, models.load_tokenizer(folder))
    else:
        llamacpp.quantise(folder / f"{name}-F16.gguf", made, form)


def modelfile(gguf: str, chat: bool) -> str:
    """For Ollama, which takes a chat template from the GGUF, and would invent one for a model that only continues text."""
    settings = {"num_ctx": models.MAX_LENGTH, **generation.DECODING}
    settings["repeat_penalty"] = settings.pop("repetition_penalty")
    lines = [f"FROM ./{gguf}", *(f"PARAMETER {key} {value}" for key, value in settings.items())]
    return "\n".join(lines if chat else [*lines, 'TEMPLATE "{{ .Prompt }}"']) + "\n"


# --- the proof --------------------------------------------------------------------------------------------------------


def heldout(line: list[Stage]) -> tuple[Path, str]:
    """Held-out text of the stage, or of one before it when the whole book was trained on: the start of it."""
    for path in (path for stage in reversed(line) for path in stage.heldout):
        rows = path.read_bytes().splitlines()
        if text := "\n\n".join(json.loads(row)["text"] for row in rows)[:PROOF_TEXT]:
            return path, text
    raise BadInput(f"no held-out text for {line[-1].name}: nothing to prove the export on")


def measure(label: str, model: Any, tokenizer: Tokenizer, text: str) -> tuple[dict[str, Any], list[Any]]:
    """Bits per byte of a text, and speed; for each prompt the likeliest tokens with the logits they were chosen from."""
    scorer = TokenScorer(model, tokenizer, 1, label)
    [loglikelihood] = scorer.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("", 0, 1))])
    settings = {"max_new_tokens": GREEDY, "min_new_tokens": GREEDY, "output_logits": True}
    greedy, started = [], time.perf_counter()
    for prompt in PROMPTS:
        ids = torch.tensor([generation.encode(tokenizer, prompt)], device=model.device)
        mask = torch.ones_like(ids)
        written = generation.generate(model, tokenizer, settings, input_ids=ids, attention_mask=mask)
        greedy.append((written.sequences[0, ids.shape[1] :].tolist(), [step[0].float() for step in written.logits]))
    speed = len(PROMPTS) * GREEDY / (time.perf_counter() - started)
    bits = -loglikelihood / math.log(2) / len(text.encode())
    return {"bits_per_byte": bits, "tokens_per_second": round(speed, 1)}, greedy


def agreed(own: list[Any], other: list[Any]) -> int:
    """How many tokens after each prompt are equal, the fewest; a tie at the first difference ends the comparison well."""
    fewest = GREEDY
    for (tokens, logits), (found, _) in zip(own, other, strict=True):
        first = next((at for at in range(GREEDY) if tokens[at] != found[at]), None)
        if first is not None and logits[first][tokens[first]] - logits[first][found[first]] > TIE:
            fewest = min(fewest, first)
    return fewest


def prove(
    folder: Path, row: models.Candidate, forms: list[str], path: Path, text: str, tokenizer: Tokenizer, target: Path
) -> None:
    """Measure the stage and each form of it into proof.json. Raises BadInput when a form is not the stage."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows = [row, models.Candidate("model", folder, None, None, None)]
    rows += [replace(models.exported(folder / f"{row.name}-{form}.gguf"), name=form) for form in forms[1:]]
    found: dict[str, dict[str, Any]] = {}
    written: dict[str, list[Any]] = {}
    wrong = []
    for one, model, _ in models.loaded(rows, device, dtype):
        found[one.name], written[one.name] = measure(one.name, model, tokenizer, text)
        del model  # before the next is read
        difference = found[one.name]["bits_per_byte"] - found[row.name]["bits_per_byte"]
        equal = agreed(written[row.name], written[one.name])
        size = sum(path.stat().st_size for path in {*one.weights, *models.full_weights(one.model)})
        allowed = TOLERANCE.get(one.name, 0)
        found[one.name] |= {"bytes": size, "difference": difference, "tolerance": allowed, "greedy_equal": equal}
        print(f"{one.name}: {difference:+.4f} bits per byte, first {equal} greedy tokens equal")
        if not abs(difference) <= allowed:
            wrong.append(f"{one.name} is {difference:+.4f} bits per byte from {row.name}, more than {allowed}")
        elif one.name in EXACT and equal < GREEDY:
            wrong.append(f"{one.name} writes another token than {row.name} after {equal}")
    if wrong:
        raise BadInput(f"{folder} is not the stage that was measured: {'; '.join(wrong)}")
    where = models.environment(device, str(dtype).removeprefix("torch."))
    about = {"text": str(path), "characters": len(text), "environment": where}
    write_json(target / "proof.json", {**about, "forms": found})


def proof_page(proof: dict[str, Any]) -> str:
    """Size, bits per byte, difference and speed of each form, with what they were measured on."""
    head = ["form", "size", "bits per byte", "difference", "allowed", f"equal of {GREEDY} tokens", "tokens/s"]
    rows = [
        [
            name if name in TOLERANCE else f"{name}, as trained",
            f"{one['bytes'] / 1e6:,.0f} MB",
            f"{one['bits_per_byte']:.4f}",
            f"{one['difference']:+.4f}",
            *(str(one[key]) for key in ("tolerance", "greedy_equal", "tokens_per_second")),
        ]
        for name, one in proof["forms"].items()
    ]
    where = proof["environment"]
    return (
        f"{tables.markdown((head, rows))}\n\nBits per byte of {proof['characters']:,} characters of held-out text "
        f"(`{proof['text']}`), each form by the engine that runs it; tokens/s one at a time, {where['threads']} threads of "
        f"{where['cpu']}, as trained and 16 bits with Transformers on {where['device']} in {where['dtype']}, GGUF with llama.cpp."
    )


# --- the card ---------------------------------------------------------------------------------------------------------


def measured(path: Path, row: models.Candidate) -> dict[str, Any] | None:
    """The report that has this stage, or None. Raises BadInput when it is about other weights, or --report names no file."""
    found = report.load(path) if path != REPORT or path.is_file() else {"stages": {}}
    if not (stage := found["stages"].get(row.name)):
        print(f"{row.name} is not in {path}: the card has no scores (make eval)", file=sys.stderr)
        return None
    if changed(Path(), stage["weights"]):
        raise BadInput(f"{path} is about other weights than {row.name} has now: evaluate again (make eval)")
    return found


def write_card(
    line: list[Stage], record: dict[str, Any], found: dict[str, Any] | None, about: dict[str, Any], target: Path
) -> None:
    """The model card: everything on it is from trained.json, manifests, source.json, proof.json and report."""
    name, base = line[-1].name, collected(line[0].base_model)
    scores = found["stages"][name]["scores"] if found else {}
    results = [
        EvalResult("text-generation", task, task, "bits_per_byte", round(score["bits_per_byte"], 4))
        for task, score in scores.items()
        if score
    ]
    data = ModelCardData(
        language="fr", license=record["license"], base_model=base.get("repo"), model_name=f"chateau-{name}",
        library_name="transformers", pipeline_tag="text-generation", tags=["gguf", "axolotl"], eval_results=results or None,
    )  # fmt: skip
    manifests = {stage.name: json.loads(manifest_of(stage.datasets[0]).read_text(encoding="utf-8")) for stage in line}
    rows = {key: found["stages"].get(key) for key in (models.BASE, *manifests)} if found else {}
    ModelCard.from_template(
        data, str(CARD), name=name, base=base, line=line, manifests=manifests, rights=record["rights"],
        scores=tables.markdown(tables.overview(found | {"stages": rows})) if found else None,
        verdict=verdict.lines(found)[name] if found else None, decoding=generation.DECODING, window=models.MAX_LENGTH, **about,
    ).save(target / "README.md")  # fmt: skip


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="name of the recipe: 2b, 2c ...")
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="their folder (default: recipes)")
    parser.add_argument("--forms", choices=("all", "model"), default="all", help="model: no GGUF (default: all)")
    parser.add_argument("--report", type=Path, default=REPORT, help="evaluation, for the card (default: %(default)s)")
    parser.add_argument(
        "--rights", help="what you know of the rights in the texts, for the card (default: as said before)"
    )
    parser.add_argument("--license", help="of the model, as the hub names it (default: as said before, or other)")
    args = parser.parse_args()
    chain = load_chain(args.recipes)
    line = line_of(args.stage, chain)
    stage, row = line[-1], models.candidate(line[-1])
    folder = Folder(EXPORTS / stage.name)
    lock(folder.path)
    trained = check(stage, chain)
    found = measured(args.report, row)
    memorised = verdict.memorised(found["stages"][stage.name], found) if found else None
    said = {key: getattr(args, key) for key in ("rights", "license") if getattr(args, key) is not None}
    folder.record |= {"memorised": memorised, **said}
    tokenizer = models.load_tokenizer(stage.output_dir if models.has_tokenizer(stage.output_dir) else row.model)
    # GGUF files made before stay, and are made again when the stage has changed: the folder is of one stage.
    forms = [form for form in TOLERANCE if args.forms == "all" or form in {"model", *folder.record["steps"]}]

    weights = {str(path): hashed(path) for path in models.files_of(row)}
    weights |= {path.name: hashed(path) for path in stage.output_dir.glob("*token*.json*")}
    if row.adapter:
        size = sum(path.stat().st_size for path in row.weights)
        folder.step("adapter", weights, size, partial(write_adapter, row))
    size = sum(path.stat().st_size for path in models.full_weights(row.model))
    folder.step("model", [weights, generation.DECODING], size, partial(write_model, row, tokenizer))
    model = folder.record["steps"]["model"]["files"]
    for form in forms[1:]:
        folder.step(form, model, size, partial(write_gguf, folder.path, stage.name, form))
    chat = bool(tokenizer.chat_template)
    if forms[1:]:
        text = modelfile(f"{stage.name}-{forms[-1]}.gguf", chat)
        folder.step("Modelfile", text, 1_000, lambda target: write_text(target / "Modelfile", text))
    path, text = heldout(line)
    inputs = [files_of(folder.record, "proof", "card"), text, TOLERANCE, PROMPTS, TIE, versions(*LIBRARIES)]
    folder.step("proof", inputs, 10_000, partial(prove, folder.path, row, forms, path, text, tokenizer))
    proof = json.loads((folder.path / "proof.json").read_text(encoding="utf-8"))
    about = {"trained": trained, "proof_page": proof_page(proof), "forms": forms, "chat": chat}
    inputs = [about, folder.record["rights"], folder.record["license"], found, CARD.read_text(encoding="utf-8")]
    folder.step("card", inputs, 100_000, partial(write_card, line, folder.record, found, about))
    folder.save()
    write_text(folder.path / SUMS, sums(folder.record))
    if found:
        write_text(args.report.with_suffix(".export.md"), f"# Exported: {stage.name}\n\n{proof_page(proof)}\n")
    print(f"{folder.path}: {stage.name} in {', '.join(forms)}")


if __name__ == "__main__":
    run(main)
