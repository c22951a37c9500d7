"""prep/collect.py against a local server that speaks the hub's protocol, and against checkpoints made here.

The script runs as a user runs it, in a process of its own; only the network is a stand-in.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prep.collect
from prep.collect import DATASETS, book_suffix, choose
from prep.common import BadInput, sha256

SCRIPT = Path(__file__).parents[1] / "prep" / "collect.py"
BOOKS, COMMIT = "PleIAs/French-PD-Books", "c" * 40
MODEL, PINNED = "TinyLlama/TinyLlama_v1.1", "ff3c701f2424c7625fdefb9dd470f45ef18b02d6"
PDF = b"%PDF-1.4\n" + bytes(range(256)) * 100
CHUNK = 10 * 1024 * 1024  # the hub's client writes to disk in pieces of this size


class Hub(ThreadingHTTPServer):
    """The part of the hub's protocol that its client uses, and an ordinary web server under /www/.

    Set by tests: `repos` {(kind, repo): (commit, {name: bytes})}, `www` {name: bytes}, `cut` {name: bytes sent before
    the connection breaks, once}, `stall` {name: bytes sent before the server falls silent, once}, `spoilt` names whose
    bytes are wrong, `short` names whose end is missing. `seen`: (method, path, Range header) of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], tuple[str, dict[str, bytes]]] = {}
        self.www: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.stall: dict[str, int] = {}
        self.spoilt: set[str] = set()
        self.short: set[str] = set()
        self.seen: list[tuple[str, str, str | None]] = []
        self.released = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self, ending: str) -> list[str | None]:
        """The Range header of each GET of a file."""
        return [asked for method, path, asked in self.seen if method == "GET" and path.endswith(ending)]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        self.server.seen.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/www/"):
            return self.send_file(path.removeprefix("/www/"), self.server.www.get(path.removeprefix("/www/")), {})
        api = path.startswith("/api/")
        kind = "dataset" if path.removeprefix("/api").startswith("/datasets/") else "model"
        parts = path.removeprefix("/api").removeprefix("/datasets").removeprefix("/models").strip("/").split("/", 4)
        repo, revision = "/".join(parts[:2]), parts[3].split("/")[0]
        if (kind, repo) not in self.server.repos:
            return self.send(401, {"X-Error-Code": "RepoNotFound"})
        commit, files = self.server.repos[kind, repo]
        if revision not in (commit, "main", DATASETS[BOOKS]):
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        if api and parts[2] == "tree":  # what files are checked against
            entries: list[dict[str, Any]] = []
            for n, b in files.items():
                stated = hashes(n, b)
                entries.append({"type": "file", "path": n, "size": len(b), "oid": stated["blobId"]})
                if "lfs" in stated:
                    lfs = {"oid": stated["lfs"]["sha256"], "size": len(b), "pointerSize": 130}
                    entries[-1]["lfs"] = lfs
            return self.send(200, {}, json.dumps(entries).encode())
        if api:
            siblings = [{"rfilename": n, "size": len(b), **hashes(n, b)} for n, b in files.items()]
            return self.send(200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
        name = parts[4]
        if name not in files:
            return self.send(404, {"X-Error-Code": "EntryNotFound"})
        stated = hashes(name, files[name])
        tag = stated["lfs"]["sha256"] if "lfs" in stated else stated["blobId"]
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(files[name]))}
        self.send_file(name, files[name], headers)

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str, data: bytes | None, headers: dict[str, str]) -> None:
        """One file from where the Range header says, with the accident that a test ordered for it."""
        if data is None:
            return self.send(404, {})
        if name in self.server.short and self.command == "GET":
            data = data[:-100]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for key, value in ({"ETag": f'"{hashlib.md5(data).hexdigest()}"'} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if name in self.server.spoilt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        end = len(data)
        if name in self.server.cut:
            end = self.server.cut.pop(name)
            self.close_connection = True
        if name in self.server.stall:
            self.wfile.write(data[start : self.server.stall.pop(name)])
            self.server.released.wait(60)
            self.close_connection = True
            return None
        self.wfile.write(data[start:end])
        return None


def hashes(name: str, data: bytes) -> dict[str, Any]:
    """What the hub states of a file: weights and parquet are kept with LFS, small files in git itself."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if not name.endswith((".parquet", ".bin", ".safetensors")):
        return {"blobId": blob}
    return {"blobId": blob, "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """A user's environment, with the hub at the local server and nothing in the cache."""
    mine = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_")) and "proxy" not in k.lower()
    }
    return mine | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def collect(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the script in tmp_path."""

    def call(*words: Any, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=300
        )

    return call


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The run ended with one sentence, which has these words, and no traceback."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("collect.py: ")
    for word in words:
        assert word in last


def parquet_bytes(folder: Path, size: int, seed: int, column: str = "complete_text") -> bytes:
    """A parquet of about `size` bytes that does not compress."""
    text = random.Random(seed).randbytes(size // 2).hex()
    pq.write_table(pa.table({"file_id": [str(seed)], column: [text]}), folder / "made.parquet", compression="none")
    data = (folder / "made.parquet").read_bytes()
    (folder / "made.parquet").unlink()
    return data


@pytest.fixture
def books(hub: Hub, tmp_path: Path) -> dict[str, bytes]:
    """Five small files of books on the hub, and two that are none."""
    files = {f"gallica_mono_{n}.parquet": parquet_bytes(tmp_path, 2000, n) for n in range(1, 6)}
    hub.repos["dataset", BOOKS] = (COMMIT, {"README.md": b"# Livres", ".gitattributes": b"", **files})
    return files


def held(folder: Path) -> list[str]:
    """Names of the parquet files in a folder."""
    return sorted(path.name for path in folder.glob("*.parquet"))


# --- Gallica ---------------------------------------------------------------------------------------------------------


def test_gallica_files_are_fetched_recorded_and_not_fetched_again(hub, books, collect, tmp_path):
    out = tmp_path / "data/raw/gallica"
    assert collect("gallica", "--files", 2).returncode == 0
    record = json.loads((out / "source.json").read_text())
    assert (record["repo"], record["revision"], record["path"]) == (BOOKS, COMMIT, None)
    assert [file["name"] for file in record["files"]] == held(out) == choose(list(books), 2, 1)
    for file in record["files"]:
        data = books[file["name"]]
        assert (out / file["name"]).read_bytes() == data
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert not list(out.parent.glob(".*")), "nothing is left of the download"

    hub.seen.clear()
    again = collect("gallica", "--files", 2)
    assert again.returncode == 0 and "already there" in again.stdout
    assert hub.seen == []


def test_more_files_keep_those_there_and_the_revision(hub, books, collect, tmp_path):
    out = tmp_path / "data/raw/gallica"
    assert collect("gallica", "--files", 2).returncode == 0
    first = held(out)
    hub.seen.clear()
    assert collect("gallica", "--files", 4).returncode == 0
    assert len(held(out)) == 4 and set(first) < set(held(out))
    assert not any(path.endswith(tuple(first)) for _, path, _ in hub.seen)
    assert all("/main" not in path for _, path, _ in hub.seen), "the second run asks for the commit of the first"
    refused(collect("gallica", "--files", 1), "another collection")


def test_the_choice_depends_on_the_seed_and_grows():
    names = [f"gallica_mono_{n}.parquet" for n in range(100)]
    assert set(choose(names, 5, 1)) < set(choose(list(reversed(names)), 9, 1))
    assert choose(names, 5, 1) != choose(names, 5, 2)
    for count in (0, 101):
        with pytest.raises(BadInput, match="100 files of books"):
            choose(names, count, 1)


def test_a_broken_connection_is_resumed(hub, collect, tmp_path):
    data = parquet_bytes(tmp_path, int(2.5 * CHUNK), 7)
    hub.repos["dataset", BOOKS] = (COMMIT, {"gallica_mono_1.parquet": data})
    hub.cut["gallica_mono_1.parquet"] = CHUNK + 12345
    result = collect("gallica", "--files", 1)
    assert result.returncode == 0, result.stderr
    assert hub.ranges("mono_1.parquet") == [None, f"bytes={CHUNK}-"]
    assert (tmp_path / "data/raw/gallica/gallica_mono_1.parquet").read_bytes() == data


def test_a_killed_run_is_resumed(hub, environment, collect, tmp_path):
    data = parquet_bytes(tmp_path, int(2.5 * CHUNK), 7)
    hub.repos["dataset", BOOKS] = (COMMIT, {"gallica_mono_1.parquet": data})
    hub.stall["gallica_mono_1.parquet"] = 2 * CHUNK + 12345
    command = [sys.executable, str(SCRIPT), "gallica", "--files", "1"]
    started = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not [p for p in tmp_path.rglob("*.incomplete") if p.stat().st_size >= 2 * CHUNK]:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    started.kill()
    started.wait()
    out = tmp_path / "data/raw/gallica"
    assert held(out) == [] and not (out / "source.json").exists()
    result = collect("gallica", "--files", 1)
    assert result.returncode == 0, result.stderr
    assert hub.ranges("mono_1.parquet") == [None, f"bytes={2 * CHUNK}-"]
    assert (out / "gallica_mono_1.parquet").read_bytes() == data


def test_a_file_with_another_hash_is_not_kept(hub, books, collect, tmp_path):
    hub.spoilt.add("gallica_mono_3.parquet")
    refused(
        collect("gallica", "--files", 5), "gallica_mono_3.parquet", "damaged in the download", "run the same command"
    )
    out = tmp_path / "data/raw/gallica"
    assert not out.exists()
    assert not list(tmp_path.rglob("gallica_mono_3.parquet"))
    hub.spoilt.clear()
    assert collect("gallica", "--files", 5).returncode == 0
    assert (out / "gallica_mono_3.parquet").read_bytes() == books["gallica_mono_3.parquet"]
    assert len(hub.ranges("mono_1.parquet")) == 1, "what was whole is not fetched again"


def test_a_file_of_another_size_is_not_kept(hub, books, collect, tmp_path):
    """The server closes the file orderly, 100 bytes before the size that it had stated."""
    hub.short.add("gallica_mono_3.parquet")
    size = len(books["gallica_mono_3.parquet"])
    refused(collect("gallica", "--files", 5), f"of size {size} but has size {size - 100}", "run the same command")
    assert not (tmp_path / "data/raw/gallica").exists()
    hub.short.clear()
    assert collect("gallica", "--files", 5).returncode == 0

    hub.www["roman.pdf"] = PDF
    hub.short.add("roman.pdf")
    refused(collect("book", "--source", f"{hub.url}/www/roman.pdf"), "roman.pdf", f"has size {len(PDF) - 100}")
    assert list((tmp_path / "data/raw/.book.download").iterdir()) == []
    hub.short.clear()
    assert collect("book", "--source", f"{hub.url}/www/roman.pdf").returncode == 0


def test_what_the_hub_does_not_have_is_said(hub, books, collect):
    refused(collect("gallica", "--repo", "nobody/nothing"), "no dataset nobody/nothing", hub.url)
    refused(collect("gallica", "--repo", "not a name"), "no dataset not a name")
    refused(collect("gallica", "--revision", "v9"), "no revision v9")
    for count in (0, 6):
        refused(collect("gallica", "--files", count), f"--files {count}", "5 files of books")
    assert collect("gallica", "--source", ".", "--repo", "a/b").returncode == 2


def test_without_a_network(collect, tmp_path):
    """Port 9 (discard) of this machine answers nobody."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    refused(collect("gallica", "--files", 1, **nowhere), "cannot reach http://127.0.0.1:9", "--source")
    refused(collect("base", **nowhere), "cannot reach http://127.0.0.1:9", "--source")
    refused(collect("gallica", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "--source")
    refused(collect("base", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "--source")
    refused(collect("book", "--source", "http://127.0.0.1:9/x.pdf", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")


def test_a_full_disk_is_one_sentence_and_no_file(hub, environment, tmp_path):
    hub.repos["dataset", BOOKS] = (COMMIT, {"gallica_mono_1.parquet": parquet_bytes(tmp_path, 2 * CHUNK, 7)})

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK // 2, CHUNK // 2))

    command = [sys.executable, str(SCRIPT), "gallica", "--files", "1"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, preexec_fn=small_files
    )
    refused(result, "File too large")
    assert held(tmp_path / "data/raw/gallica") == []


def test_a_disk_that_is_too_small_is_said_before_the_download(hub, collect, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        hub.repos["dataset", BOOKS] = (COMMIT, {"gallica_mono_1.parquet": parquet_bytes(tmp_path, 2 * CHUNK, 7)})
        refused(collect("gallica", "--files", 1, "--out", small / "gallica"), "0.00 GB free, 0.02 GB are needed")
        assert hub.ranges("mono_1.parquet") == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_gallica_from_a_local_folder(collect, tmp_path):
    source = tmp_path / "given"
    source.mkdir()
    for number in range(3):
        (source / f"b{number}.parquet").write_bytes(parquet_bytes(tmp_path, 1000, number))
    assert collect("gallica", "--source", "given", HF_HUB_OFFLINE="1").returncode == 0
    out = tmp_path / "data/raw/gallica"
    record = json.loads((out / "source.json").read_text())
    assert (record["path"], record["repo"], record["revision"]) == ("given", None, None)
    assert [file["sha256"] for file in record["files"]] == [sha256(source / f"b{n}.parquet") for n in range(3)]
    assert "already there" in collect("gallica", "--source", "given").stdout

    (out / "b1.parquet").unlink()
    refused(collect("gallica", "--source", "given"), "b1.parquet is missing")
    for damage in ("", "[]", '{"files": 1}', '{"wanted": {}}'):
        (out / "source.json").write_text(damage)
        refused(collect("gallica", "--source", "given"), "source.json is damaged", "collect it again")


@pytest.mark.parametrize("data", [b"", b"PAR1 and no more"])
def test_a_file_that_is_no_parquet(data, collect, tmp_path):
    (tmp_path / "a.parquet").write_bytes(data)
    refused(collect("gallica", "--source", "."), "a.parquet is not a whole parquet file")
    assert held(tmp_path / "data/raw/gallica") == []


def test_a_parquet_without_text_and_a_folder_without_parquet(collect, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(collect("gallica", "--source", "empty"), "not a folder with files of books")
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(tmp_path, 1000, 1, column="texte"))
    refused(collect("gallica", "--source", "."), "no column complete_text", "texte")


def test_foreign_files_beside_a_collection_are_named(hub, books, collect, tmp_path):
    out = tmp_path / "data/raw/gallica"
    out.mkdir(parents=True)
    (out / "mine.parquet").write_bytes(b"mine")
    refused(collect("gallica", "--files", 1), "mine.parquet", "not among the 1 chosen")
    assert (out / "mine.parquet").read_bytes() == b"mine"


# --- the book --------------------------------------------------------------------------------------------------------

NOVEL = "Le voyageur arriva tard dans la soirée.\r\n".encode() * 500


@pytest.mark.parametrize(("data", "name"), [(PDF, "book.pdf"), (NOVEL, "book.txt")])
def test_a_book_from_an_address_and_from_a_file(data, name, hub, collect, tmp_path):
    hub.www["roman"] = data
    digest = hashlib.sha256(data).hexdigest()
    assert collect("book", "--source", f"{hub.url}/www/roman", "--sha256", digest.upper()).returncode == 0
    out = tmp_path / "data/raw/book"
    assert (out / name).read_bytes() == data
    record = json.loads((out / "source.json").read_text())
    assert (record["url"], record["path"]) == (f"{hub.url}/www/roman", None)
    assert record["files"] == [{"name": name, "bytes": len(data), "sha256": digest}]
    hub.seen.clear()
    assert "already there" in collect("book", "--source", f"{hub.url}/www/roman").stdout
    assert hub.seen == []
    refused(collect("book", "--source", f"{hub.url}/www/roman", "--sha256", "0" * 64), digest, "not 000")

    (tmp_path / "mine").write_bytes(data)
    refused(collect("book", "--source", "mine"), "another collection")
    assert collect("book", "--source", "mine", "--out", "other", HF_HUB_OFFLINE="1").returncode == 0
    assert (tmp_path / "other" / name).read_bytes() == data


def test_a_broken_book_is_resumed_but_not_from_a_changed_file(hub, collect, tmp_path):
    data = b"%PDF-1.4\n" + random.Random(1).randbytes(2 * CHUNK)
    hub.www["roman.pdf"] = data
    hub.cut["roman.pdf"] = CHUNK + 999
    url = f"{hub.url}/www/roman.pdf"
    assert collect("book", "--source", url).returncode == 0
    assert hub.ranges("roman.pdf") == [None, f"bytes={CHUNK}-"]
    assert (tmp_path / "data/raw/book/book.pdf").read_bytes() == data


def test_a_partial_book_is_not_continued_with_another_file(hub, environment, collect, tmp_path):
    first, second = (b"%PDF-1.4\n" + random.Random(n).randbytes(2 * CHUNK) for n in (1, 2))
    hub.www["roman.pdf"] = first
    hub.stall["roman.pdf"] = CHUNK + 999
    command = [sys.executable, str(SCRIPT), "book", "--source", f"{hub.url}/www/roman.pdf"]
    started = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    partials = tmp_path / "data/raw/.book.download"
    while not [p for p in partials.glob("*") if p.stat().st_size >= CHUNK]:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    started.kill()
    started.wait()
    hub.www["roman.pdf"] = second
    assert collect(*command[2:]).returncode == 0
    assert (tmp_path / "data/raw/book/book.pdf").read_bytes() == second
    assert hub.ranges("roman.pdf") == [None, None]


def test_a_book_with_another_sha256_is_not_kept(hub, collect, tmp_path):
    hub.www["roman.pdf"] = PDF
    refused(collect("book", "--source", f"{hub.url}/www/roman.pdf", "--sha256", "0" * 64), "sha256", "not 000")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \r\n\t", "is empty"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html><body>Cliquez ici</body></html>", "is a web page"),
        (b"<HTML><HEAD>", "is a web page"),
        (b"PK\x03\x04\x00\x00 an epub", "damaged zip, EPUB or DOCX"),
    ],
)
def test_what_is_no_book(data, words, tmp_path):
    (tmp_path / "mine").write_bytes(data)
    with pytest.raises(BadInput, match=words):
        book_suffix(tmp_path / "mine", "mine")


def test_a_web_page_is_not_collected(hub, collect, tmp_path):
    hub.www["roman"] = b"<!doctype html>"
    refused(collect("book", "--source", f"{hub.url}/www/roman"), "is a web page", f"{hub.url}/www/roman")
    (tmp_path / "mine").write_bytes(hub.www["roman"])
    refused(collect("book", "--source", "mine"), "is a web page")
    assert not (tmp_path / "data/raw/book").exists()


def test_addresses_that_give_nothing(hub, collect):
    refused(collect("book", "--source", f"{hub.url}/www/absent.pdf"), "404", "absent.pdf")
    refused(collect("book", "--source", "ftp://example.org/roman.pdf"), "only addresses")
    refused(collect("book", "--source", "file:///etc/passwd"), "only addresses")
    refused(collect("book", "--source", "absent.pdf"), "absent.pdf is not a file")
    refused(collect("book", "--source", "http:///roman.pdf"), "only addresses")
    refused(collect("book", "--source", "http://127.0.0.1:9/roman.pdf"), "cannot reach", "127.0.0.1:9")


# --- the base model --------------------------------------------------------------------------------------------------
# PyTorch and Transformers are imported by what uses them: the tests above run in seconds without.


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in bfloat16 with a byte-level tokenizer: BOS before each text, no pad token, a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<fin>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Elle ferma la fenêtre et la porte de la ville."] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def pickled(checkpoint: Path, folder: Path, **more: Any) -> Path:
    """The same checkpoint with its weights in pytorch_model.bin, and whatever else among them."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(checkpoint, folder)
    torch.save(load_file(folder / "model.safetensors") | more, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def altered(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The same checkpoint with other tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def serve_model(hub: Hub, folder: Path) -> None:
    """Put a checkpoint on the hub at the pinned revision, with code that must not be fetched."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repos["model", MODEL] = (PINNED, {**files, "README.md": b"", "modeling_evil.py": b"raise SystemExit"})


@pytest.mark.slow
def test_a_pickled_base_from_the_hub(checkpoint, hub, collect, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    serve_model(hub, pickled(checkpoint, tmp_path / "pickled"))
    result = collect("base")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "models/base"
    assert "this is a chat model: </s> may end a turn" in result.stdout
    assert not any(path.endswith((".py", "README.md")) for _, path, _ in hub.seen)
    assert sorted(path.name for path in out.parent.iterdir()) == ["base"], "nothing is left of the download"

    record = json.loads((out / "source.json").read_text())
    names = [file["name"] for file in record["files"]]
    assert sorted([*names, "source.json"]) == sorted(path.name for path in out.iterdir())
    assert "model.safetensors" in names and not any(name.endswith((".bin", ".jinja")) for name in names)
    assert all(file["sha256"] == sha256(out / file["name"]) for file in record["files"])
    assert (record["repo"], record["revision"], record["model"]["dtype"]) == (MODEL, PINNED, "bfloat16")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.chat_template is None and record["model"]["adds_bos"] is True
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)

    hub.seen.clear()
    assert "already there" in collect("base").stdout
    refused(collect("base", "--eos-token", "<fin>"), "another collection")
    assert hub.seen == []


@pytest.mark.slow
def test_a_malicious_pickle_is_not_run(checkpoint, collect, tmp_path):
    pickled(checkpoint, tmp_path / "given", evil=Evil(tmp_path / "executed"))
    refused(collect("base", "--source", "given"), "pickled weights", "they were not run")
    assert not (tmp_path / "executed").exists() and list((tmp_path / "models").iterdir()) == []
    import torch

    torch.load(tmp_path / "given/pytorch_model.bin", weights_only=False)  # elsewhere the same file does what it says
    assert (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_full_disk_while_the_model_is_saved(checkpoint, environment, tmp_path):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, str(SCRIPT), "base", "--source", str(checkpoint)]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, preexec_fn=small_files
    )
    refused(result, "could not be written")
    assert list((tmp_path / "models").iterdir()) == []


def test_folders_that_are_no_base(collect, tmp_path):
    refused(collect("base", "--source", "absent"), "absent does not exist")
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/base/config.json").write_text("{}")
    (tmp_path / "given").mkdir()
    refused(collect("base", "--source", "given"), "was not written by this command")


def test_a_hub_model_without_weights(hub, collect, tmp_path):
    hub.repos["model", MODEL] = (PINNED, {"config.json": b"{}", "flax_model.msgpack": b""})
    refused(collect("base"), "no model*.safetensors and no pytorch_model*.bin")


@pytest.mark.slow
def test_checkpoints_that_are_not_sound(checkpoint, tmp_path):
    from prep import base

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][0] = float("nan")

    def lose(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def reshape(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:8].clone()

    def shrink(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:-10].clone()

    out = tmp_path / "out"
    for name, change, words in (
        ("nan", spoil, "not finite"),
        ("lost", lose, "lacks 1 of the model's tensors, among them model.layers.1.mlp.up_proj.weight"),
        ("reshaped", reshape, "does not load|lacks 1"),
    ):
        with pytest.raises(BadInput, match=words):
            base.convert(altered(checkpoint, tmp_path / name, change), out, {})
    short = altered(checkpoint, tmp_path / "short", shrink)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 10}))
    with pytest.raises(BadInput, match="tokenizer does not match the model"):
        base.convert(short, out, {})
    (short / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(BadInput, match="does not load as a language model"):
        base.convert(short, out, {})
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(BadInput, match="does not load as a language model"):
        base.convert(tmp_path / "cut.gguf", out, {})


@pytest.mark.slow
def test_a_tokenizer_that_loses_french_or_adds_an_end(checkpoint):
    from tokenizers import normalizers, processors
    from transformers import AutoTokenizer

    from prep import base

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert base.check_tokenizer(tokenizer, len(tokenizer)) is True
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
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
        ({"bos": "<s>", "eos": "</s>", "pad": "<fin>"}, {}, {"pad": "<fin>"}),
        ({"bos": "<s>", "eos": "</s>", "pad": "</s>", "unk": "<unk>"}, {}, {"pad": "<unk>"}),
        (
            {"bos": "<s>", "eos": "</s>", "pad": "</s>", "unk": "<fin>"},
            {"eos": "<fin>"},
            {"eos": "<fin>", "pad": "</s>"},
        ),
        ({"eos": "</s>"}, {"pad": "<fin>"}, {"pad": "<fin>"}),
    ],
)
def test_special_tokens(own, given, expected):
    from prep import base

    vocabulary = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>", "<fin>"))}
    assert base.settle_tokens(own, given, vocabulary) == own | expected
    for wrong, words in (
        ({"eos": "<mot>"}, "--eos-token <mot> is not in the tokenizer's vocabulary of 4"),
        ({"eos": "</s>", "pad": "</s>"}, "is also EOS"),
    ):
        with pytest.raises(BadInput, match=words):
            base.settle_tokens(own, wrong, vocabulary)
    with pytest.raises(BadInput, match="no EOS"):
        base.settle_tokens({"bos": "<s>"}, {}, vocabulary)
    with pytest.raises(BadInput, match="--pad-token"):
        base.settle_tokens({"bos": "<s>", "eos": "</s>", "unk": "</s>"}, {}, vocabulary)


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The checkpoint as llama.cpp would write it in float32, with <fin> as the pad token.

    Rows of query and key projections change places there, because it rotates neighbouring pairs and not halves.
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_token_list(words)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if number < 4 else normal for number in range(len(words))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        array = tensor.float().numpy()
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                halves = array.reshape(config[heads], 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_gguf_becomes_the_checkpoint_it_was_made_from(checkpoint, collect, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(checkpoint, tmp_path / "tiny.gguf")
    result = collect("base", "--source", "tiny.gguf", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "models/base"
    record = json.loads((out / "source.json").read_text())
    assert record["from"][0]["sha256"] == sha256(tmp_path / "tiny.gguf")
    assert record["model"]["dtype"] == "float32"

    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (checkpoint, out))
    assert (after.bos_token, after.eos_token, after.pad_token, after.unk_token) == ("<s>", "</s>", "<fin>", "<unk>")
    text = "« Où êtes-vous ? » dit-elle — l'œuvre de 1876..."
    ids = before(text, add_special_tokens=False).input_ids
    assert after(text, add_special_tokens=False).input_ids == ids and after.decode(ids) == text
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits
        for folder in (checkpoint, out)
    ]
    torch.testing.assert_close(logits[0], logits[1])

    again = collect("base", "--source", "tiny.gguf", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and "already there" in again.stdout


def test_tables_of_fiction_come_from_their_record_and_are_checked(tmp_path, monkeypatch):
    """A server that stands in for Zenodo lists two archives; one arrives damaged first."""
    files = {"a.zip": b"PK first", "b.zip": b"PK second"}
    served = dict(files) | {"b.zip": b"PK sec_nd"}

    class Record(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            at = f"http://127.0.0.1:{server.server_port}"
            if self.path.startswith("/api/records/4751204"):
                listed = [
                    {
                        "key": name,
                        "size": len(data),
                        "checksum": "md5:" + hashlib.md5(data).hexdigest(),
                        "links": {"self": f"{at}/file/{name}"},
                    }
                    for name, data in files.items()
                ]
                body = json.dumps({"files": [*listed, {**listed[0], "key": "readme.pdf"}]}).encode()
            else:
                body = served[self.path.rsplit("/", 1)[1]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Record)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ZENODO_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", False
    )  # other tests' modules set it for the process
    out = tmp_path / "raw"
    arguments = ["gallica", "--dataset", "biglam/gallica_literary_fictions", "--files", "2", "--out", str(out)]
    with pytest.raises(BadInput, match="was damaged in the download"):
        prep.collect.collect_gallica(prep.collect.parse(arguments))
    served["b.zip"] = files["b.zip"]
    prep.collect.collect_gallica(prep.collect.parse(arguments))
    assert {path.name: path.read_bytes() for path in out.glob("*.zip")} == files
    record = json.loads((out / "source.json").read_text())
    assert (record["repo"], record["revision"]) == ("biglam/gallica_literary_fictions", "4751204")
    server.shutdown()
