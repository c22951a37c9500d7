"""prep/collect.py against a local server that speaks the hub's protocol, and against checkpoints made here.

The script runs as a user runs it, in a process of its own; only the network is a stand-in.
"""

import errno
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_library
import torch
from hub_server import Hub
from safetensors.torch import load_file, save_file
from tiny_curriculum import tiny_llama
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.corpus import set_lines
from eval import llamacpp
from prep import base, gallica
from prep import collect as script
from prep.collect import BASE_REPO, BASE_REVISION, DATASETS, FICTION_REPO, LIBRARY_REPO, choose, persist
from prep.common import BadInput, sha256
from prep.typography import to_convention

LIBRARY, COMMIT = ("--dataset", LIBRARY_REPO), DATASETS[LIBRARY_REPO]
SCRIPT = Path(__file__).parents[1] / "prep" / "collect.py"
PDF = b"%PDF-1.4\n" + bytes(range(256)) * 100
CHUNK = 10 * 1024 * 1024  # the hub's client writes to disk in pieces of this size
END = "<|endoftext|>"  # in the vocabulary of `checkpoint`, without a role


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script in tmp_path, with the hub and Zenodo at the local server and nothing in the cache."""
    mine = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_")) and "proxy" not in k.lower()
    }
    mine |= {"HF_ENDPOINT": hub.url, "ZENODO_ENDPOINT": f"{hub.url}/www", "HF_HOME": str(tmp_path / "cache")}

    def begin(*words: Any, script: Path = SCRIPT, limit: int = 0, **more: str) -> subprocess.Popen[str]:
        full_disk = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)) if limit else None
        command = [sys.executable, str(script), *map(str, words)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=mine | more, preexec_fn=full_disk, **pipes)

    return begin


@pytest.fixture
def collect(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Runs the script to a good end and returns what it printed; or to one sentence that matches `refused`, no traceback."""

    def call(*words: Any, refused: str = "", **more: Any) -> str:
        process = start(*words, **more)
        out, err = process.communicate(timeout=300)
        if refused:
            last = err.strip().splitlines()[-1]
            assert process.returncode == 1 and "Traceback" not in err and re.match(f"collect.py: .*{refused}", last), (
                err
            )
        else:
            assert process.returncode == 0, err
        return out

    return call


@pytest.fixture
def collect_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the script in this process, where PyTorch is loaded already."""

    def call(*words: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["collect.py", *map(str, words)])
        script.main()

    monkeypatch.chdir(tmp_path)
    return call


def parquet_bytes(size: int, seed: int, column: str = "complete_text") -> bytes:
    """A parquet of about `size` bytes that does not compress."""
    text, file = random.Random(seed).randbytes(size // 2).hex(), io.BytesIO()
    pq.write_table(pa.table({"file_id": [str(seed)], column: [text]}), file, compression="none")
    return file.getvalue()


@pytest.fixture
def books(hub: Hub) -> dict[str, bytes]:
    """Five small files of books on the hub, which lists them in no order, and one that is none."""
    files = {f"gallica_mono_{n}.parquet": parquet_bytes(2000, n) for n in (4, 1, 5, 3, 2)}
    hub.repos["dataset", LIBRARY_REPO] = (COMMIT, {"README.md": b"# Livres", **files})
    return files


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data/raw/gallica"


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.name != "source.json"}


def listed(folder: Path) -> list[dict[str, Any]]:
    """What source.json must say of the files in its folder."""
    files = sorted(held(folder).items())
    return [{"name": n, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "source.json").read_text())


# --- Gallica ---------------------------------------------------------------------------------------------------------


def test_gallica_files_are_fetched_once_and_more_keep_those_there(hub, books, collect, out):
    words = ("gallica", *LIBRARY, "--revision", "main", "--files")
    collect(*words, 2)
    first = record(out)
    assert (first["repo"], first["revision"], first["path"]) == (LIBRARY_REPO, COMMIT, None)
    names = sorted(books)
    assert held(out) == {name: books[name] for name in choose(names, 2, 1)}
    assert choose(names, 2, 1) != choose(names, 2, 2), "the seed chooses"
    assert first["files"] == listed(out)
    assert not list(out.parent.glob(".*.download")), "nothing is left of the download"
    hub.seen.clear()
    assert "already there" in collect(*words, 2)
    assert hub.seen == []

    collect(*words, 4)
    assert len(held(out)) == 4 and all(file in record(out)["files"] for file in first["files"])
    assert not any(path.endswith(tuple(file["name"] for file in first["files"])) for _, path, _ in hub.seen)
    assert all("/main" not in path for _, path, _ in hub.seen), "the second run asks for the commit of the first"
    collect(*words, 1, refused="another collection")

    files = held(out)
    cut, gone = sorted(files)[:2]
    (out / cut).write_bytes(files[cut][:-1])
    (out / gone).unlink()
    hub.seen.clear()
    assert f"{cut} is missing or was changed" in collect(*words, 4)
    assert held(out) == files and {name for name in files if hub.ranges(name)} == {cut, gone}
    (out / "source.json").write_text('{"wanted": {}}')
    collect(*words, 4, refused="source.json is damaged.*collect it again")


def test_a_full_disk_is_one_sentence_and_a_broken_download_is_resumed(hub, collect, out):
    data = parquet_bytes(int(2.5 * CHUNK), 1)
    hub.repos["dataset", LIBRARY_REPO] = (COMMIT, {"a.parquet": data})
    words, half = ("gallica", *LIBRARY, "--files", 1), CHUNK // 2
    collect(*words, limit=half, refused="File too large")
    assert not out.exists()
    hub.stop["a.parquet"] = (2 * CHUNK + 999, False)
    collect(*words)
    assert hub.ranges("a.parquet") == [None, f"bytes={half}-", f"bytes={half + CHUNK}-"]
    assert held(out) == {"a.parquet": data}


@pytest.mark.parametrize("changed", [False, True])
def test_a_killed_download_is_resumed_but_not_with_another_file(changed, hub, start, collect, tmp_path):
    first, second = (b"%PDF-1.4\n" + random.Random(seed).randbytes(int(2.5 * CHUNK)) for seed in (1, 2))
    hub.www["roman.pdf"], hub.stop["roman.pdf"] = first, (2 * CHUNK + 999, True)
    words, out = ("book", "--source", f"{hub.url}/www/roman.pdf"), tmp_path / "data/raw/book"
    killed = start(*words)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size >= 2 * CHUNK for path in tmp_path.glob("data/raw/.book.download/*")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert not out.exists()
    hub.www["roman.pdf"] = second if changed else first
    collect(*words)
    assert hub.ranges("roman.pdf") == [None, None if changed else f"bytes={2 * CHUNK}-"]
    assert held(out) == {"book.pdf": hub.www["roman.pdf"]}


@pytest.mark.parametrize(
    ("words", "name", "says"),
    [
        ("gallica --dataset PleIAs/French-PD-Books --files 5", "gallica_mono_3.parquet", "another hash than the hub's"),
        ("gallica", "b.zip", "its md5 is"),
        ("book --source {url}/www/roman.pdf", "roman.pdf", "has size"),
    ],
)
def test_what_arrives_damaged_is_not_kept(words, name, says, hub, books, collect, tmp_path):
    hub.www |= {"roman.pdf": PDF, "a.zip": b"PK first" * 99, "b.zip": b"PK second" * 99}
    hub.offer("4751204", "a.zip", "b.zip")
    data = (books | hub.www)[name]
    # Of the book nobody states a hash: only its length tells.
    hub.served[name] = data[:-100] if name == "roman.pdf" else data[:-1] + b"?"
    command = words.format(url=hub.url).split()
    out = tmp_path / "data/raw" / command[0]
    collect(*command, refused=f"{name}.*{says}.* run")
    assert not out.exists() and not list(tmp_path.rglob(name))
    hub.served.clear()
    collect(*command)
    assert data in held(out).values()
    assert all(len(hub.ranges(other)) < 2 for other in held(out) if other != name), "what was whole is kept"


def year_table(books: list[dict[str, Any]]) -> str:
    """A year of Gallica's fiction as its record has it: a row a page, its lines joined by spaces, `_p_` before paragraphs."""
    rows = [
        "main_id\tcatalogue_id\ttitre\tnom_auteur\tprenom_auteur\tdate\tdocument_ocr\tdate_enligne\tgallica\tpage\ttexte"
    ]
    for book in books:
        lines: list[str] = []
        for paragraph in book["complete_text"].split("\n\n"):
            first, *others = set_lines(paragraph)
            lines += [f"_p_ {first}", *others]
        for number, start in enumerate(range(0, len(lines), 34), 1):
            body = " ".join(lines[start : start + 34]).removeprefix("_p_ ")
            page = f"_p_ {book['title'].upper()} {number} _p_ {body}"
            known = [book["title"], book["author"] or "NA", "NA", book["date"], "99", "2017", "http://x", str(number)]
            rows.append("\t".join([f"{book['file_id']}_p{number}", "cb1", *known, page]))
    return "".join(f"{row}\n" for row in rows)


def test_from_an_empty_folder_the_curated_collection_gives_exactly_the_windows_asked(
    hub, collect, out, llama, tmp_path
):
    library = small_library.books()
    for year, books in ("1601", []), ("1871", library[:8]), ("1904", library[8:]):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{year}.tsv", year_table(books))
        hub.www[f"{year}.zip"] = buffer.getvalue()
    tables = dict(hub.www)
    hub.www["notice.pdf"] = PDF
    hub.offer("4751204", *hub.www)
    collect("gallica")
    assert held(out) == tables
    manifest = small_library.prepare(out, llama, tmp_path / "2a.jsonl", windows=20)
    assert manifest["train"]["windows"] == 20 and manifest["documents"]["read"] == 15
    assert (manifest["source"]["repo"], manifest["source"]["revision"]) == (FICTION_REPO, "4751204")
    assert "not prose fiction" not in [step["step"] for step in manifest["documents"]["funnel"]]
    texts = [row["text"] for row in small_library.rows(tmp_path / "2a.jsonl")]
    for unmended in (r"[a-zà-ÿ]- [a-zà-ÿ]", r"(?m)^[A-ZÀ-Þ ]+ \d+ "):
        assert not [text for text in texts if re.search(unmended, text)], unmended
    spaced = [re.sub(r"\s+", " ", to_convention(book["complete_text"])) for book in library]
    paragraphs = [part for text in texts for part in text.split("\n\n")[1:-1]]
    found = sum(any(part in whole for whole in spaced) for part in paragraphs)
    assert found > 0.95 * len(paragraphs) > 50


def test_dropped_sources_are_needed_again_only_for_another_corpus(
    collect_here, out, llama, tmp_path, monkeypatch, capsys
):
    given = small_library.library(tmp_path / "given", small_library.books())
    for split in ("1/2", "2/2"):
        small_library.prepare(given, llama, tmp_path / "undisturbed" / f"{split[0]}.jsonl", windows=9, split=split)
    collect_here("gallica", "--source", given)
    there, told = held(out), record(out)
    assert told["files"] == listed(given) == listed(out)
    assert (told["path"], told["repo"], told["revision"]) == (str(given), None, None)

    def prepare(split: str = "1/2", *more: str) -> bytes:
        rows = tmp_path / "data" / f"{split[0]}.jsonl"
        gallica.main([*small_library.words(out, llama, rows, windows=9, split=split), *more])
        assert rows.read_bytes() == (tmp_path / "undisturbed" / rows.name).read_bytes()
        return rows.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path == out / "gallica_mono_2.parquet":
            raise KeyboardInterrupt
        os.unlink(path)

    for name, fails, error, left in (
        ("prep.gallica.write_json", full, OSError, 3),
        ("pathlib.Path.unlink", killed, KeyboardInterrupt, 2),
    ):
        with monkeypatch.context() as disturbed, pytest.raises(error):
            disturbed.setattr(name, fails)
            prepare("1/2", "--drop-sources")
        assert len(held(out)) == left
    assert prepare("1/2", "--drop-sources") != prepare("2/2")
    assert not held(out) and held(given) == there
    capsys.readouterr()
    collect_here("gallica", "--source", given)
    assert "already there" in capsys.readouterr().out and not held(out)

    for other in ("--holdout=0.3", "--fresh"):
        with pytest.raises(BadInput, match=r"mono_1\.parquet was dropped or lost.*remove .*source\.json and collect"):
            prepare("1/2", other)
    (out / "source.json").unlink()
    collect_here("gallica", "--source", given)
    assert held(out) == there and prepare("1/2", "--fresh")
    (out / "source.json").unlink()
    with pytest.raises(BadInput, match="not made by collect"):
        prepare("1/2", "--drop-sources")
    assert held(out) == there


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(monkeypatch):
    answers = [429, 503, 0, 404]
    pauses: list[float] = []
    monkeypatch.setattr("prep.collect.time.sleep", pauses.append)

    def download() -> None:
        if status := answers.pop(0):
            httpx.Response(status, request=httpx.Request("GET", "http://x")).raise_for_status()

    persist(download)
    with pytest.raises(httpx.HTTPStatusError):
        persist(download)
    assert pauses == [1, 4]


EACH_IN_TURN = """
import sys
from prep.collect import main
from prep.common import BadInput
for words in sys.argv[1:]:
    sys.argv = ["collect.py", *words.split()]
    try:
        main()
    except BadInput as error:
        print(repr(str(error)), file=sys.stderr)
"""
OFFLINE = {"HF_HUB_OFFLINE": "1"}
NOBODY = "http://127.0.0.1:9"
ONE_EACH = ("gallica", "base", f"book --source {NOBODY}/x.pdf")


@pytest.mark.parametrize(
    ("environment", "cases"),
    [
        (OFFLINE, dict.fromkeys(ONE_EACH, "HF_HUB_OFFLINE")),
        ({"HF_ENDPOINT": NOBODY, "ZENODO_ENDPOINT": NOBODY}, dict.fromkeys(ONE_EACH, "refused")),
        (
            {},
            {
                "gallica --repo nobody/nothing": "no dataset nobody/nothing",
                "gallica --dataset PleIAs/French-PD-Books --revision v9": "revision v9",
                "gallica --dataset PleIAs/French-PD-Books --files 6": "--files 6: there are 5 files of books",
                "base": "no model*.safetensors and no pytorch_model*.bin",
                "base --repo meta/gated --revision main": "meta/gated is gated: accept its terms on its page, and give",
                "book --source {url}/www/absent.pdf": "404",
                "book --source ftp://example.org/roman.pdf": "unsupported protocol 'ftp://'",
                "book --source file:///etc/passwd": "missing an 'http://'",
                "book --source {url}/www/roman": "roman is a web page",
                "base --source empty --out full": "was not written by this command",
                "gallica --source other": "no column complete_text (it has file_id, texte)",
                "gallica --dataset PleIAs/French-PD-Books --files 1 --out mine": "mine.parquet, not among the 1 chosen",
            },
        ),
    ],
)
def test_one_line_says_what_is_wrong(environment, cases, hub, books, start, tmp_path):
    hub.repos["model", BASE_REPO] = (BASE_REVISION, {"config.json": b"{}", "flax_model.msgpack": b""})
    hub.repos["model", "meta/gated"] = (COMMIT, {"config.json": b"{}", "model.safetensors": b"x"})
    hub.gated = "meta/gated"
    hub.www["roman"] = b"<!doctype html>"
    given = {
        "full/config.json": b"{}",
        "empty/.here": b"",
        "other/a.parquet": parquet_bytes(1000, 1, column="texte"),
        "mine/mine.parquet": b"mine",
    }
    for name, data in given.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "each.py").write_text(EACH_IN_TURN)
    process = start(*(words.format(url=hub.url) for words in cases), script=tmp_path / "each.py", **environment)
    lines = [line for line in process.communicate(timeout=300)[1].splitlines() if line.startswith(("'", '"'))]
    assert process.returncode == 0 and len(lines) == len(cases)
    for line, says in zip(lines, cases.values(), strict=True):
        assert says in line and "\\n" not in line
    assert not (tmp_path / "data/raw/gallica").exists() and not (tmp_path / "data/raw/book").exists()
    assert all((tmp_path / name).read_bytes() == data for name, data in given.items())


# --- the book --------------------------------------------------------------------------------------------------------


def test_a_book_from_an_address_and_from_a_file(hub, collect, collect_here, tmp_path, monkeypatch):
    data, name = "Le voyageur arriva tard dans la soirée.\r\n".encode() * 500, "book.txt"
    hub.www["roman"] = data
    url, out = f"{hub.url}/www/roman", tmp_path / "data/raw/book"
    collect("book", "--source", url)
    assert held(out) == {name: data}
    assert (record(out)["url"], record(out)["path"]) == (url, None)
    assert record(out)["files"] == listed(out)
    hub.seen.clear()
    assert "already there" in collect("book", "--source", url)
    assert hub.seen == []

    (tmp_path / "mine").write_bytes(data)
    collect("book", "--source", "mine", refused="another collection")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_bytes(b"an older one")
    collect("book", "--source", "mine", "--out", "other", refused="is another file")
    (tmp_path / "other" / name).write_bytes(data)
    collect("book", "--source", "~/mine", "--out", "other", HOME=str(tmp_path), **OFFLINE)
    assert held(tmp_path / "other") == {name: data}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    collect_here("book", "--source", "../mine", "--out", ".")
    assert held(tmp_path / "here") == {name: data}


# --- the base model --------------------------------------------------------------------------------------------------


class Evil:
    """Writes a file in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path("executed"),)


@pytest.fixture(scope="module")
def checkpoint(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in bfloat16 with a byte-level tokenizer: BOS before each text, no pad token, a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(gpt2, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer), seed=0).bfloat16().save_pretrained(folder)
    return folder


def pickled(checkpoint: Path, folder: Path, **more: Any) -> Path:
    """The same checkpoint with its weights in pytorch_model.bin, and whatever else among them."""
    shutil.copytree(checkpoint, folder)
    torch.save(load_file(folder / "model.safetensors") | more, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def altered(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], Any], **settings: Any) -> Path:
    """The same checkpoint with other tensors and settings."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.slow
def test_a_pickled_base_from_the_hub(checkpoint, hub, collect, tmp_path):
    files = {path.name: path.read_bytes() for path in pickled(checkpoint, tmp_path / "pickled").iterdir()}
    files |= {"README.md": b"", "modeling_evil.py": b"raise SystemExit"}
    hub.repos["model", BASE_REPO] = (BASE_REVISION, files)
    assert "this is a chat model: </s> may end a turn" in collect("base")
    out = tmp_path / "models/base"
    assert not any(path.endswith((".py", "README.md")) for _, path, _ in hub.seen)
    assert {path.name for path in out.parent.iterdir()} == {"base", ".base.lock"}, "nothing is left of the download"

    told = record(out)
    assert told["files"] == listed(out)
    assert "model.safetensors" in held(out) and not any(name.endswith(".bin") for name in held(out))
    assert (told["repo"], told["revision"], told["model"]["dtype"]) == (BASE_REPO, BASE_REVISION, "bfloat16")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.chat_template == "{{ messages[0].content }}" and told["model"]["adds_bos"] is True
    ids = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<unk>"])
    for settings in (model.config, model.generation_config):
        assert [settings.bos_token_id, settings.eos_token_id, settings.pad_token_id] == ids

    hub.seen.clear()
    assert "already there" in collect("base")
    collect("base", "--eos-token", END, refused="another collection")
    assert hub.seen == []


@pytest.mark.slow
def test_a_malicious_pickle_is_not_run_and_a_full_disk_leaves_nothing(checkpoint, collect, collect_here, tmp_path):
    pickled(checkpoint, tmp_path / "given", evil=Evil())
    with pytest.raises(BadInput, match=r"pickled weights hold more than tensors.*they were not run"):
        collect_here("base", "--source", "given")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "given/pytorch_model.bin", weights_only=False)  # elsewhere the same file does what it says
    assert (tmp_path / "executed").exists()
    collect("base", "--source", checkpoint, "--out", "models/other", limit=20_000, refused="could not be written")
    assert {path.name for path in (tmp_path / "models").iterdir()} == {".base.lock", ".other.lock"}


@pytest.mark.slow
def test_a_kernel_of_the_hub_and_with_another_eos_the_chat_template_are_not_kept(checkpoint, collect_here, tmp_path):
    asks = dict.fromkeys(("_attn_implementation", "attn_implementation"), "flash_attention_2")
    altered(checkpoint, tmp_path / "given", lambda tensors: None, **asks)
    for folder in ("models", "large disk"):
        (tmp_path / folder).mkdir()
    (tmp_path / "models/base").symlink_to(tmp_path / "large disk")
    collect_here("base", "--source", "given", "--eos-token", END)
    assert "flash_attention_2" not in (tmp_path / "models/base/config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models/base")
    assert tokenizer.chat_template is None and tokenizer.eos_token == END


@pytest.mark.slow
def test_checkpoints_that_are_not_sound(checkpoint, tmp_path):
    up = "model.layers.1.mlp.up_proj.weight"

    def shrink(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:-10].clone()

    out = tmp_path / "out"
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"] - 10
    for number, (change, settings, words) in enumerate(
        [
            (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), {}, "not finite"),
            (lambda tensors: tensors.pop(up), {}, f"lacks 1 of the model's tensors, among them {up}"),
            (lambda tensors: tensors.update({up: tensors[up][:8].clone()}), {}, "does not load|lacks 1"),
            (shrink, {"vocab_size": vocabulary}, "tokenizer does not match the model"),
            (shrink, {"vocab_size": "many"}, "does not load as a language model"),
            (shrink, {"quantization_config": {"load_in_4bit": True}}, "is quantised: give the 16-bit checkpoint"),
        ]
    ):
        with pytest.raises(BadInput, match=words):
            base.convert(altered(checkpoint, tmp_path / f"{number}", change, **settings), out, {})


@pytest.mark.slow
def test_a_tokenizer_that_loses_french_or_adds_an_end(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert base.check_tokenizer(tokenizer, len(tokenizer)) is True
    own = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=own)
    with pytest.raises(BadInput, match="other special tokens"):
        base.check_tokenizer(tokenizer, len(tokenizer))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(BadInput, match="does not give French text back"):
        base.check_tokenizer(tokenizer, len(tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        ({"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, {}, {"pad": "<unk>"}),
        ({"eos": "</s>", "pad": "</s>", "unk": "<unk>"}, {}, {"pad": "<unk>"}),
        ({"eos": "</s>", "pad": "</s>", "unk": "<fin>"}, {"eos": "<fin>"}, {"eos": "<fin>", "pad": "</s>"}),
        ({"eos": "</s>"}, {"pad": "<fin>"}, {"pad": "<fin>"}),
        ({"eos": "</s>"}, {"eos": "<mot>"}, "--eos-token <mot> is not in the tokenizer's vocabulary of 4"),
        ({"eos": "</s>"}, {"pad": "</s>"}, "is also EOS"),
        ({"bos": "<s>"}, {}, "no EOS"),
        ({"bos": "<s>", "eos": "</s>", "unk": "</s>"}, {}, "give one with --pad-token"),
    ],
)
def test_special_tokens(own, given, expected):
    vocabulary = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>", "<fin>"))}
    if isinstance(expected, dict):
        assert base.settle_tokens(own, given, vocabulary) == own | expected
    else:
        with pytest.raises(BadInput, match=expected):
            base.settle_tokens(own, given, vocabulary)


@pytest.mark.slow
def test_a_gguf_becomes_the_checkpoint_it_was_made_from(checkpoint, start, tmp_path):
    given = shutil.copytree(checkpoint, tmp_path / "given")
    AutoTokenizer.from_pretrained(checkpoint, pad_token=END).save_pretrained(given)
    llamacpp.convert(given, tmp_path / "tiny.gguf")
    printed, bars = start("base", "--source", "tiny.gguf").communicate()
    assert len(printed.splitlines()) < 10 and not bars
    out = tmp_path / "models/base"
    assert record(out)["from"][0]["sha256"] == sha256(tmp_path / "tiny.gguf")
    assert record(out)["model"]["dtype"] == "float32"

    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (checkpoint, out))
    assert (after.bos_token, after.eos_token, after.pad_token, after.unk_token) == ("<s>", "</s>", END, "<unk>")
    text = "« Où êtes-vous ? » dit-elle — l'œuvre de 1876..."
    ids = before(text, add_special_tokens=False).input_ids
    assert after(text, add_special_tokens=False).input_ids == ids and after.decode(ids) == text
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits
        for folder in (checkpoint, out)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)  # its 16 bits are another format's
