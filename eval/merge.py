"""Merge a stage's adapter into its base: one full model in 16 bits, which scores as the adapter does on its quantised base.

    python eval/merge.py 2c          outputs/2c -> outputs/2c/merged    (make merge STAGE=2c)

The folder loads with Transformers alone, and is what to share: an adapter is right only on the base it was trained on,
quantised as its recipe says (train/dequantise.py). `axolotl merge-lora` would take the adapter in `lora_model_dir`, the
stage before, and an unquantised base or one with other layers quantised.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from eval import models
from prep.common import BadInput, lock, reason, run
from train.gate import check
from train.stages import line_of, load_chain


def save_merged(adapter: models.Candidate, target: Path) -> int:
    """Merge an adapter into its base as it was quantised, and save model and tokenizer; returns the number of weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    [(_, model, tokenizer)] = models.loaded([models.merged(adapter)], device, dtype)
    making = target.with_name(f"{target.name}.part")  # renamed when it is whole
    shutil.rmtree(making, ignore_errors=True)
    full: Any = model
    try:
        full.to(models.MERGED_DTYPE).save_pretrained(making)
        tokenizer.save_pretrained(making)
        shutil.rmtree(target, ignore_errors=True)
        making.rename(target)
    except Exception as error:  # of a full disk safetensors and tokenizers each raise their own
        raise BadInput(f"the model could not be written to {target}: {reason(error)}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return int(full.num_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="name of the recipe: 2b, 2c ...")
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="their folder (default: recipes)")
    args = parser.parse_args()
    chain = load_chain(args.recipes)
    stage = line_of(args.stage, chain)[-1]
    if not stage.adapter:
        raise BadInput(f"{stage.name} trains every weight: {stage.output_dir} is a full model already")
    target = stage.output_dir / "merged"
    lock(target)
    check(stage, chain)
    weights = save_merged(models.candidate(stage), target)
    print(f"{target}: {stage.name} and its base as one model, {weights:,} weights in 16 bits")


if __name__ == "__main__":
    run(main)
