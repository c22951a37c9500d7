"""Axolotl's own slicing and dropping, called in this process."""

from pathlib import Path

import datasets


def axolotl_windows(texts: list[str], tokenizer_folder: Path, sequence_len: int) -> tuple[list[int], list[list[int]]]:
    """What `type: completion` makes of rows: the length of every slice, then the slices that `min_sample_len` leaves."""
    from axolotl.datasets import TokenizedPromptDataset
    from axolotl.prompt_strategies.completion import load
    from axolotl.utils.data.utils import handle_long_seq_in_dataset
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    cfg = DictDefault(sequence_len=sequence_len, min_sample_len=sequence_len, train_on_inputs=False)
    strategy = load(AutoTokenizer.from_pretrained(tokenizer_folder), cfg)
    dataset = TokenizedPromptDataset(strategy, datasets.Dataset.from_dict({"text": texts}))
    lengths = [len(ids) for ids in dataset["input_ids"]]
    kept = handle_long_seq_in_dataset(dataset, sequence_len, cfg)
    return lengths, list(kept["input_ids"])
