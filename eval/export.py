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
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything read is a local file
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from lm_eval.api.instance import Instance
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from eval import evaluation, generation, llamacpp, models, report, tables, verdict
from eval.push import SUMS, Folder
from eval.scoring import MAX_LENGTH, TokenScorer, figures
from prep.common import BadInput, atomic_write, collected, digest, hashed, lock, reason, run, versions
from train.gate import check, manifest_of
from train.stages import Stage, line_of, load_chain

# The forms in the order they are made, and how far each may be from the stage, in bits per byte (either way). The merged
# weights are rounded to 16 bits once; llama.cpp computes with 16-bit activations; Q8_0 and Q4_K_M lose what they lose: about
# 0.01 and 0.05 for a model of 135 M parameters, less for larger ones. More is a damaged file, not a small one.
TOLERANCE = {"model": 0.002, "F16": 0.005, "Q8_0": 0.02, "Q4_K_M": 0.12}
EXACT = ("model", "F16")  # these also write what the stage writes: GREEDY tokens after each prompt
GREEDY = 32
TIE = 0.05  # nats: two tokens nearer than this may change places with the order of additions
PROOF_TOKENS = MAX_LENGTH  # of held-out text, at most: the same text for each form, so their differences are exact
PROMPTS = ("Le soir tombait quand", "— Je ne vous ai pas vu hier, dit-elle.", "Au bout du couloir, il y avait")


# --- the forms --------------------------------------------------------------------------------------------------------


def decoding() -> dict[str, Any]:
    """What samples and continuations are drawn with, without a length."""
    return {key: value for key, value in generation.decoding(0).items() if key != "max_new_tokens"}


def write_model(row: models.Candidate, tokenizer: Tokenizer, target: Path) -> None:
    """The stage as one 16-bit model that Transformers loads, with tokenizer and decoding."""
    on_gpu = torch.cuda.is_available()
    whole = models.merged(row) if row.adapter else row
    [(_, model, _)] = models.loaded(
        [whole], "cuda" if on_gpu else "cpu", models.MERGED_DTYPE if on_gpu else torch.float32
    )
    full: Any = model
    full.generation_config = GenerationConfig(
        do_sample=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **decoding()
    )
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
        settings["decoder"] = settings["pre_tokenizer"]
        with atomic_write(path) as file:
            json.dump(settings, file, ensure_ascii=False)


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


def write_modelfile(name: str, form: str, chat: bool, target: Path) -> None:
    """For Ollama, which takes a chat template from the GGUF, and would invent one for a model that only continues text."""
    lines = [f"FROM ./{name}-{form}.gguf", f"PARAMETER num_ctx {MAX_LENGTH}"]
    names = {"repetition_penalty": "repeat_penalty"}
    lines += [f"PARAMETER {names.get(key, key)} {value}" for key, value in decoding().items()]
    lines += [] if chat else ['TEMPLATE "{{ .Prompt }}"']
    with atomic_write(target / "Modelfile") as file:
        file.write("\n".join(lines) + "\n")


# --- the proof --------------------------------------------------------------------------------------------------------


def heldout(line: list[Stage], tokenizer: Tokenizer) -> tuple[Path, list[str]]:
    """Held-out text of the stage, or of one before it when the whole book was trained on: PROOF_TOKENS at most."""
    for stage in reversed(line):
        for path in stage.heldout:
            texts, left = [], PROOF_TOKENS
            for row in path.read_text(encoding="utf-8").splitlines():
                text = json.loads(row).get("text", "")
                ends = [end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]][:left]
                texts += [text[: ends[-1]]] if ends else []
                left -= len(ends)
            if any(texts):
                return path, texts
    raise BadInput(f"no held-out text for {line[-1].name}: nothing to prove the export on")


def measure(label: str, model: Any, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """Bits per byte of the texts, and for each prompt the likeliest tokens with the logits they were chosen from."""
    scorer = TokenScorer(model, tokenizer, 1, label)
    jobs = [Instance("loglikelihood_rolling", {}, (text,), 0, ("proof", at, 1)) for at, text in enumerate(texts)]
    nll = -sum(scorer.loglikelihood_rolling(jobs))
    sizes = {"tokens": sum(map(len, scorer.logprobs.values())), "bytes": sum(len(text.encode()) for text in texts)}
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=GREEDY, min_new_tokens=GREEDY, output_logits=True, return_dict_in_generate=True,
        pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model.generation_config = settings  # else its own would fill whatever these leave unsaid
    greedy, started = [], time.perf_counter()
    for prompt in PROMPTS:
        ids = torch.tensor([generation.encode(tokenizer, prompt)], device=model.device)
        with torch.inference_mode():
            written = model.generate(ids, generation_config=settings, attention_mask=torch.ones_like(ids))
        greedy.append((written.sequences[0, ids.shape[1] :].tolist(), [step[0].float() for step in written.logits]))
    speed = len(PROMPTS) * GREEDY / (time.perf_counter() - started)
    bits = figures(nll, **sizes, words=1)["bits_per_byte"]
    return {"bits_per_byte": bits, **sizes, "tokens_per_second": round(speed, 1), "greedy": greedy}


def agreed(own: list[Any], other: list[Any]) -> int:
    """How many tokens after each prompt are equal, the fewest; a tie at the first difference ends the comparison well."""
    fewest = GREEDY
    for (tokens, logits), (found, _) in zip(own, other, strict=True):
        differing = [at for at in range(GREEDY) if tokens[at] != found[at]]
        if differing and logits[differing[0]][tokens[differing[0]]] - logits[differing[0]][found[differing[0]]] > TIE:
            fewest = min(fewest, differing[0])
    return fewest


def prove(folder: Folder, row: models.Candidate, line: list[Stage], tokenizer: Tokenizer, forms: list[str]) -> None:
    """Measure the stage and every form of it, into the record. Raises BadInput when a form is not the stage."""
    path, texts = heldout(line, tokenizer)
    name = line[-1].name
    inputs = digest([folder.files("card"), digest(texts), TOLERANCE, PROMPTS, TIE, versions(*LIBRARIES)])
    if folder.record["proof"].get("inputs") == inputs:
        print("proof: unchanged")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = models.DTYPES["bfloat16" if device == "cuda" else "float32"]
    [(_, model, _)] = models.loaded([row], device, dtype)
    own = measure(name, model, tokenizer, texts)
    del model
    proof: dict[str, Any] = {
        "text": str(path),
        **{key: own[key] for key in ("tokens", "bytes", "bits_per_byte", "tokens_per_second")},
    }
    proof |= {"inputs": inputs, "forms": {}, "environment": evaluation.environment(device, str(dtype).split(".")[1])}
    wrong = []
    for form in forms:
        file = "model.safetensors" if form == "model" else f"{name}-{form}.gguf"
        engine: Any
        if form == "model":
            engine = models.load_model(folder.path, tokenizer, device, dtype)
        else:
            engine = llamacpp.Engine(folder.path / file)
        found = measure(form, engine, tokenizer, texts)
        del engine
        difference, equal = found["bits_per_byte"] - own["bits_per_byte"], agreed(own["greedy"], found["greedy"])
        size = sum(path.stat().st_size for path in folder.path.glob(file if form != "model" else "model*.safetensors"))
        proof["forms"][form] = {"bytes": size, "bits_per_byte": found["bits_per_byte"], "difference": difference}
        proof["forms"][form] |= {"greedy_equal": equal, "tolerance": TOLERANCE[form]}
        proof["forms"][form]["tokens_per_second"] = found["tokens_per_second"]
        print(
            f"{form}: {found['bits_per_byte']:.4f} bits per byte ({difference:+.4f}), first {equal} greedy tokens equal"
        )
        if not abs(difference) <= TOLERANCE[form]:
            wrong.append(f"{form} is {difference:+.4f} bits per byte from {name}, more than {TOLERANCE[form]}")
        elif form in EXACT and equal < GREEDY:
            wrong.append(f"{form} writes another token than {name} after {equal}")
    if wrong:
        folder.record["proof"] = {}
        folder.save()
        raise BadInput(f"{folder.path} is not the stage that was measured: {'; '.join(wrong)}")
    folder.record["proof"] = proof
    folder.save()


LIBRARIES = ("torch", "transformers", "cyllama", "bitsandbytes", "peft")


# --- the card ---------------------------------------------------------------------------------------------------------


def measured_stage(path: Path, row: models.Candidate) -> dict[str, Any] | None:
    """The report that has this stage's weights; None when there is none. Raises BadInput when it is about others."""
    if not path.is_file():
        return None
    found = report.load(path)
    stage = found["stages"].get(row.name)
    if stage is None:
        return None
    if stage["weights"] != {name: hashed(Path(name)) for name in stage["weights"] if Path(name).is_file()}:
        raise BadInput(f"{path} is about other weights than {row.name} has now: evaluate again (make eval)")
    return found


def card(
    folder: Folder, line: list[Stage], trained: dict[str, Any], found: dict[str, Any] | None, rights: str, license: str
) -> ModelCard:
    """The model card: everything on it is from trained.json, manifests, source.json and report."""
    name, base = line[-1].name, collected(line[0].base_model)
    scores = found["stages"][name]["scores"] if found else {}
    results = [
        EvalResult(
            "text-generation",
            task,
            task,
            "bits_per_byte",
            round(score["bits_per_byte"], 4),
            metric_name="bits per byte",
        )
        for task, score in scores.items()
        if score
    ]
    data = ModelCardData(
        language="fr",
        license=license,
        base_model=base.get("repo"),
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=f"chateau-{name}",
        eval_results=results or None,
        tags=["gguf", "axolotl"],
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    manifests = {stage.name: json.loads(manifest_of(stage.datasets[0]).read_text(encoding="utf-8")) for stage in line}
    wanted = ("base", *(stage.name for stage in line))
    shown = found and found | {"stages": {key: found["stages"].get(key) for key in wanted if key in found["stages"]}}
    text = environment.get_template("card.md.jinja").render(
        name=name,
        base=base,
        line=line,
        trained=trained,
        manifests=manifests,
        rights=rights,
        scores=tables.markdown(tables.overview(shown)) if shown else None,
        verdict=verdict.lines(found)[name] if found else None,
        proof_page=proof_page(folder.record["proof"], name),
        forms=list(folder.record["proof"]["forms"]),
        decoding=decoding(),
        window=MAX_LENGTH,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def proof_table(proof: dict[str, Any], name: str) -> tables.Table:
    """Size, bits per byte, difference and speed of each form, under the stage's own."""
    own = [tables.number(proof["bits_per_byte"], 4), "–", "–", "–", tables.number(proof["tokens_per_second"], 1)]
    rows = [[f"{name}, as trained", "–", *own]]
    for form, one in proof["forms"].items():
        figures = [f"{one['bytes'] / 1e6:,.0f} MB", tables.number(one["bits_per_byte"], 4), f"{one['difference']:+.4f}"]
        figures += [str(one["tolerance"]), str(one["greedy_equal"]), tables.number(one["tokens_per_second"], 1)]
        rows.append([form, *figures])
    return ["form", "size", "bits per byte", "difference", "allowed", f"equal of {GREEDY} tokens", "tokens/s"], rows


def proof_page(proof: dict[str, Any], name: str) -> str:
    """The table with what it was measured on."""
    where = proof["environment"]
    return (
        f"{tables.markdown(proof_table(proof, name))}\n\nBits per byte of {proof['tokens']:,} tokens of held-out text "
        f"(`{proof['text']}`), each form by the engine that runs it; tokens/s one at a time, {where['threads']} threads of "
        f"{where['cpu']}, as trained and 16 bits with Transformers on {where['device']} in {where['dtype']}, GGUF with llama.cpp."
    )


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="name of the recipe: 2b, 2c ...")
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="their folder (default: recipes)")
    parser.add_argument("--out", type=Path, default=Path("outputs/export"), help="folder of the exports")
    parser.add_argument("--forms", nargs="+", choices=TOLERANCE, default=list(TOLERANCE), help="default: all")
    parser.add_argument(
        "--report", type=Path, default=Path("eval/reports/full.json"), help="the evaluation, for the card"
    )
    parser.add_argument("--rights", default="", help="what you know of the rights in the texts, for the card")
    parser.add_argument("--license", default="other", help="of the model, as the hub names it (default: other)")
    args = parser.parse_args()
    chain = load_chain(args.recipes)
    line = line_of(args.stage, chain)
    stage, row = line[-1], models.candidate(line[-1])
    folder = Folder(args.out / stage.name)
    lock(folder.path)
    trained = check(stage, chain)
    found = measured_stage(args.report, row)
    # Those made before stay, and are made again when the stage has changed: the folder is of one stage.
    forms = [form for form in TOLERANCE if form in {"model", *args.forms, *folder.record["steps"]}]
    tokenizer = models.load_tokenizer(stage.output_dir if models.has_tokenizer(stage.output_dir) else row.model)

    weights = {str(path): hashed(path) for path in evaluation.files_of(row)}
    weights |= {path.name: hashed(path) for path in stage.output_dir.glob("*token*.json*")}
    size = sum(path.stat().st_size for path in models.full_weights(row.model))
    if row.adapter:
        own = sum(path.stat().st_size for path in row.weights)
        folder.step("adapter", weights, own, lambda target: write_adapter(row, target))
    folder.step("model", [weights, decoding()], size, lambda target: write_model(row, tokenizer, target))
    model = folder.record["steps"]["model"]["files"]
    for form in forms[1:]:
        if "F16" not in forms:
            raise BadInput(f"{form} is made from F16: ask for both (--forms F16 {form})")
        folder.step(form, model, size, partial(write_gguf, folder.path, stage.name, form))
    if "F16" in forms:
        chat = bool(tokenizer.chat_template)
        ollama = [stage.name, forms[-1], chat, decoding()]
        folder.step("Modelfile", ollama, 1_000, lambda target: write_modelfile(stage.name, forms[-1], chat, target))
    prove(folder, row, line, tokenizer, forms)

    def write_card(target: Path) -> None:
        card(folder, line, trained, found, args.rights, args.license).save(target / "README.md")

    about = [
        trained,
        digest(found),
        args.rights,
        args.license,
        folder.record["proof"],
        (Path(__file__).parent / "card.md.jinja").read_text(),
    ]
    memorised = verdict.memorised(found["stages"][stage.name], found) if found else None
    folder.record |= {"stage": stage.name, "rights": args.rights, "memorised": memorised}
    folder.step("card", about, 100_000, write_card)
    with atomic_write(folder.path / SUMS) as file:
        file.writelines(f"{sha}  {name}\n" for name, sha in sorted(folder.files().items()))
    if found:
        with atomic_write(args.report.with_suffix(".export.md")) as file:
            file.write(f"# Exported: {stage.name}\n\n{proof_page(folder.record['proof'], stage.name)}\n")
    print(f"{folder.path}: {stage.name} in {', '.join(forms)}")


if __name__ == "__main__":
    run(main)
