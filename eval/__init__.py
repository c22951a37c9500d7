"""Models -> reports."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything read is a local file
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# torchao names each CUDA kernel that a CPU cannot load, and torch a deprecation in torchao: neither is the user's.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
