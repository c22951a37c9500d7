"""Send an exported stage (eval/export.py) to the Hugging Face hub. Without --yes it only lists what would go.

    python eval/push.py 2c you/name               files and sizes       (make push STAGE=2c REPO=you/name)
    python eval/push.py 2c you/name --yes         into a private repository; --public for one that all can read

The token is that of HF_TOKEN or of `hf auth login`. All files become one commit, so that a push which breaks leaves the
repository as it was; run again, it sends only what is not there yet. Afterwards the hub's hashes are compared with ours.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prep.common import BadInput, atomic_write, digest, hashed, lock, need_room, reason, run

RECORD = "export.json"
SUMS = "SHA256SUMS"
EXPORT_VERSION = 1  # raise it when the same inputs give other files


class Folder:
    """outputs/export/2c, and what is known of the files in it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.record: dict[str, Any] = json.loads((path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.record = {}
        self.record = {"steps": {}, "proof": {}} | self.record

    def step(self, name: str, inputs: Any, size: int, make: Callable[[Path], None]) -> None:
        """Have `make` write files into an empty folder, about `size` bytes, and move them here once all are whole.

        Nothing is done when the same inputs made the files that are here. Raises BadInput when the disk is too small.
        """
        wanted, done = digest([EXPORT_VERSION, inputs]), self.record["steps"].get(name, {})
        if done.get("inputs") == wanted and all(self.has(file, sha) for file, sha in done["files"].items()):
            print(f"{name}: unchanged")
            return
        making = self.path / ".part"
        shutil.rmtree(making, ignore_errors=True)
        need_room(making, size)
        try:
            make(making)
            self.record["steps"].pop(name, None)
            if name != "card":
                self.record["proof"] = {}
            self.save()
            files = sorted(path.relative_to(making) for path in making.rglob("*") if path.is_file())
            for file in files:
                (self.path / file).parent.mkdir(exist_ok=True)
                (making / file).chmod(0o644)  # safetensors makes it 0600
                os.replace(making / file, self.path / file)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        self.record["steps"][name] = {
            "inputs": wanted,
            "files": {str(file): hashed(self.path / file) for file in files},
        }
        self.save()
        print(f"{name}: {sum((self.path / file).stat().st_size for file in files) / 1e6:,.1f} MB")

    def has(self, file: str, sha: str) -> bool:
        return (self.path / file).is_file() and hashed(self.path / file) == sha

    def files(self, *but: str) -> dict[str, str]:
        """{name: sha256} of the files of all steps but some."""
        steps = self.record["steps"]
        return {file: sha for name, step in steps.items() if name not in but for file, sha in step["files"].items()}

    def save(self) -> None:
        with atomic_write(self.path / RECORD) as file:
            json.dump(self.record, file, ensure_ascii=False, indent=1)
            file.write("\n")


def files_of(folder: Folder) -> dict[str, str]:
    """{name: sha256} of what goes. Raises BadInput when the export is not whole, not proved, or was changed."""
    again = f"export {folder.path.name} again (make export)"
    if "card" not in folder.record["steps"] or not folder.record["proof"]:
        raise BadInput(f"{folder.path} is no finished export; {again}")
    files = folder.files()
    for name, sha in files.items():
        if not folder.has(name, sha):
            raise BadInput(f"{folder.path / name} is missing or not the file that was exported; {again}")
    return files | {SUMS: hashed(folder.path / SUMS)}


def push(folder: Folder, files: dict[str, str], repo: str, public: bool) -> str:
    """Upload, and compare what the hub has then; returns the commit's address. Raises BadInput when any of it fails."""
    os.environ["HF_HUB_OFFLINE"] = "0"
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # plain uploads, whose failures are errors
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import httpx
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if not get_token():
        raise BadInput("no token: set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise BadInput(f"{repo} is there already and public: choose another name, or push with --public")
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder.path,
            allow_patterns=list(files),
            commit_message=f"Le Château: {folder.path.name}",
        )
        there = api.model_info(repo, revision=done.oid, files_metadata=True)
    except RepositoryNotFoundError as error:
        raise BadInput(f"{repo} is not there for this token: is the name right, and may it write there?") from error
    except HfHubHTTPError as error:
        why = "the token has no right to write there" if error.response.status_code in (401, 403) else reason(error)
        raise BadInput(f"the hub refused the push to {repo}: {why}; nothing was committed") from error
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise BadInput(
            f"the push to {repo} broke off: {reason(error)}; nothing was committed, run it again to resume"
        ) from error
    found = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in there.siblings or []}
    wrong = [name for name, sha in files.items() if name not in found or found[name] not in (None, sha)]
    if wrong or any(not folder.has(name, sha) for name, sha in files.items()):
        raise BadInput(
            f"{', '.join(wrong) or folder.path} changed while it was pushed: {done.commit_url} is wrong; push again"
        )
    return str(done.commit_url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="name of the recipe: 2b, 2c ...")
    parser.add_argument("repo", help="OWNER/NAME on the hub")
    parser.add_argument("--out", type=Path, default=Path("outputs/export"), help="folder of the exports")
    parser.add_argument("--yes", action="store_true", help="push; without it, list what would go")
    parser.add_argument("--public", action="store_true", help="for all to read (default: private)")
    parser.add_argument("--despite-memorisation", action="store_true", help="although it may recite its training text")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise BadInput(f"{args.repo!r} is no repository: give OWNER/NAME")
    folder = Folder(args.out / args.stage)
    files = files_of(folder)
    lock(folder.path)
    record = folder.record
    if record["memorised"] is None or record["memorised"].startswith("memorised"):
        found = record["memorised"] or "nobody measured what it memorised: evaluate, and export again with --report"
        print(f"{args.stage}: {found}")
        if not args.despite_memorisation:
            raise BadInput(
                f"{args.stage} may recite its training text ({found}); --despite-memorisation pushes it anyway"
            )
    if args.public and not record["rights"]:
        raise BadInput(
            'nobody stated the rights in its training texts: export again with --rights "...", or push privately'
        )
    sizes = {name: (folder.path / name).stat().st_size for name in files}
    for name, size in sorted(sizes.items()):
        print(f"{size / 1e6:12,.1f} MB  {name}")
    kind = "public" if args.public else "private"
    print(f"{sum(sizes.values()) / 1e6:12,.1f} MB  in {len(files)} files to {args.repo}, {kind}")
    print(f"pushed: {push(folder, files, args.repo, args.public)}" if args.yes else "nothing was sent: --yes sends it")


if __name__ == "__main__":
    run(main)
