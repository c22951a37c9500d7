"""Step 0: bring the three sources into the working directory: a base model, books of Gallica, the novel.

    python prep/collect.py base                                  TinyLlama v1.1 from the hub   -> models/base
    python prep/collect.py base --source some/model.gguf         the same from a local file or folder
    python prep/collect.py gallica                               Gallica's 19,240 works of prose fiction -> data/raw/gallica
    python prep/collect.py gallica --dataset PleIAs/French-PD-Books --files 80       of the whole library, 6.7 % fiction
    python prep/collect.py book --source https://.../novel.pdf   a PDF, EPUB, text ...         -> data/raw/book/book.pdf

Each collection ends with a `source.json` that records where it came from, with the sha256 of each file. It is written
last: with it, the same command again returns at once; without it, the command resumes the downloads, which wait in a
neighbouring folder `.<name>.download`. A collection is never overwritten: remove it first, or give another `--out`.

Downloads from the hub are checked against the hashes that the hub states. HF_ENDPOINT (a mirror), HF_TOKEN and
HF_HUB_OFFLINE=1 (local sources only) are honoured.
"""

import argparse
import contextlib
import hashlib
import io
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A broken Xet download starts again from its first byte, a plain one continues where it broke.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

from prep.command import run

import httpx
from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import disable_progress_bars

from prep.common import (
    BadInput,
    atomic_write,
    lock,
    need_room,
    positive,
    progress,
    read_json,
    reason,
    sha256,
    source_files,
    versions,
    write_json,
)
from prep.formats import BOOK_SUFFIXES, kind_of, read_bytes
from prep.readers import FICTION_REPO, LIBRARY_REPO, SUFFIXES, check_columns, is_source

Record = dict[str, Any]

BASE_REPO, BASE_REVISION = "TinyLlama/TinyLlama_v1.1", "ff3c701f2424c7625fdefb9dd470f45ef18b02d6"
# The data sets by name, with the revision that is taken. The first one's repository holds only a program that loads the
# tables, one a year, from Zenodo, where the number of a record stands for files that never change.
DATASETS = {FICTION_REPO: "4751204", LIBRARY_REPO: "0b66179a0c97cb4e8cfe9639ce788bb8851e94be"}
# The recipes want 1.02 G tokens. The first holds about 2.5 G, by its card's 5.7 M pages: all of it is taken, for windows are
# drawn evenly over works. Of the second's files, 2,000 books each, 6.7 % are prose fiction, 15 M tokens: 68 files, and more
# for what the filters reject.
LIBRARY_FILES = 80
TABLES = (".zip", ".tar", ".tar.gz", ".tgz", ".tsv", ".tsv.gz")


# --- what a folder holds ---------------------------------------------------------------------------------------------


def recorded(out: Path) -> tuple[Record | None, list[str]]:
    """The source.json of a finished collection, None where there is none; and the names of files that were lost since, not dropped."""
    path = out / "source.json"
    if not path.is_file():
        return None, []

    def pick(record: Record) -> tuple[Record, dict[str, int]]:
        described(record)
        return record, {file["name"]: file["bytes"] for file in record["files"] if not file.get("dropped")}

    record, sizes = read_json(path, f"remove {out} and collect it again", pick)
    paths = {name: out / name for name in sizes}
    return record, [name for name, path in paths.items() if not path.is_file() or path.stat().st_size != sizes[name]]


def already(out: Path, wanted: Record) -> bool:
    """Whether `out` holds the wanted collection. Raises BadInput where it holds another one."""
    record, lost = recorded(out)
    if lost:
        raise BadInput(f"{out / lost[0]} is missing or was changed: remove {out} and collect it again")
    if record and record["wanted"] != wanted:
        raise BadInput(f"{out} holds another collection ({described(record)}): remove it, or give another --out")
    if record:
        print(f"{out} is already there: {described(record)}")
    return record is not None


def described(record: Record) -> str:
    """A collection in a few words."""
    size = sum(file["bytes"] for file in record["files"]) / 1e6
    return f"{', '.join(f'{k} {v}' for k, v in record['wanted'].items() if v is not None)}; {size:,.1f} MB"


def write_record(out: Path, record: Record) -> None:
    """source.json, the last file of a collection."""
    write_json(out / "source.json", record | {"versions": versions("huggingface_hub", "transformers", "torch")})


def staging(out: Path) -> Path:
    """Where downloads for `out` wait until they are whole and checked, on the same disk."""
    return out.with_name(f".{out.name}.download")


def put(file: Path, place: Path, link: bool) -> None:
    """A file into its place, which may hold the same file already: a hard link if wanted and possible, else a copy."""
    if place.exists():
        if sha256(place) != sha256(file):
            raise BadInput(f"{place} is there, and is another file: remove it, or give another --out")
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if link:
        with contextlib.suppress(OSError):
            return os.link(file.resolve(), place)
    with open(file, "rb") as reader, atomic_write(place, "wb") as writer:
        shutil.copyfileobj(reader, writer)


# --- downloads -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn what the network, the hub and its client raise into BadInput; errors of the disk stay as they are."""
    try:
        yield
    except GatedRepoError as error:
        raise BadInput(f"{what} is gated: accept its terms on its page, and give your token in HF_TOKEN") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise BadInput(f"no {what}, or one that needs a token (HF_TOKEN)") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadInput(
            f"{what}: {reason(error.__cause__ or error).rstrip('.')}. Check the network and the address and run the same "
            "command again (what has arrived is kept), or give a local copy (--source)"
        ) from error


def persist(download: Callable[[], Any]) -> None:
    """Call `download` again when the connection breaks or the server is busy; it continues from the bytes it has."""
    for pause in (1, 4, 15, 60):
        try:
            return download()
        except httpx.HTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if not isinstance(error, httpx.TransportError) and status not in (429, 502, 503, 504):
                raise
            print(f"{reason(error)}; trying again in {pause} s", flush=True)
            time.sleep(pause)
    download()


def hub_files(repo: str, kind: str, revision: str) -> tuple[str, list[Record]]:
    """The commit of a hub repository's revision, and its files (name, bytes)."""
    with one_line(f"{kind} {repo} (revision {revision}) at {constants.ENDPOINT}"):
        info: Any = HfApi().repo_info(repo, repo_type=kind, revision=revision, files_metadata=True, timeout=30)
    return str(info.sha), [{"name": f.rfilename, "bytes": f.size} for f in info.siblings or []]


def hub_fetch(folder: Path, repo: str, kind: str, commit: str, names: list[str]) -> None:
    """Download files of a repository into `folder`; one whose hash is not the hub's is removed, and raises BadInput."""
    where: dict[str, Any] = {"repo_type": kind, "revision": commit, "local_dir": folder}
    with one_line(repo):
        persist(lambda: snapshot_download(repo, allow_patterns=names, **where))
        wrong = [bad["path"] for bad in HfApi().verify_repo_checksums(repo, **where).mismatches]
    for name in wrong:
        (folder / name).unlink()
    if wrong:
        raise BadInput(f"{', '.join(wrong)}: another hash than the hub's, damaged in the download; run again")


def zenodo_files(number: str) -> list[Record]:
    """The files of a Zenodo record (name, bytes, checksum such as `md5:...`, url)."""
    address = f"{os.environ.get('ZENODO_ENDPOINT', 'https://zenodo.org')}/api/records/{number}"
    with one_line(address):
        answer = get_session().get(address, timeout=30).raise_for_status()
    try:
        return [
            {"name": f["key"], "bytes": f["size"], "checksum": f["checksum"], "url": f["links"]["self"]}
            for f in answer.json()["files"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{address} does not list the files of a record ({reason(error)})") from error


def zenodo_fetch(folder: Path, file: Record) -> None:
    """Download one file of a Zenodo record into `folder`, under its name, and check it against the record's checksum."""
    if (folder / file["name"]).is_file():
        return
    local = url_fetch(file["url"], folder, file["checksum"], file["bytes"])
    kind, _, expected = file["checksum"].partition(":")
    with open(local, "rb") as handle:
        found = hashlib.file_digest(handle, kind).hexdigest()
    if found != expected:
        local.unlink()
        raise BadInput(f"{file['name']} was damaged in the download: its {kind} is {found}, not {expected}; run again")
    local.replace(folder / file["name"])


def url_fetch(url: str, folder: Path, tag: str | None = None, stated: int | None = None) -> Path:
    """Download a file over HTTP into `folder`, resuming what an earlier attempt left there.

    By the hub client's `http_get`, which resumes (Range) and shows progress; pooch and fsspec start again from zero.
    The partial file is named after `tag`, or the server's ETag, so that a file which has changed since is not continued.
    `stated`: its bytes, where they are known.
    """
    headers = {"Accept-Encoding": "identity"}  # ranges count the bytes of the file, not of a compressed stream
    if not tag:
        with one_line(url):
            head = get_session().head(url, headers=headers, timeout=30)
        told = head.headers if head.is_success else {}
        tag, length = told.get("ETag") or told.get("Last-Modified"), told.get("Content-Length")
        stated = int(length) if length else None
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / hashlib.sha256(f"{url} {tag}".encode()).hexdigest()[:16]

    def attempt() -> None:
        if not (tag and stated):
            partial.unlink(missing_ok=True)  # nothing tells whether more bytes would continue the same file
        with open(partial, "ab") as handle:
            http_get(url, handle, resume_size=handle.tell(), headers=headers, expected_size=stated)

    with one_line(url):
        try:
            persist(attempt)
        except OSError as error:
            if error.errno is None:  # another size than stated: nothing to continue from
                partial.unlink()
            raise
    return partial


# --- the base model --------------------------------------------------------------------------------------------------


def checkpoint_files(files: list[Record]) -> list[Record]:
    """The files of a model repository that Transformers loads: settings, tokenizer, weights in one format.

    Safetensors where there are any, else PyTorch's pickled `.bin` (loaded as tensors only). No code.
    """
    flat = [file for file in files if "/" not in file["name"]]
    settings = [f for f in flat if f["name"].endswith((".json", ".model", ".jinja")) or f["name"] == "merges.txt"]
    for start, end in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if weights := [f for f in flat if f["name"].startswith(start) and f["name"].endswith(end)]:
            return settings + weights
    raise BadInput("the repository holds no model*.safetensors and no pytorch_model*.bin")


def collect_base(args: argparse.Namespace) -> None:
    """models/base, built beside its place and renamed into it: it is there whole, or not at all."""
    out, source = args.out, args.source
    given = {role: token for role in ("bos", "eos", "pad") if (token := getattr(args, f"{role}_token"))}
    wanted: Record = {"source": str(source)} if source else {"repo": args.repo, "revision": args.revision}
    local: list[Path] = []
    if source:
        if not source.exists():
            raise BadInput(f"{source} does not exist: --source takes a checkpoint folder or a .gguf file")
        local = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
        wanted["bytes"] = sum(path.stat().st_size for path in local)
    wanted |= {f"{role}_token": token for role, token in given.items()}
    if already(out, wanted):
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists and was not written by this command: remove it, or give another --out")

    downloads, commit = staging(out), None
    if not source:
        commit, files = hub_files(args.repo, "model", args.revision)
        files = checkpoint_files(files)
        need_room(downloads, 2 * sum(file["bytes"] for file in files))  # as downloaded, and as saved
        names = sorted(file["name"] for file in files)
        hub_fetch(downloads, args.repo, "model", commit, names)
        local = [downloads / name for name in names]
    origin = {"path": str(source) if source else None, "repo": None if source else args.repo, "revision": commit}
    origin["from"] = source_files(local)

    from prep import base  # here, for PyTorch takes seconds to load

    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # Transformers' progress bars
            model = base.convert(source or downloads, new, given)
        made = sorted(new.iterdir())
        for path in made:
            path.chmod(0o644)  # safetensors writes 0600
        write_record(new, {"wanted": wanted} | origin | {"files": source_files(made), "model": model})
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(downloads, ignore_errors=True)
    print(f"{out}: {model['parameters']:,} parameters, {model['dtype']}")


# --- Gallica ---------------------------------------------------------------------------------------------------------


def choose(names: list[str], count: int, seed: int) -> list[str]:
    """`count` of the names: the first of a shuffled order that depends on the seed alone, so a larger count adds."""
    order = sorted(names)
    random.Random(seed).shuffle(order)
    if not 0 < count <= len(order):
        raise BadInput(f"--files {count}: there are {len(order)} files of books to choose from")
    return sorted(order[:count])


def collect_gallica(args: argparse.Namespace) -> None:
    """data/raw/gallica: files appear there once all are whole and checked."""
    out, source, downloads = args.out, args.source, staging(args.out)
    local = {p.name: p for p in sorted(source.glob("*")) if is_source(p.name)} if source else {}
    if source and not local:
        raise BadInput(f"{source} is not a folder with files of books ({' '.join(SUFFIXES)})")
    zenodo = args.repo == FICTION_REPO
    count = args.files or len(local) or (LIBRARY_FILES if args.repo == LIBRARY_REPO else None)
    wanted: Record = {"repo": args.repo, "revision": args.revision}
    if source:
        wanted = {"source": str(source), "bytes": sum(path.stat().st_size for path in local.values())}
    wanted |= {"files": count, "seed": args.seed}
    before, lost = recorded(out)
    same = before is not None and before["wanted"] | {"files": count} == wanted
    grows = before is not None and (before["wanted"].get("files") or math.inf) < (count or math.inf)
    if not (same and (lost or grows)) and already(out, wanted):
        return
    for name in lost:
        print(f"{out / name} is missing or was changed: it is collected again", flush=True)
        (out / name).unlink(missing_ok=True)
    held = [file for file in before["files"] if file["name"] not in lost] if before else []

    commit, remote = "", {}
    if not source:
        commit = before["revision"] if before else args.revision
        commit, files = (commit, zenodo_files(commit)) if zenodo else hub_files(args.repo, "dataset", commit)
        ends = TABLES if zenodo else (".parquet",)
        remote = {file["name"].replace("/", "_"): file for file in files if file["name"].endswith(ends)}
    names = choose(list(local or remote), count or len(remote), args.seed)
    foreign = sorted(p.name for p in out.glob("*") if is_source(p.name) and p.name not in names)
    if foreign:
        raise BadInput(f"{out} also holds {', '.join(foreign)}, not among the {len(names)} chosen: remove or move them")
    wanting = [name for name in names if name not in {file["name"] for file in held}]
    places = local
    if not source:
        waiting = [remote[name] for name in wanting]
        size = sum(file["bytes"] for file in waiting)
        need_room(downloads, size)
        print(f"{len(wanting)} files of {args.repo}, {size / 1e6:,.1f} MB -> {out}", flush=True)
        if zenodo:
            disable_progress_bars()  # one bar over all files instead of one each
            with progress(total=size, unit="B", unit_scale=True) as bar:
                for file in waiting:
                    zenodo_fetch(downloads, file)
                    bar.update(file["bytes"])
        else:
            hub_fetch(downloads, args.repo, "dataset", commit, [file["name"] for file in waiting])
        places = {name: downloads / remote[name]["name"] for name in wanting}
    for name in wanting:
        if name.endswith(".parquet"):
            check_columns(places[name])
        elif name.endswith(BOOK_SUFFIXES):
            kind_of(places[name].read_bytes(), str(places[name]))
    held += [source_files([places[name]])[0] | {"name": name} for name in wanting]
    for name in wanting:
        put(places[name], out / name, link=True)
    record = {
        "wanted": wanted,
        "path": str(source) if source else None,
        "repo": None if source else args.repo,
        "revision": commit or None,
        "files": sorted(held, key=lambda file: file["name"]),
    }
    write_record(out, record)
    shutil.rmtree(downloads, ignore_errors=True)
    print(f"{out}: {described(record)}")


# --- the book --------------------------------------------------------------------------------------------------------


def collect_book(args: argparse.Namespace) -> None:
    """data/raw/book/book.pdf, book.epub, book.txt ... (the formats of prep/formats.py)."""
    out, source, downloads = args.out, args.source, staging(args.out)
    remote = "://" in source
    if not remote and not Path(source).is_file():
        raise BadInput(f"{source} is not a file; --source takes a book (PDF, EPUB, text ...) or an http(s) address")
    wanted = {"source": source, "sha256": None if remote else sha256(source)}
    if already(out, wanted):
        return

    file = url_fetch(source, downloads) if remote else Path(source)
    data = file.read_bytes()
    try:
        place = out / f"book.{kind_of(data, source)}"
        if place.suffix != ".pdf":  # reading one takes seconds; castle.py does
            read_bytes(data, source)
    except BadInput:
        if remote:
            file.unlink()
        raise
    if others := [path for path in out.glob("book.*") if path != place]:
        raise BadInput(f"{others[0]} is there, and is another book: remove it, or give another --out")
    put(file, place, link=False)
    files = source_files([place])
    origin = {"path": None if remote else source, "url": source if remote else None}
    write_record(out, {"wanted": wanted} | origin | {"files": files})
    shutil.rmtree(downloads, ignore_errors=True)
    print(f"{place}: {files[0]['bytes']:,} bytes, sha256 {files[0]['sha256']}")


# --- the command line ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{base,gallica,book}")

    base = commands.add_parser("base", help="the model that training starts from", description=collect_base.__doc__)
    base.add_argument("--repo", help=f"hub repository (default {BASE_REPO})")
    base.add_argument("--source", type=Path, help="a local checkpoint folder or .gguf file instead")
    for role, use in (("bos", "starts a text"), ("eos", "ends a text"), ("pad", "fills up a batch")):
        base.add_argument(f"--{role}-token", metavar="TOKEN", help=f"the token that {use}, if not the model's own")
    base.set_defaults(collect=collect_base, out=Path("models/base"), pinned={BASE_REPO: BASE_REVISION})

    gallica = commands.add_parser("gallica", help="files of books", description=collect_gallica.__doc__)
    of = f"{' or '.join(DATASETS)}, or one with the second's columns (default: the first)"
    gallica.add_argument("--dataset", "--repo", dest="repo", help=of)
    gallica.add_argument("--source", type=Path, help="a local folder of books instead (linked, or copied)")
    gallica.add_argument("--files", type=positive, help="how many (default: all; 80 of French-PD-Books)")
    gallica.add_argument("--seed", type=int, default=1, help="chooses which (default %(default)s)")
    gallica.set_defaults(collect=collect_gallica, out=Path("data/raw/gallica"), pinned=DATASETS)

    book = commands.add_parser("book", help="the novel of the last stage", description=collect_book.__doc__)
    formats = "address or file: PDF with text, EPUB, DOCX, ODT, HTML, RTF, FB2, TEI, text"
    # zsh and sh leave the ~ of `make data BOOK=~/novel.pdf`.
    book.add_argument("--source", required=True, type=os.path.expanduser, help=formats)
    book.set_defaults(collect=collect_book, out=Path("data/raw/book"))

    for command in (base, gallica):
        command.add_argument("--revision", help="its commit, tag or branch (default: the pinned one, or main)")
    for command in (base, gallica, book):
        command.add_argument("--out", type=Path, help=f"folder (default {command.get_default('out')})")
    args = parser.parse_args()
    if args.command != "book":
        if args.source and (args.repo or args.revision):
            parser.error("--source is a local copy: --repo and --revision do not go with it")
        args.repo = args.repo or next(iter(args.pinned))
        args.revision = args.revision or args.pinned.get(args.repo, "main")
    if not args.out.name or args.out.is_symlink():  # . or a folder of another disk: the download waits beside it
        args.out = args.out.resolve()
    lock(args.out)
    args.collect(args)


if __name__ == "__main__":
    run(main)
