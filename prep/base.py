"""A base model from whatever checkpoint holds it, as the recipes need it: safetensors, settled special tokens, checked.

Called by `collect.py base`. Why not just copy the files: a checkpoint may be a pickled `.bin` or a GGUF; few base
models name a pad token, and Axolotl then pads with EOS, the one token whose loss says where a text ends; a chat
model's EOS ends a turn and not a text: one that is given another EOS becomes a model of texts, without its chat
template; one that keeps its EOS keeps both. Recipes name no special tokens, since bases differ: they are settled here, once.
No token is ever added, so no embedding has to grow.
"""

import functools
import math
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from prep.common import BadInput, reason

# Every kind of character of the prepared text: a tokenizer that loses one of them is no base for French.
SAMPLE = (
    "— Où êtes-vous donc, mon cœur ? demanda-t-elle. Voilà déjà 3 jours que je n'ai plus reçu de lettre...\n\n"
    "« Ça m'est égal, répondit le garçon naïf ; j'étais à Nîmes, chez l'aîné des Lefèvre — celui de 1876 —, "
    "et j'y ai bu du vin blanc. »\n\n"
    "Elle ferma la fenêtre. Le vent du soir passait sur les toits de la ville, et l'on entendait au loin, "
    "du côté de la rivière, les cloches de l'église qui sonnaient l'heure du dîner."
)

Tokens = dict[str, str]  # role (bos, eos, pad, unk) -> token


def settle_tokens(own: Tokens, given: Tokens, vocabulary: dict[str, int]) -> Tokens:
    """The token of each role: the one given, else the model's own; pad is never one whose loss matters.

    Pad falls back to unk when the model has none of its own, or one that is also BOS or EOS: a byte-level or
    byte-fallback tokenizer never writes unk into a text.
    """
    for role, token in given.items():
        if token not in vocabulary:
            raise BadInput(f"--{role}-token {token} is not in the tokenizer's vocabulary of {len(vocabulary)} tokens")
    tokens = own | given
    if "eos" not in tokens:
        raise BadInput("the tokenizer names no EOS token: give one with --eos-token")
    if "pad" not in given:
        ends = {tokens["eos"], tokens.get("bos")}
        free = [tokens[role] for role in ("pad", "unk") if role in tokens and tokens[role] not in ends]
        if not free:
            raise BadInput("the tokenizer has no pad token that is not also BOS or EOS: give one with --pad-token")
        tokens["pad"] = free[0]
    elif tokens["pad"] == tokens["eos"]:
        raise BadInput(f"--pad-token {tokens['pad']} is also EOS: padding would hide where texts end")
    return tokens


def gguf_tokens(path: Path) -> Tokens:
    """The special tokens that a GGUF file names (`tokenizer.ggml.*_token_id`), by role.

    Read from the file, because Transformers 5.16 takes a byte-level GGUF tokenizer's EOS from the BOS field and drops
    its pad token (`GGUFGPTConverter`); an EOS that is the start of a chat turn would train a wrong end of text.
    """
    fields = gguf.GGUFReader(str(path)).fields
    vocabulary = fields["tokenizer.ggml.tokens"]
    tokens = {}
    for role, name in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        if field := fields.get(f"tokenizer.ggml.{name}_token_id"):
            tokens[role] = bytes(vocabulary.parts[vocabulary.data[int(field.contents())]]).decode()
    return tokens


def load(source: Path) -> tuple[Any, Any, Tokens]:
    """Model, tokenizer and own special tokens of a checkpoint folder or a GGUF file. Nothing of it is executed.

    Transformers opens a pickled `.bin` for its tensors alone (torch.load with weights_only), safetensors before it.
    A folder keeps the number format of its checkpoint. A GGUF is loaded as float32: its blocks (4 bits times a float16
    scale, plus an offset) do not fit a 16-bit format, and a CPU, where such small models train, computes in float32.
    """
    try:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        dtype, folder, own = "auto", source, {}
        # Transformers would parse a GGUF file again for config, tokenizer and model: each time five seconds.
        with patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
            if source.suffix.lower() == ".gguf":
                dtype, folder, own = "float32", source.parent, gguf_tokens(source)
                options["gguf_file"] = source.name
            config = AutoConfig.from_pretrained(folder, **options)
            if getattr(config, "quantization_config", None):
                raise BadInput(f"{source} is quantised: give the 16-bit checkpoint it was made from")
            config._attn_implementation = "sdpa"  # another is a kernel that Transformers would fetch from the hub
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            options |= {"config": config, "dtype": dtype, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except pickle.UnpicklingError as error:
        raise BadInput(f"{source}: pickled weights hold more than tensors or are damaged; they were not run") from error
    except BadInput:
        raise
    except Exception as error:  # Transformers and its parsers raise whatever they meet
        raise BadInput(f"{source} does not load as a language model: {reason(error)}") from error
    model, found = loaded
    # Transformers fills what a checkpoint lacks with random numbers, and only warns.
    lacking = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if lacking:
        raise BadInput(f"{source} lacks {len(lacking)} of the model's tensors, among them {lacking[0]}")
    named = {role: getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
    return model, tokenizer, own or {role: token for role, token in named.items() if token is not None}


def apply_tokens(model: Any, tokenizer: Any, tokens: Tokens) -> None:
    """Give the tokenizer, the model's config and its generation defaults the same special tokens."""
    for role, token in tokens.items():
        setattr(tokenizer, f"{role}_token", token)
    tokenizer.clean_up_tokenization_spaces = False  # it would remove the space before « ; » and « ! »
    ids = {f"{role}_token_id": tokenizer.convert_tokens_to_ids(tokens[role]) for role in tokens if role != "unk"}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)  # a chat model's also holds its sampling


def check_tokenizer(tokenizer: Any, embeddings: int) -> bool:
    """Whether the tokenizer puts BOS before a text. Raises BadInput where rows could not be built with it.

    `embeddings`: rows of the model's embedding; a larger token id means that the tokenizer is another model's.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= embeddings:
        raise BadInput(f"the tokenizer does not match the model: token id {largest}, but {embeddings} embeddings")
    plain, full = tokenizer(SAMPLE, add_special_tokens=False).input_ids, tokenizer(SAMPLE).input_ids
    if tokenizer.decode(plain) != SAMPLE:
        raise BadInput(f"the tokenizer does not give French text back as it was: {tokenizer.decode(plain)!r}")
    if full not in (plain, [tokenizer.bos_token_id, *plain]):
        raise BadInput("the tokenizer adds other special tokens to a text than one BOS at its start")
    return full != plain


@torch.inference_mode()
def bits_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """Mean negative log2-likelihood of a short text per UTF-8 byte, after a BOS (or EOS, where a model has no BOS)."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = torch.tensor([[start, *tokenizer(text, add_special_tokens=False).input_ids]])
    loss = model(input_ids=ids, labels=ids).loss.item()
    return loss * (ids.shape[1] - 1) / math.log(2) / len(text.encode())


def convert(source: Path, folder: Path, given: Tokens) -> dict[str, Any]:
    """Write the checkpoint `source` to `folder` as the recipes' base, read it back, and say what it is.

    Returns {"dtype", "parameters", "tokens", "adds_bos", "french_bits_per_byte"}; raises BadInput if it is not sound.
    """
    logging.set_verbosity_error()
    print(f"loading {source}", flush=True)
    model, tokenizer, own = load(source)
    tokens = settle_tokens(own, given, tokenizer.get_vocab())
    if tokens["eos"] != own.get("eos"):
        tokenizer.chat_template = None  # chat servers would wrap every prompt in turns; the model continues texts
    apply_tokens(model, tokenizer, tokens)
    adds_bos = check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # of a full disk safetensors and tokenizers each raise their own
        raise BadInput(f"the model could not be written to {folder}: {reason(error)}") from error

    print("reading back what was written", flush=True)
    again, tokenizer_again, _ = load(folder)
    bits = bits_per_byte(again, tokenizer_again, SAMPLE)
    if not math.isfinite(bits):
        raise BadInput(f"{source}: the model's predictions are not finite numbers; the weights are damaged")
    tensors, written = model.state_dict(), again.state_dict()
    same = tensors.keys() == written.keys() and all(torch.equal(tensors[name], written[name]) for name in tensors)
    if not same or tokenizer_again(SAMPLE).input_ids != tokenizer(SAMPLE).input_ids:
        raise BadInput(f"{source}: model or tokenizer read back from {folder} is not the one that was written")

    for role, token in tokens.items():
        print(f"  {role}: {token}" + ("" if own.get(role) == token else f" (the checkpoint: {own.get(role, 'none')})"))
    print(f"  BOS before each text: {'yes' if adds_bos else 'no'}; a short French text: {bits:.2f} bits per byte")
    if tokenizer.chat_template:
        print(f"  this is a chat model: {tokens['eos']} may end a turn, not a text (--eos-token makes it one of texts)")
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "adds_bos": adds_bos,
        "french_bits_per_byte": round(bits, 4),
    }
