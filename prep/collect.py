"""Step 0: bring the three sources into the working directory: a base model, books of Gallica, the novel.

    python prep/collect.py base                                  TinyLlama v1.1 from the hub   -> models/base
    python prep/collect.py base --source some/model.gguf         the same from a local file or folder
    python prep/collect.py gallica --files 12                    12 files of French-PD-Books   -> data/raw/gallica
    python prep/collect.py gallica --dataset biglam/gallica_literary_fictions --files 3        Gallica's fiction, as tables
    python prep/collect.py book --source https://.../novel.pdf   a PDF, EPUB, text ...         -> data/raw/book/book.pdf

Each collection ends with a `source.json` that says where it came from, with the sha256 of each file. It is written
last: with it, the same command again returns at once; without it, the command goes on where it was interrupted, in a
neighbouring folder `.<name>.download`. A collection is never overwritten: remove it first, or give another `--out`.

Downloads from the hub are checked against the hashes that the hub states. HF_ENDPOINT (a mirror), HF_TOKEN and
HF_HUB_OFFLINE=1 (local sources only) are honoured.
"""

import argparse
import json
import os
import random
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from prep.common import BadInput, atomic_write, run, sha256
from prep.download import Record, hub_fetch, hub_plan, need_room, reason, url_fetch, zenodo_fetch, zenodo_plan
from prep.formats import BOOK_SUFFIXES, kind_of, read_bytes
from prep.readers import SUFFIXES

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
    record: Record = json.loads((out / "source.json").read_text(encoding="utf-8"))
    for file in record["files"]:
        path = out / file["name"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise BadInput(f"{path} is missing or no longer as it was collected: remove {out} and collect it again")
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
    packages = ("huggingface_hub", "transformers", "torch")
    with atomic_write(out / "source.json") as handle:
        json.dump(record | {"versions": {p: version(p) for p in packages}}, handle, ensure_ascii=False, indent=2)
        handle.write("\n")


def staging(out: Path) -> Path:
    """Where downloads for `out` wait until they are whole and checked: on the same disk, so that a rename suffices."""
    return out.with_name(f".{out.name}.download")


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
        commit, files = hub_plan(downloads, arguments.repo, "model", arguments.revision)
        files = checkpoint_files(files)
        need_room(downloads, 2 * sum(file["bytes"] for file in files))  # as downloaded, and as saved
        for file in files:
            hub_fetch(downloads, arguments.repo, "model", commit, file)
        origin |= {"repo": arguments.repo, "revision": commit, "from": listing(downloads, [f["name"] for f in files])}

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
    """data/raw/gallica: each file appears there once it is whole and checked."""
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
    more = before is not None and before["wanted"]["files"] < count and {**before["wanted"], "files": count} == wanted
    if not more and already(out, wanted):
        return

    out.mkdir(parents=True, exist_ok=True)
    downloads = staging(out)
    if source:
        chosen = {name: local[name] for name in choose(list(local), count, arguments.seed)}
        commit = ""
    else:
        revision = before["revision"] if before else arguments.revision
        if arguments.repo == FICTION_REPO:
            commit, files = revision, zenodo_plan(downloads, revision)
        else:
            commit, files = hub_plan(downloads, arguments.repo, "dataset", revision)
        ends = SUFFIXES if arguments.repo == FICTION_REPO else (".parquet",)
        books = {file["name"].replace("/", "_"): file for file in files if file["name"].endswith(ends)}
        chosen = {name: books[name] for name in choose(list(books), count, arguments.seed)}
        need_room(downloads, sum(f["bytes"] for name, f in chosen.items() if not (out / name).exists()))
    foreign = sorted(p.name for p in out.glob("*") if p.name.endswith(SUFFIXES) and p.name not in chosen)
    if foreign:
        raise BadInput(f"{out} also holds {', '.join(foreign)}, not among the {count} chosen: remove or move them")

    for number, (name, file) in enumerate(chosen.items(), 1):
        place = out / name
        if not place.exists():
            print(f"file {number} of {len(chosen)}: {name}", flush=True)
            if source:
                check_books(file)
                link_or_copy(file, place)
            else:
                if arguments.repo == FICTION_REPO:
                    fetched = zenodo_fetch(downloads, file)
                else:
                    fetched = hub_fetch(downloads, arguments.repo, "dataset", commit, file)
                check_books(fetched)
                fetched.replace(place)
    held = listing(out, list(chosen))
    for entry in held:
        expected = sha256(chosen[entry["name"]]) if source else chosen[entry["name"]]["sha256"]
        if expected not in (None, entry["sha256"]):
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
    # A run killed between the copy and source.json left the same file; anything else is somebody's own.
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
