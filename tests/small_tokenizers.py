"""Two tokenizers trained in a second, of the two kinds that base models have."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CONTES = Path(__file__).parent.parent / "demo" / "corpus" / "contes"


def tales() -> list[str]:
    """The demo's tales, in the order of their file names."""
    return [path.read_text(encoding="utf-8") for path in sorted(CONTES.glob("*.txt"))]


def llama_like() -> tokenizers.Tokenizer:
    """Llama's kind: a space is ▁, one is put before the text, unknown characters are bytes, BOS is added."""
    specials = ["<unk>", "<s>", "</s>"]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training; Llama's own has none
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=specials + bytes_, limit_alphabet=100)
    trained.train_from_iterator((line for tale in tales() for line in tale.split("\n")), trainer)
    settings = json.loads(trained.to_str())
    settings["pre_tokenizer"] = None
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] in specials]
    result = tokenizers.Tokenizer.from_str(json.dumps(settings))
    result.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return result


def gpt2_like() -> tokenizers.Tokenizer:
    """GPT-2's kind, and SmolLM2's: bytes as letters, words split beforehand, nothing added."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    trained.train_from_iterator(tales(), trainer)
    return trained


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **special: str) -> Path:
    """Write a folder that Transformers loads; `special` names bos_token, eos_token and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def save_llama_like(folder: Path) -> Path:
    return save(llama_like(), folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_gpt2_like(folder: Path) -> Path:
    return save(gpt2_like(), folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
