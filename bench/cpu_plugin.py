"""Axolotl's `bf16: true` on a CPU: Transformers asks for `use_cpu` with it, for which Axolotl has no key."""

from typing import Any

from axolotl.integrations.base import BasePlugin


class Plugin(BasePlugin):
    """Listed under `plugins` in bench/train.yml."""

    def get_training_args(self, cfg: Any) -> dict[str, bool]:
        """What Axolotl hands on to the trainer besides its own."""
        return {"use_cpu": True}
