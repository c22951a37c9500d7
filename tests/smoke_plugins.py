"""Axolotl plugins for the smoke test."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.kernels import lora
from bitsandbytes.functional import dequantize_4bit


class RecordWindows(BasePlugin):
    """Appends the sha256 of every window that is trained on to windows.txt, and their files to mapped.txt."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        with Path("mapped.txt").open("a") as file:
            file.writelines(part["filename"] + "\n" for part in trainer.train_dataset.cache_files)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        def record(embeddings: Any, inputs: Any) -> None:
            if embeddings.training:
                with Path("windows.txt").open("a") as file:
                    file.writelines(hashlib.sha256(window.numpy()).hexdigest() + "\n" for window in inputs[0])

        model.get_input_embeddings().register_forward_pre_hook(record)


class KeepRows(BasePlugin):
    """Copies the tokenised rows, which are removed after the training, to rows/OUTPUT."""

    def pre_model_load(self, cfg: Any) -> None:
        shutil.copytree(cfg.dataset_prepared_path, Path("rows") / Path(cfg.output_dir).name)


class KernelsOnCpu(BasePlugin):
    """Axolotl's LoRA kernels of attention are made of torch's products, but dequantise by CUDA alone: here by bitsandbytes."""

    def register(self, cfg: Any) -> None:
        def dequantize(weight: Any, state: Any = None) -> Any:
            if state is None:
                return weight
            return dequantize_4bit(weight.t(), state).t() if len(weight) == 1 else dequantize_4bit(weight, state)

        lora.dequantize = dequantize


class RecordPairs(BasePlugin):
    """Appends the tokens and labels of every pair that is trained on to pairs.jsonl."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        collate = trainer.data_collator

        def record(rows: Any) -> Any:
            batch = collate(rows)
            sides = {name: batch[name].tolist() for name in batch if name.endswith(("_input_ids", "_labels"))}
            with Path("pairs.jsonl").open("a") as file:
                file.write(json.dumps(sides) + "\n")
            return batch

        trainer.data_collator = record
