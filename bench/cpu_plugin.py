"""Axolotl's `bf16: true` on a CPU: Transformers asks for `use_cpu` with it, for which Axolotl has no key."""

from typing import Any

from train.seed import SeedAdapter


class Plugin(SeedAdapter):
    """Listed under `plugins` in bench/train.yml, where it stands for the recipes' own, Liger's being for CUDA."""

    def get_training_args(self, cfg: Any) -> dict[str, bool]:
        """What Axolotl hands on to the trainer besides its own."""
        return {"use_cpu": True}
