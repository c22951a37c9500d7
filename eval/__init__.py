"""Models -> reports."""

import logging

# torchao names each CUDA kernel that a CPU cannot load, and torch a deprecation in torchao: neither is the user's.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
