"""Bytes from the hub or from an address: resumed where a connection broke, shown as they come, checked.

`collect.py` decides what to fetch and where it goes. By the hub's own client; what it lacks is added here: it tries
again only where a server is silent, not where a connection is cut, and compares sizes but not hashes.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

# A broken Xet download starts again from its first byte, a plain one goes on where it broke.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import httpx
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils.sha import git_hash

from prep.common import BadInput, atomic_write, sha256

Record = dict[str, Any]
Result = TypeVar("Result")


def persist(download: Callable[[], Result], what: str) -> Result:
    """Call `download` again when the connection breaks, five times at most; each call continues from the bytes it has.

    The hub's client itself retries where a server cannot be reached or falls silent, but not a connection cut short.
    """
    for pause in (1, 2, 4, 8, None):
        try:
            return download()
        except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            raise BadInput(f"{what}: {reason(error.__cause__ or error)}") from error
        except (httpx.TransportError, HfHubHTTPError) as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            if refused or pause is None:
                again = "" if refused else "; what has arrived is kept, the same command continues"
                raise BadInput(f"{what}: {reason(error)}{again}") from error
            print(f"{what}: {reason(error)}; trying again in {pause} s", flush=True)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def reason(error: BaseException) -> str:
    """The first line of an exception that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def hub_files(repo: str, kind: str, revision: str) -> tuple[str, list[Record]]:
    """The commit that a revision of a hub repository stands for, and its files with size and hash.

    Large files have a sha256, small ones the SHA-1 of their git blob. Raises BadInput with what to do.
    """
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
    return str(info.sha), [
        {"name": f.rfilename, "bytes": f.size, "sha256": f.lfs and f.lfs.sha256, "git_sha1": f.blob_id}
        for f in info.siblings or []
    ]


def hub_plan(folder: Path, repo: str, kind: str, revision: str) -> tuple[str, list[Record]]:
    """`hub_files`, asked once: the answer stays with the downloads, so that what follows an interruption fits."""
    plan = folder / "plan.json"
    asked = {"repo": repo, "kind": kind, "revision": revision, "endpoint": constants.ENDPOINT}
    if plan.is_file():
        answer = json.loads(plan.read_text(encoding="utf-8"))
        if answer["asked"] == asked:
            return answer["commit"], answer["files"]
    commit, files = hub_files(repo, kind, revision)
    with atomic_write(plan) as handle:
        json.dump({"asked": asked, "commit": commit, "files": files}, handle)
    return commit, files


def hub_fetch(folder: Path, repo: str, kind: str, commit: str, file: Record) -> Path:
    """Download one file of a repository into `folder` and check it against the hub's hash.

    The client compares sizes only. Raises BadInput, and leaves no such file, where the hash differs.
    """
    name = file["name"]
    try:
        local = persist(
            lambda: Path(hf_hub_download(repo, name, repo_type=kind, revision=commit, local_dir=folder)), name
        )
    except OSError as error:
        if error.errno is not None:
            raise
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the server sent another size than it had stated
        raise BadInput(f"{name}: {reason(error)} It was removed") from error
    if file["sha256"]:
        expected, found = file["sha256"], sha256(local)
    else:
        expected, found = file["git_sha1"], git_hash(local.read_bytes())
    if found != expected:
        local.unlink()
        raise BadInput(
            f"{name} was damaged on its way: its hash is {found}, the hub says {expected}. "
            "It was removed; run the same command again"
        )
    return local


def zenodo_plan(folder: Path, record: str) -> list[Record]:
    """The files of a Zenodo record, with size, md5 and address; asked once, as `hub_plan` is."""
    plan = folder / "plan.json"
    address = f"{os.environ.get('ZENODO_ENDPOINT', 'https://zenodo.org')}/api/records/{record}"
    if plan.is_file() and (answer := json.loads(plan.read_text(encoding="utf-8")))["asked"] == address:
        return list(answer["files"])
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"{address} is to be asked, but HF_HUB_OFFLINE is set; a local copy: --source DIR")

    def ask() -> Any:
        return httpx.get(address, follow_redirects=True, timeout=30).raise_for_status().json()

    try:
        files = [
            {"name": f["key"], "bytes": f["size"], "sha256": None, "checksum": f["checksum"], "url": f["links"]["self"]}
            for f in persist(ask, address)["files"]
        ]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{address} does not list the files of a record ({reason(error)})") from error
    with atomic_write(plan) as handle:
        json.dump({"asked": address, "files": files}, handle)
    return files


def zenodo_fetch(folder: Path, file: Record) -> Path:
    """Download one file of a Zenodo record, going on where it was cut, and check it against the record's checksum."""
    local = url_fetch(file["url"], folder)
    kind, _, expected = file["checksum"].partition(":")
    with open(local, "rb") as handle:
        found = hashlib.file_digest(handle, kind).hexdigest()
    if found != expected:
        local.unlink()
        raise BadInput(f"{file['name']} was changed on its way: its {kind} is {found}, not {expected}. It was removed")
    return local


def need_room(folder: Path, size: int) -> None:
    """Raise BadInput where the disk of `folder` has no room for `size` bytes, of which the folder may hold some."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + held < size:
        raise BadInput(f"the disk of {folder} has {free / 1e9:.2f} GB free, {(size - held) / 1e9:.2f} GB are needed")


def url_fetch(url: str, folder: Path) -> Path:
    """Download a file over HTTP into `folder`, going on from what an earlier attempt left there.

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
