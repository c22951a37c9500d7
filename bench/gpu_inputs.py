"""What the bench trains on: a checkpoint with random weights, its tokenizer, rows of random text, an adapter to continue.

Speed and memory do not depend on the values of weights or tokens, so nothing has to be downloaded.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PretrainedConfig

from prep.common import BadInput, atomic_write
from train.memory import with_adapter
from train.stages import Stage

WINDOWS_A_ROW = 16  # as the rows of the recipes have at most
SPECIALS = ["<unk>", "<s>", "</s>"]


def save_tokenizer(vocabulary: int, folder: Path) -> None:
    """A tokenizer whose pieces are whole words (w3 ... w31999), so that a text of n words has n tokens; BOS is added."""
    words = {word: index for index, word in enumerate(SPECIALS)}
    words |= {f"w{index}": index for index in range(len(SPECIALS), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIALS)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_rows(path: Path, tokens: int, sequence_len: int, vocabulary: int) -> None:
    """Rows of 16 windows exactly, counting BOS; the EOS that Axolotl adds is a tail of one token, which it drops."""
    generator = random.Random(sequence_len)
    words = [f"w{index}" for index in range(len(SPECIALS), vocabulary)]
    rows = max(1, tokens // (WINDOWS_A_ROW * sequence_len))
    with atomic_write(path) as handle:
        for _ in range(rows):
            text = " ".join(generator.choices(words, k=WINDOWS_A_ROW * sequence_len - 1))
            handle.write(json.dumps({"text": text}) + "\n")


def bytes_needed(config: PretrainedConfig, tokens: int, stages: int) -> int:
    """Disk for the checkpoint in bf16, the adapters, the rows and their tokenised copies (ids, mask, labels, positions)."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    return 2 * parameters + stages * (tokens * (7 + 4 + 1 + 8 + 8) + 2**28)


def check_disk(folder: Path, needed: int) -> None:
    """Raises BadInput when the disk of `folder` has less than `needed` bytes free."""
    there = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise BadInput(
            f"{folder} needs {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} are free; "
            f"make room, or name another folder with --work"
        )


def save_checkpoint(config: PretrainedConfig, folder: Path) -> None:
    """Random weights in bf16, and a tokenizer of the same vocabulary."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(config.vocab_size, folder)


def save_adapter(base: Path, recipe: dict[str, Any], folder: Path) -> None:
    """A new adapter as `recipe` makes it, for a recipe that continues one."""
    with_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), recipe).save_pretrained(folder)


def make_inputs(work: Path, config: PretrainedConfig, chain: list[Stage], tokens: int) -> None:
    """Everything the recipes of `chain` read, under the paths they read it from. Made once for one set of arguments."""
    wanted = {
        "model": config.to_diff_dict(),
        "tokens": tokens,
        "recipes": {stage.name: [stage.config.get("lora_r"), stage.config["sequence_len"]] for stage in chain},
    }
    ours, stamp = work / "made-by-bench-gpu", work / "inputs.json"
    if work.exists() and any(work.iterdir()) and not ours.exists():
        raise BadInput(f"{work} holds other things; name an empty or a new folder with --work")
    if stamp.exists() and json.loads(stamp.read_text()) == json.loads(json.dumps(wanted)):
        return
    check_disk(work, bytes_needed(config, tokens, len(chain)))
    work.mkdir(parents=True, exist_ok=True)
    ours.touch()
    stamp.unlink(missing_ok=True)
    for folder in ("models", "outputs", "data"):
        shutil.rmtree(work / folder, ignore_errors=True)
    made_by = {stage.output_dir: stage for stage in chain}
    first = work / chain[0].base_model
    print(f"making a checkpoint with random weights in {first}", flush=True)
    save_checkpoint(config, first)
    for stage in chain:
        base = work / stage.base_model
        if not base.exists():  # the output of an earlier stage: the same weights serve
            base.parent.mkdir(parents=True, exist_ok=True)
            base.symlink_to(first.absolute(), target_is_directory=True)
        if stage.adapter_from:
            save_adapter(first, made_by[stage.adapter_from].config, work / stage.adapter_from)
        for path in stage.datasets:
            save_rows(work / path, tokens, stage.config["sequence_len"], config.vocab_size)
    with atomic_write(stamp) as handle:
        json.dump(wanted, handle, indent=1)
