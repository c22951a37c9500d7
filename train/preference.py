"""An Axolotl plugin for preference training on passages that are cut in mid-text, listed in recipes/2d.yml."""

from typing import Any

from train.plugins import SeedAdapter


class MidText(SeedAdapter):
    """Takes out the EOS that TRL appends to both sides of a pair: the model would learn to stop there."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        end = trainer.processing_class.eos_token_id
        trainer.train_dataset = trainer.train_dataset.map(without_end, fn_kwargs={"end": end})


def without_end(row: dict[str, Any], end: int) -> dict[str, Any]:
    """A pair as TRL has tokenised it, without the EOS that ends a side: `chosen_input_ids` of ORPO, `chosen_ids` of DPO."""
    for side in ("chosen_", "rejected_"):
        lists = [name for name in row if name.startswith(side)]
        if any(row[name][-1:] == [end] for name in lists):
            row |= {name: row[name][:-1] for name in lists}
    return row
