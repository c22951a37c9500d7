"""Send an exported stage (eval/export.py) to the Hugging Face hub. Without --yes it only lists what would go.

    python eval/push.py 2c you/name               files and sizes       (make push STAGE=2c REPO=you/name)
    python eval/push.py 2c you/name --yes         into a private repository; --public for one that all can read

The token is that of HF_TOKEN or of `hf auth login`. All files become one commit, so that a push which breaks leaves the
repository as it was; run again, it sends only what is not there yet. Afterwards the hub's hashes are compared with ours.
"""

from prep.command import run

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from prep.common import BadInput, changed, hashed, lock, reason

EXPORTS = Path("outputs/export")
RECORD = "export.json"  # of each step its inputs and files; rights and memorisation
SUMS = "SHA256SUMS"  # written last: it says that the export is whole
REFUSED = {
    401: "the hub does not accept the token, or has no such repository",
    403: "the token has no right to write there",
    404: "there is no such name on the hub",
}


def load(folder: Path) -> dict[str, Any]:
    """What is known of an export; nothing where it was not begun, or the record is damaged."""
    record: dict[str, Any] = {"steps": {}, "rights": "", "license": "other", "memorised": None}
    try:
        return record | json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return record


def files_of(record: dict[str, Any], *but: str) -> dict[str, str]:
    """{name: sha256} of the files of all steps but some."""
    steps = (step for name, step in record["steps"].items() if name not in but)
    return {file: sha for step in steps for file, sha in step["files"].items()}


def sums(record: dict[str, Any]) -> str:
    """SHA256SUMS, as sha256sum writes and checks it."""
    return "".join(f"{sha}  {name}\n" for name, sha in sorted(files_of(record).items()))


def push(folder: Path, files: dict[str, str], repo: str, public: bool) -> str:
    """Upload, and compare what the hub has then; returns the commit's address. Raises BadInput when any of it fails."""
    os.environ["HF_HUB_OFFLINE"] = "0"
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # plain uploads, whose failures are errors
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import httpx
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise BadInput("no token: set HF_TOKEN, or log in with `hf auth login`")
    api, done = HfApi(), None
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise BadInput(f"{repo} is there already and public: choose another name, or push with --public")
        message = f"Le Château: {folder.name}"
        done = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(files), commit_message=message)
        there = api.model_info(repo, revision=done.oid, files_metadata=True)
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        why = REFUSED.get(getattr(getattr(error, "response", None), "status_code", 0), reason(error))
        state = f"{done.commit_url} is there, but was not checked" if done else "all files become one commit or none"
        raise BadInput(f"the push to {repo} broke off: {why}; {state}. Run it again to resume") from error
    found = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in there.siblings or []}
    wrong = [name for name, sha in files.items() if name not in found or found[name] not in (None, sha)]
    if wrong := wrong or changed(folder, files):
        raise BadInput(f"{', '.join(wrong)} changed while pushed: {done.commit_url} is wrong; export and push again")
    return done.commit_url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="name of the recipe: 2b, 2c ...")
    parser.add_argument("repo", help="OWNER/NAME on the hub")
    parser.add_argument("--yes", action="store_true", help="push; without it, list what would go")
    parser.add_argument("--public", action="store_true", help="for all to read (default: private)")
    parser.add_argument("--despite-memorisation", action="store_true", help="although it may recite its training text")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise BadInput(f"{args.repo!r} is no repository: give OWNER/NAME")
    folder, again = EXPORTS / args.stage, f"export {args.stage} again (make export)"
    record = load(folder)
    if not (folder / SUMS).is_file() or (folder / SUMS).read_bytes() != sums(record).encode():
        raise BadInput(f"{folder} is no finished export; {again}")
    lock(folder)
    files = {**files_of(record), SUMS: hashed(folder / SUMS)}
    if wrong := changed(folder, files):
        raise BadInput(f"{', '.join(wrong)} in {folder}: missing, or not what was exported; {again}")
    found = record["memorised"] or "nobody measured what it memorised: evaluate, and export again with --report"
    if not found.startswith("did not") and not args.despite_memorisation:
        raise BadInput(f"{args.stage} may recite its training text ({found}); --despite-memorisation pushes it anyway")
    if args.public and not record["rights"]:
        raise BadInput(
            'nobody stated the rights in its training texts: export again with --rights "...", or push privately'
        )
    sizes = {name: (folder / name).stat().st_size for name in files}
    for name, size in sorted(sizes.items()):
        print(f"{size / 1e6:12,.1f} MB  {name}")
    kind = "public" if args.public else "private"
    print(f"{sum(sizes.values()) / 1e6:12,.1f} MB  in {len(files)} files to {args.repo}, {kind}")
    print(f"pushed: {push(folder, files, args.repo, args.public)}" if args.yes else "nothing was sent: --yes sends it")


if __name__ == "__main__":
    run(main)
