"""Axolotl plugins for the smoke test."""

import hashlib
import json
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.kernels import lora
from bitsandbytes.functional import dequantize_4bit


class RecordWindows(BasePlugin):
    """Appends the sha256 of every window that is trained on to windows.txt."""

    def post_model_load(self, cfg: Any, model: Any) -> None:
        def record(embeddings: Any, inputs: Any) -> None:
            if embeddings.training:
                with Path("windows.txt").open("a") as file:
                    file.writelines(hashlib.sha256(window.numpy()).hexdigest() + "\n" for window in inputs[0])

        model.get_input_embeddings().register_forward_pre_hook(record)


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
