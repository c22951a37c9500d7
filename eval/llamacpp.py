"""GGUF files: made by llama.cpp's converter and quantiser, and run by llama.cpp as a model that Transformers can call.

    model, tokenizer = llamacpp.load(Path("outputs/export/2c/2c-Q4_K_M.gguf"))

`Engine` gives logits to whatever takes a causal language model: eval/scoring.py scores it and `generate` samples from it, so
a GGUF is measured and read exactly as the stage was. The rest is llama.cpp's: no layer is computed here.
"""

import importlib
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast

from eval.models import MAX_LENGTH
from prep.common import BadInput, reason

CONVERTER = Path(sys.prefix) / "converter"  # a folder of its own: it brings another `gguf` than Transformers reads with
QUANTISED = {"Q8_0": 7, "Q4_K_M": 15}  # llama.cpp's enum llama_ftype
BATCH = 512  # tokens that go through the model together
# What French has and a broken vocabulary loses: accents, also apart from their letter, guillemets, both apostrophes,
# dashes, ellipsis, spaces of three kinds and at the start, line ends, digits, what only bytes can write.
FRENCH = (
    "  « Où est-ce qu’il va, l'hôte ? » Ça, à 18 h 30 — Noël, nai\u0308veté, cœur…\n\n– Qu’importe\u202f!\n"
    "\t«\u00a0Il   s'arrêta, 1922.\u00a0» 😀🇫🇷 и 本\n"
)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a process of its own: llama.cpp ends the whole process on much that is wrong."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _silent) as pool:
        return pool.submit(function, *arguments).result()


def _silent() -> None:
    """No bars, and no last words of a C++ library: exceptions reach the caller without stderr."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def library() -> Any:
    """llama.cpp's own functions, silent. Raises BadInput when they are not installed."""
    try:
        found = importlib.import_module("cyllama.llama.llama_cpp")
    except ImportError as error:
        raise BadInput("llama.cpp (the package cyllama) is not installed: `make setup` installs it") from error
    found.disable_logging()
    return found


# --- making -----------------------------------------------------------------------------------------------------------


def convert(model: Path, target: Path) -> None:
    """Write a model folder as an F16 GGUF. Raises BadInput when the converter is missing or does not know the model."""
    apart(_convert, model, target)


def _convert(model: Path, target: Path) -> None:
    sys.path.insert(0, str(CONVERTER))
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        del sys.modules[name]  # Transformers' own
    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
    try:
        conversion: Any = importlib.import_module("conversion")
        base: Any = importlib.import_module("conversion.base")
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise BadInput(f"llama.cpp's converter is not installed in {CONVERTER}: `make setup` installs it") from error
    logging.disable(logging.WARNING)
    known = base.TextModel.get_vocab_base_pre

    def split(self: Any, tokenizer: Any) -> str:
        """How the vocabulary's maker splits words, which GGUF names; an unknown one is taken for GPT-2's, and checked later."""
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    def score(self: Any, token: int) -> float:
        """The rank of the merge that makes a piece, which decides how words are cut; the converter gives all the same."""
        return ranks.get(self.tokenizer.convert_ids_to_tokens(token), -1e6)

    base.TextModel.get_vocab_base_pre = split
    gguf.LlamaHfVocab.get_token_score = score
    merges = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"].get("merges", [])
    ranks = {
        "".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(merges)))
    }  # a piece's first merge counts
    try:
        settings = conversion.ModelBase.load_hparams(model, False)
        architecture = conversion.get_model_architecture(settings, conversion.ModelType.TEXT)
        with torch.inference_mode():
            conversion.get_model_class(architecture)(
                model, gguf.LlamaFileType.MOSTLY_F16, target, hparams=settings
            ).write()
    except OSError as error:
        raise BadInput(f"llama.cpp's converter cannot write {target}: {error.strerror}") from error
    except Exception as error:  # it has no exceptions of its own
        raise BadInput(f"llama.cpp's converter cannot convert {model}: {reason(error)}") from error


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Raises BadInput when the GGUF does not cut French into the tokens that the model was trained on."""
    try:
        found = apart(_tokens, path, FRENCH)
    except (BrokenProcessPool, ValueError):  # of a base with more rows than tokens too
        found = None
    if found != tokenizer.encode(FRENCH, add_special_tokens=False):
        raise BadInput(
            f"{path.name} cuts text into other tokens than the model was trained on: GGUF cannot carry this tokenizer; "
            "share the 16-bit model alone (make merge)"
        )


def _tokens(path: Path, text: str) -> list[int]:
    llama = library()
    model = llama.LlamaModel(
        str(path), llama.LlamaModelParams(), verbose=False
    )  # alive as long as its vocabulary is used
    return list(model.get_vocab().tokenize(text, False, False))


def quantise(source: Path, target: Path, form: str) -> None:
    """Write a GGUF in one of QUANTISED, as llama.cpp mixes it. Raises BadInput when that fails."""
    try:
        apart(_quantise, str(source), str(target), QUANTISED[form])
    except (RuntimeError, BrokenProcessPool) as error:
        raise BadInput(f"llama.cpp could not write {target.name}: {reason(error)}; is the disk full?") from error


def _quantise(source: str, target: str, file_type: int) -> None:
    llama = library()
    settings = llama.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread = file_type, torch.get_num_threads()
    llama.model_quantize(source, target, settings)


# --- running ----------------------------------------------------------------------------------------------------------


def load(path: Path) -> tuple["Engine", Tokenizer]:
    """A GGUF and its tokenizer: that of the folder it is in, or else its own. Raises BadInput when either cannot be read."""
    beside = (path.parent / "tokenizer.json").is_file()
    try:
        options: dict[str, Any] = {} if beside else {"gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, local_files_only=True, **options)
    except Exception as error:  # each of three libraries raises its own
        raise BadInput(f"the tokenizer of {path} cannot be read: {reason(error)}") from error
    check_tokenizer(path, tokenizer)
    return Engine(path), tokenizer


class Engine(PreTrainedModel, GenerationMixin):
    """A GGUF as a causal language model on the CPU. It remembers the tokens it has seen, and computes only the new ones."""

    main_input_name = "input_ids"

    def __init__(self, path: Path):
        llama = library()

        class Model(llama.LlamaModel):  # type: ignore[name-defined]
            @property
            def n_vocab(self) -> int:  # cyllama 0.2.18 asks the model for it, where it no longer is
                return int(self.get_vocab().n_vocab)

        try:
            opened = Model(str(path), llama.LlamaModelParams(), verbose=False)
        except Exception as error:  # ValueError, RuntimeError, by the version
            raise BadInput(f"llama.cpp cannot open {path}: {reason(error)}") from error
        vocabulary = opened.get_vocab()
        settings: dict[str, Any] = {
            "vocab_size": vocabulary.n_vocab,
            "max_position_embeddings": opened.n_ctx_train,
            "bos_token_id": vocabulary.token_bos(),
            "eos_token_id": vocabulary.token_eos(),
            "use_cache": False,
        }
        super().__init__(PreTrainedConfig(**settings))
        self.llama, self.opened = llama, opened
        self.size = (0, 0)  # sequences, and tokens of each, that there is room for
        self.held: list[list[int]] = []  # the tokens that llama.cpp remembers of each sequence

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is llama.cpp's

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "logits_to_keep": 1}

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0, **_: Any) -> CausalLMOutputWithPast:
        """Logits [sequences, tokens, vocabulary] of the last `logits_to_keep` tokens, 0 for all."""
        rows = input_ids.tolist()
        length = len(rows[0])
        before = length - (logits_to_keep or length)
        self.make_room(len(rows), length)
        for sequence, row in enumerate(rows):
            known = common(self.held[sequence], row[:before])
            if known < before and (shared := common(self.held[0], row[:before])) > known:  # the prompt is computed once
                self.context.memory_seq_rm(sequence, 0, -1)
                self.context.memory_seq_cp(0, sequence, 0, shared)
                known = shared
            self.context.memory_seq_rm(sequence, known, -1)
            self.held[sequence] = row
            self.decode([(sequence, at, row[at]) for at in range(known, before)])
        last = [(sequence, at, row[at]) for sequence, row in enumerate(rows) for at in range(before, length)]
        logits: Any = self.decode(last, wanted=True).view(len(rows), length - before, -1)
        return CausalLMOutputWithPast(logits=logits)

    def make_room(self, sequences: int, length: int) -> None:
        """A context for so many sequences of so many tokens; one that is too small is made again, and is empty then."""
        if sequences <= self.size[0] and length <= self.size[1]:
            return
        self.size = (max(sequences, self.size[0]), max(length, self.size[1], MAX_LENGTH))
        settings = self.llama.LlamaContextParams()
        settings.n_seq_max, settings.n_ctx = self.size[0], self.size[0] * self.size[1]
        settings.kv_unified = True  # sequences share the tokens they begin with
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = self.llama.LlamaContext(self.opened, settings, verbose=False)
        self.held = [[] for _ in range(self.size[0])]

    def decode(self, tokens: list[tuple[int, int, int]], wanted: bool = False) -> torch.Tensor:
        """Have llama.cpp compute and remember each (sequence, position, token); the logits after each, when wanted."""
        found = torch.empty(len(tokens) if wanted else 0, self.config.vocab_size)
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            batch = self.llama.LlamaBatch(n_tokens=len(part), embd=0, n_seq_max=1)
            for sequence, at, token in part:
                batch.add(token, at, [sequence], wanted)
            self.context.decode(batch)
            for place in range(len(part)) if wanted else ():
                found[first + place] = torch.from_numpy(np.array(self.context.get_logits_ith(place), dtype=np.float32))
        return found


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
