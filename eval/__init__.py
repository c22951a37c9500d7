"""Models -> reports."""

import prep.command  # noqa: F401 (silences libraries in the notebook too)

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything read is a local file
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
