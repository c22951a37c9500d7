"""An Axolotl plugin for the smoke test: appends the sha256 of every window that is trained on to windows.txt."""

import hashlib
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin


class RecordWindows(BasePlugin):
    def post_model_load(self, cfg: Any, model: Any) -> None:
        def record(embeddings: Any, inputs: Any) -> None:
            if embeddings.training:
                with Path("windows.txt").open("a") as file:
                    file.writelines(hashlib.sha256(window.numpy()).hexdigest() + "\n" for window in inputs[0])

        model.get_input_embeddings().register_forward_pre_hook(record)
