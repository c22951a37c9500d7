"""What the training bench needs of Axolotl beyond its keys: bf16 on a CPU, and one order of rows for every seed."""

from typing import Any

from axolotl.common.datasets import TrainDatasetMeta, load_datasets

from train.plugins import SeedAdapter

ORDER = 42


class Plugin(SeedAdapter):
    """Listed under `plugins` in bench/train.yml, where it stands for the recipes' own, Liger's being for CUDA."""

    def get_training_args(self, cfg: Any) -> dict[str, bool]:
        """What Axolotl hands on to the trainer besides its own: it has no key for `use_cpu`, without which no bf16."""
        return {"use_cpu": True}

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta:
        """Axolotl's own, with rows shuffled by `ORDER`.

        Axolotl shuffles by the run's seed as it tokenises, and keeps that order for every later run, so that a result
        would depend on whose seed came first. The trainer shuffles again, by the run's seed.
        """
        seed, cfg.seed = cfg.seed, ORDER
        try:
            return load_datasets(cfg=cfg)
        finally:
            cfg.seed = seed
