"""Models -> reports."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything read is a local file
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where a processor has avx512_bf16, bitsandbytes warns that it found no kernel on the hub; train/dequantise.py does without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
