"""The plugin that makes `seed` hold for a new adapter too: listed under `plugins` in the recipes with an adapter.

Axolotl seeds nothing until the trainer is made. By then the adapter has drawn its A matrices from a generator that torch
seeds by chance, so that no two runs of one recipe are alike.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import set_seed


class SeedAdapter(BasePlugin):
    """Seeds as the trainer will, once the base is built and right before the adapter is."""

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Called by Axolotl; `cfg.seed` is the recipe's."""
        set_seed(cfg.seed)
