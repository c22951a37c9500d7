"""Step 0: bring the three sources into the working directory: a base model, books of Gallica, the novel.

    python prep/collect.py base                                  TinyLlama v1.1 from the hub   -> models/base
    python prep/collect.py base --source some/model.gguf         the same from a local file or folder
    python prep/collect.py gallica --files 12                    12 files of French-PD-Books   -> data/raw/gallica
    python prep/collect.py gallica --dataset biglam/gallica_literary_fictions --files 3        Gallica's fiction, as tables
    python prep/collect.py book --source https://.../novel.pdf   a PDF, EPUB, text ...         -> data/raw/book/book.pdf

Each collection ends with a `source.json` that records where it came from, with the sha256 of each file. It is written
last: with it, the same command again returns at once; without it, the command resumes the downloads, which wait in a
neighbouring folder `.<name>.download`. A collection is never overwritten: remove it first, or give another `--out`.

Downloads from the hub are checked against the hashes that the hub states. HF_ENDPOINT (a mirror), HF_TOKEN and
HF_HUB_OFFLINE=1 (local sources only) are honoured.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

# A broken Xet download starts again from its first byte, a plain one continues where it broke.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import httpx
import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get

from prep.common import BadInput, atomic_write, reason, run, sha256, versions
from prep.formats import BOOK_SUFFIXES, kind_of, read_bytes
from prep.readers import SUFFIXES

Record = dict[str, Any]
Result = TypeVar("Result")

BASE_REPO, BASE_REVISION = "TinyLlama/TinyLlama_v1.1", "ff3c701f2424c7625fdefb9dd470f45ef18b02d6"
# The data sets by name, with the revision that is taken. The second one's repository holds only a program that loads the
# tables from Zenodo, where the number of a record stands for files that never change.
GALLICA_REPO, FICTION_REPO = "PleIAs/French-PD-Books", "biglam/gallica_literary_fictions"
DATASETS = {GALLICA_REPO: "0b66179a0c97cb4e8cfe9639ce788bb8851e94be", FICTION_REPO: "4751204"}


# --- what a folder holds ---------------------------------------------------------------------------------------------


def recorded(out: Path) -> Record | None:
    """The source.json of a finished collection whose files are all there; None where there is none yet.

    Raises BadInput for a collection that lost a file, and for a folder with files that are not of a collection.
    """
    if not (out / "source.json").is_file():
        return None
    try:
        record: Record = json.loads((out / "source.json").read_text(encoding="utf-8"))
        sizes = {file["name"]: file["bytes"] for file in record["files"]}
        described(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{out / 'source.json'} is damaged: remove {out} and collect it again") from error
    for name, size in sizes.items():
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            raise BadInput(
                f"{out / name} is missing or no longer as it was collected: remove {out} and collect it again"
            )
    return record


def already(out: Path, wanted: Record) -> bool:
    """Whether `out` holds just the wanted collection. Raises BadInput where it holds another one."""
    record = recorded(out)
    if record is None:
        return False
    if record["wanted"] != wanted:
        raise BadInput(f"{out} holds another collection ({described(record)}): remove it, or give another --out")
    print(f"{out} is already there: {described(record)}")
    return True


def described(record: Record) -> str:
    """A collection in a few words."""
    size = sum(file["bytes"] for file in record["files"]) / 1e6
    return f"{', '.join(f'{k} {v}' for k, v in record['wanted'].items() if v is not None)}; {size:,.1f} MB"


def listing(folder: Path, names: list[str]) -> list[Record]:
    """Name, size in bytes and sha256 of files, sorted by name."""
    return [{"name": n, "bytes": (folder / n).stat().st_size, "sha256": sha256(folder / n)} for n in sorted(names)]


def write_record(out: Path, record: Record) -> None:
    """source.json, the last file of a collection."""
    record = record | {"versions": versions("huggingface_hub", "transformers", "torch")}
    with atomic_write(out / "source.json") as handle:
        json.dump(record, handle, ensure_ascii=False, indent=2)
        handle.write("\n")


def staging(out: Path) -> Path:
    """Where downloads for `out` wait until they are whole and checked: on the same disk, so that a rename suffices."""
    return out.with_name(f".{out.name}.download")


# --- downloads -------------------------------------------------------------------------------------------------------


def persist(download: Callable[[], Result], what: str) -> Result:
    """Call `download` again when the connection breaks, five times at most; each call continues from the bytes it has."""
    for pause in (1, 2, 4, 8, None):
        try:
            return download()
        except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            raise BadInput(f"{what}: {reason(error.__cause__ or error)}") from error
        except (httpx.TransportError, HfHubHTTPError) as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            if refused or pause is None:
                again = "" if refused else "; what has arrived is kept, run the same command again to resume"
                raise BadInput(f"{what}: {reason(error)}{again}") from error
            print(f"{what}: {reason(error)}; trying again in {pause} s", flush=True)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def hub_files(repo: str, kind: str, revision: str) -> tuple[str, list[Record]]:
    """The commit of a hub repository's revision, and its files (name, bytes, sha256 where the hub states it)."""
    try:
        info: Any = HfApi().repo_info(repo, repo_type=kind, revision=revision, files_metadata=True, timeout=30)
    except RevisionNotFoundError as error:
        raise BadInput(f"{kind} {repo} has no revision {revision}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInput(f"no {kind} {repo} at {constants.ENDPOINT}, or one that needs a token (HF_TOKEN)") from error
    except OfflineModeIsEnabled as error:
        raise BadInput(f"{repo} is to be downloaded, but HF_HUB_OFFLINE is set; a local copy: --source DIR") from error
    except (httpx.HTTPError, HfHubHTTPError) as error:
        raise BadInput(
            f"cannot reach {constants.ENDPOINT} ({reason(error)}): check the network, or give --source DIR"
        ) from error
    files = info.siblings or []
    return str(info.sha), [{"name": f.rfilename, "bytes": f.size, "sha256": f.lfs and f.lfs.sha256} for f in files]


def hub_fetch(folder: Path, repo: str, kind: str, commit: str, names: list[str]) -> None:
    """Download files of a repository into `folder`; one whose hash is not the hub's is removed, and raises BadInput."""
    where: dict[str, Any] = {"repo_type": kind, "revision": commit, "local_dir": folder}
    try:
        persist(lambda: snapshot_download(repo, allow_patterns=names, **where), repo)
        wrong = [bad["path"] for bad in persist(lambda: HfApi().verify_repo_checksums(repo, **where), repo).mismatches]
    except OSError as error:
        if error.errno is not None:
            raise
        raise BadInput(f"{repo}: {reason(error)}; run the same command again") from error
    for name in wrong:
        (folder / name).unlink()
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise BadInput(
            f"{', '.join(lacking)}: damaged in the download (another hash than the hub's); run the same command again"
        )


def zenodo_files(record: str) -> list[Record]:
    """The files of a Zenodo record (name, bytes, checksum such as `md5:...`, url)."""
    address = f"{os.environ.get('ZENODO_ENDPOINT', 'https://zenodo.org')}/api/records/{record}"
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"{address} is to be asked, but HF_HUB_OFFLINE is set; a local copy: --source DIR")
    try:
        listed = persist(
            lambda: httpx.get(address, follow_redirects=True, timeout=30).raise_for_status().json(), address
        )
        return [
            {"name": f["key"], "bytes": f["size"], "sha256": None, "checksum": f["checksum"], "url": f["links"]["self"]}
            for f in listed["files"]
        ]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{address} does not list the files of a record ({reason(error)})") from error


def zenodo_fetch(folder: Path, file: Record) -> None:
    """Download one file of a Zenodo record into `folder`, under its name, and check it against the record's checksum."""
    local = url_fetch(file["url"], folder)
    kind, _, expected = file["checksum"].partition(":")
    with open(local, "rb") as handle:
        found = hashlib.file_digest(handle, kind).hexdigest()
    if found != expected:
        local.unlink()
        raise BadInput(f"{file['name']} was damaged in the download: its {kind} is {found}, not {expected}; run again")
    local.replace(folder / file["name"])


def need_room(folder: Path, size: int) -> None:
    """Raise BadInput where the disk of `folder` has no room for `size` bytes, of which the folder may hold some."""
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + held < size:
        raise BadInput(f"the disk of {folder} has {free / 1e9:.2f} GB free, {(size - held) / 1e9:.2f} GB are needed")


def url_fetch(url: str, folder: Path) -> Path:
    """Download a file over HTTP into `folder`, resuming what an earlier attempt left there.

    By the hub client's `http_get`, which resumes (Range) and shows progress; pooch and fsspec start again from zero.
    The partial file is named after the server's ETag, so that a file which has changed since is not continued.
    """
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise BadInput(f"{url} is not an address: {reason(error)}") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise BadInput(f"{url}: only addresses that begin with http:// or https:// and a host, or a local file")
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"{url} is to be downloaded, but HF_HUB_OFFLINE is set; a local copy: --source FILE")
    folder.mkdir(parents=True, exist_ok=True)
    headers = {"Accept-Encoding": "identity"}  # ranges count the bytes of the file, not of a compressed stream
    try:
        head = httpx.head(url, headers=headers, follow_redirects=True, timeout=30)
    except httpx.HTTPError as error:
        raise BadInput(f"cannot reach {url} ({reason(error)}): check the network and the address") from error
    tag = head.headers.get("ETag") or head.headers.get("Last-Modified") if head.is_success else None
    stated = head.headers.get("Content-Length") if head.is_success else None
    partial = folder / hashlib.sha256(f"{url} {tag}".encode()).hexdigest()[:16]

    def attempt() -> None:
        if not (tag and stated):
            partial.unlink(missing_ok=True)  # nothing tells whether more bytes would continue the same file
        with open(partial, "ab") as handle:
            size = int(stated) if stated else None
            http_get(url, handle, resume_size=handle.tell(), headers=headers, expected_size=size)

    try:
        persist(attempt, url)
    except OSError as error:
        if error.errno is not None:
            raise
        partial.unlink()
        raise BadInput(f"{url}: {reason(error)} It was removed") from error
    return partial


# --- the base model --------------------------------------------------------------------------------------------------


def checkpoint_files(files: list[Record]) -> list[Record]:
    """The files of a model repository that Transformers loads: settings, tokenizer, weights in one format.

    Safetensors where there are any, else PyTorch's pickled `.bin` (loaded as tensors only). No code.
    """
    flat = [file for file in files if "/" not in file["name"]]
    for start, end in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        weights = [file for file in flat if file["name"].startswith(start) and file["name"].endswith(end)]
        if weights:
            settings = [
                f for f in flat if f["name"].endswith((".json", ".model", ".jinja")) or f["name"] == "merges.txt"
            ]
            return settings + weights
    raise BadInput("the repository holds no model*.safetensors and no pytorch_model*.bin")


def collect_base(arguments: argparse.Namespace) -> None:
    """models/base, built beside its place and renamed into it: it is there whole, or not at all."""
    out, source = arguments.out, arguments.source
    given = {role: token for role in ("bos", "eos", "pad") if (token := getattr(arguments, f"{role}_token"))}
    wanted: Record = {"source": str(source)} if source else {"repo": arguments.repo, "revision": arguments.revision}
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

    origin: Record = {"path": str(source) if source else None, "repo": None, "revision": None}
    downloads = staging(out)
    if source:
        origin["from"] = listing(local[0].parent, [path.name for path in local]) if local else []
    else:
        commit, files = hub_files(arguments.repo, "model", arguments.revision)
        files = checkpoint_files(files)
        names = [file["name"] for file in files]
        need_room(downloads, 2 * sum(file["bytes"] for file in files))  # as downloaded, and as saved
        hub_fetch(downloads, arguments.repo, "model", commit, names)
        origin |= {"repo": arguments.repo, "revision": commit, "from": listing(downloads, names)}

    from prep import base  # here, for PyTorch takes seconds to load

    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        model = base.convert(source or downloads, new, given)
        names = [path.name for path in new.iterdir()]
        for name in names:
            (new / name).chmod(0o644)  # safetensors writes 0600
        write_record(new, {"wanted": wanted} | origin | {"files": listing(new, names), "model": model})
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


def check_books(path: Path) -> None:
    """Raise BadInput where a file is not the parquet, or not the book, that its name says."""
    if path.name.endswith(BOOK_SUFFIXES):
        kind_of(path.read_bytes(), str(path))
    if path.suffix != ".parquet":
        return
    try:
        columns = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path} is not a whole parquet file: {reason(error)}") from error
    if "complete_text" not in columns:
        raise BadInput(f"{path} has no column complete_text, so it is not of French-PD-Books; it has {columns}")


def collect_gallica(arguments: argparse.Namespace) -> None:
    """data/raw/gallica: files appear there once all are whole and checked."""
    out, source, count = arguments.out, arguments.source, arguments.files
    if source:
        local = {path.name: path for path in sorted(source.glob("*")) if path.name.endswith(SUFFIXES)}
        if not local:
            raise BadInput(f"{source} is not a folder with files of books ({' '.join(SUFFIXES)})")
        count = len(local) if count is None else count
        size = sum(path.stat().st_size for path in local.values())
        wanted: Record = {"source": str(source), "bytes": size, "files": count, "seed": arguments.seed}
    else:
        # About 2,000 books of 57 k words each in a file: a dozen hold over a billion tokens, whatever is filtered out.
        count = 12 if count is None else count
        wanted = {"repo": arguments.repo, "revision": arguments.revision, "files": count, "seed": arguments.seed}
    before = recorded(out)
    more = (
        before is not None
        and before["wanted"].get("files", 0) < count
        and {**before["wanted"], "files": count} == wanted
    )
    if not more and already(out, wanted):
        return

    downloads, commit = staging(out), ""
    if source:
        names = choose(list(local), count, arguments.seed)
        sums: dict[str, str | None] = {name: sha256(local[name]) for name in names}
    else:
        revision = before["revision"] if before else arguments.revision
        zenodo = arguments.repo == FICTION_REPO
        commit, files = (revision, zenodo_files(revision)) if zenodo else hub_files(arguments.repo, "dataset", revision)
        ends = (".zip", ".tar", ".tar.gz", ".tgz", ".tsv", ".tsv.gz") if zenodo else (".parquet",)
        remote = {file["name"].replace("/", "_"): file for file in files if file["name"].endswith(ends)}
        names = choose(list(remote), count, arguments.seed)
        sums = {name: remote[name]["sha256"] for name in names}
    foreign = sorted(p.name for p in out.glob("*") if p.name.endswith(SUFFIXES) and p.name not in names)
    if foreign:
        raise BadInput(f"{out} also holds {', '.join(foreign)}, not among the {count} chosen: remove or move them")
    wanting = [name for name in names if not (out / name).exists()]
    if not source:
        waiting = [remote[name] for name in wanting]
        size = sum(file["bytes"] for file in waiting)
        need_room(downloads, size)
        print(f"{len(wanting)} files of {arguments.repo}, {size / 1e6:,.1f} MB -> {out}", flush=True)
        if zenodo:
            for file in waiting:
                if not (downloads / file["name"]).is_file():
                    zenodo_fetch(downloads, file)
        elif waiting:
            hub_fetch(downloads, arguments.repo, "dataset", commit, [file["name"] for file in waiting])
    places = {name: local[name] if source else downloads / remote[name]["name"] for name in wanting}
    for place in places.values():
        check_books(place)
    out.mkdir(parents=True, exist_ok=True)
    for name, place in places.items():
        if source:
            link_or_copy(place, out / name)
        else:
            place.replace(out / name)
    held = listing(out, names)
    for entry in held:
        if sums[entry["name"]] not in (None, entry["sha256"]):
            raise BadInput(f"{out / entry['name']} is not the file of its source: remove it and run again")
    origin = {
        "path": str(source) if source else None,
        "repo": None if source else arguments.repo,
        "revision": commit or None,
    }
    write_record(out, {"wanted": wanted} | origin | {"files": held})
    shutil.rmtree(downloads, ignore_errors=True)
    print(f"{out}: {described({'wanted': wanted, 'files': held})}")


def link_or_copy(source: Path, place: Path) -> None:
    """A hard link where the disk allows it: nothing here writes into a collected file. Otherwise a whole copy."""
    try:
        os.link(source.resolve(), place)
    except OSError:
        with open(source, "rb") as reader, atomic_write(place, "wb") as writer:
            shutil.copyfileobj(reader, writer)


# --- the book --------------------------------------------------------------------------------------------------------


def book_suffix(path: Path, source: str) -> str:
    """`.pdf`, `.epub`, `.txt` ..., by the content of a file. Raises BadInput where it holds no book."""
    data = path.read_bytes()
    kind = kind_of(data, source)
    if kind != "pdf":  # reading one takes seconds; castle.py does
        read_bytes(data, source)
    return f".{kind}"


def collect_book(arguments: argparse.Namespace) -> None:
    """data/raw/book/book.pdf, book.epub, book.txt ... (the formats of prep/formats.py)."""
    out, source = arguments.out, arguments.source
    remote = "://" in source
    expected = (arguments.sha256 or "").lower()
    if not remote and not Path(source).is_file():
        raise BadInput(
            f"{source} is not a file; --source takes a book (PDF, EPUB, DOCX, text ...) or an http(s) address"
        )
    wanted = {"source": source, "sha256": None if remote else sha256(source)}
    if already(out, wanted):
        [held] = json.loads((out / "source.json").read_text(encoding="utf-8"))["files"]
        compare_sha256(out / held["name"], held["sha256"], expected)
        return

    downloads = staging(out)
    file = url_fetch(source, downloads) if remote else Path(source)
    try:
        name = "book" + book_suffix(file, source)
        compare_sha256(source, sha256(file), expected)
    except BadInput:
        if remote:
            file.unlink()
        raise
    # A run killed between the copy and source.json left the same file; anything else is the user's own.
    others = [path for path in out.glob("book.*") if path.name != name or sha256(path) != sha256(file)]
    if others:
        raise BadInput(f"{others[0]} is there, and is another book: remove it, or give another --out")
    with open(file, "rb") as reader, atomic_write(out / name, "wb") as writer:
        shutil.copyfileobj(reader, writer)
    files = listing(out, [name])
    origin = {"path": None if remote else source, "url": source if remote else None}
    write_record(out, {"wanted": wanted} | origin | {"files": files})
    shutil.rmtree(downloads, ignore_errors=True)
    print(f"{out / name}: {files[0]['bytes']:,} bytes, sha256 {files[0]['sha256']}")


def compare_sha256(what: Any, found: str, expected: str) -> None:
    """Raise BadInput where a checksum was given and is another."""
    if expected and found != expected:
        raise BadInput(f"{what} has sha256 {found}, not {expected}")


# --- the command line ------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments, with defaults that depend on each other filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{base,gallica,book}")

    base = commands.add_parser("base", help="the model that training starts from", description=collect_base.__doc__)
    base.add_argument("--repo", help=f"hub repository (default {BASE_REPO})")
    base.add_argument("--revision", help=f"its commit, tag or branch (default {BASE_REVISION[:12]}, or main)")
    base.add_argument("--source", type=Path, help="a local checkpoint folder or .gguf file instead")
    for role, use in (("bos", "starts a text"), ("eos", "ends a text"), ("pad", "fills up a batch")):
        base.add_argument(f"--{role}-token", metavar="TOKEN", help=f"the token that {use}, if not the model's own")
    base.add_argument("--out", type=Path, default=Path("models/base"), help="folder to make (default %(default)s)")
    base.set_defaults(collect=collect_base)

    gallica = commands.add_parser("gallica", help="files of books", description=collect_gallica.__doc__)
    gallica.add_argument(
        "--dataset",
        "--repo",
        dest="repo",
        help=f"{' or '.join(DATASETS)}, or one of the first's columns (default: the first)",
    )
    gallica.add_argument("--revision", help="its commit, tag or branch (default: the pinned one, or main)")
    gallica.add_argument("--source", type=Path, help="a local folder of books instead (linked, or copied)")
    gallica.add_argument("--files", type=int, help="how many, of about 400 MB each (default 12; all of --source)")
    gallica.add_argument("--seed", type=int, default=1, help="chooses which (default %(default)s)")
    gallica.add_argument("--out", type=Path, default=Path("data/raw/gallica"), help="folder (default %(default)s)")
    gallica.set_defaults(collect=collect_gallica)

    book = commands.add_parser("book", help="the novel of the last stage", description=collect_book.__doc__)
    book.add_argument(
        "--source",
        required=True,
        help="http(s) address or local file: PDF with text, EPUB, DOCX, ODT, HTML, RTF or text",
    )
    book.add_argument("--sha256", help="stop unless the file has this checksum")
    book.add_argument("--out", type=Path, default=Path("data/raw/book"), help="folder (default %(default)s)")
    book.set_defaults(collect=collect_book)

    arguments = parser.parse_args(argv)
    if arguments.command != "book":
        if arguments.source and (arguments.repo or arguments.revision):
            parser.error("--source is a local copy: --repo and --revision do not go with it")
        pinned = {BASE_REPO: BASE_REVISION} if arguments.command == "base" else DATASETS
        arguments.repo = arguments.repo or next(iter(pinned))
        arguments.revision = arguments.revision or pinned.get(arguments.repo, "main")
    return arguments


def main() -> None:
    """Run the chosen command."""
    arguments = parse()
    arguments.collect(arguments)


if __name__ == "__main__":
    run(main)
