"""A local server that speaks the part of the hub's protocol that its client uses, and is an ordinary web server under /www/."""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40
INFO = re.compile(r"/api/(dataset|model)s/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/(?:(dataset)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub(ThreadingHTTPServer):
    """Set by tests:

    repos      {(kind, repo): (commit, {name: bytes})}; of you/name, to which tests push, these are `files`
    www        {name: bytes}
    served     {name: bytes sent in place of the file's}
    stop       {name: (bytes sent before the connection breaks, once; whether it falls silent instead)}
    breaks     sha256 of a file whose upload never ends
    gated      a repository whose files need a token
    denies     status with which pushes are refused
    swaps      whether other bytes than the uploaded ones are committed

    `seen`: (method, path, Range header) of each request for a file or a list; `puts`: sha256 of each upload.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.repos: dict[tuple[str, str], tuple[str, dict[str, bytes]]] = {("model", "you/name"): (COMMIT, self.files)}
        self.www: dict[str, bytes] = {}
        self.served: dict[str, bytes] = {}
        self.stop: dict[str, tuple[int, bool]] = {}
        self.seen: list[tuple[str, str, str | None]] = []
        self.blobs: dict[str, bytes] = {}  # uploaded, by sha256
        self.private: bool | None = None  # you/name
        self.breaks, self.denies, self.swaps, self.gated = "", 0, False, ""
        self.puts: list[str] = []
        self.released = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self, ending: str) -> list[str | None]:
        """The Range header of each GET of a file."""
        return [asked for method, path, asked in self.seen if method == "GET" and path.endswith(ending)]

    def offer(self, record: str, *names: str) -> None:
        """Files of `www` as those of a Zenodo record."""
        files = [
            {
                "key": name,
                "size": len(self.www[name]),
                "checksum": f"md5:{hashlib.md5(self.www[name]).hexdigest()}",
                "links": {"self": f"{self.url}/www/{name}"},
            }
            for name in names
        ]
        self.www[f"api/records/{record}"] = json.dumps({"files": files}).encode()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def send(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.seen.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/www/"):
            return self.send_file(path.removeprefix("/www/"), hub.www)
        if info := INFO.match(path):
            kind, repo, what, revision = info.groups()
        elif file := FILE.fullmatch(path):
            kind, repo, revision, name = file.groups()
        commit, files = hub.repos.get((kind or "model", repo), (None, {}))
        if not commit:
            return self.send(b"", 401, X_Error_Code="RepoNotFound")
        if revision not in (None, "main", commit):
            return self.send(b"", 404, X_Error_Code="RevisionNotFound")
        if not info and repo == hub.gated and not self.headers.get("Authorization"):
            return self.send(b"", 401, X_Error_Code="GatedRepo")
        if info:
            told = [{"type": "file", "path": n, "rfilename": n, **stated(n, data)} for n, data in files.items()]
            about = {"id": repo, "sha": commit, "siblings": told, "private": hub.private is not False}
            return self.send(told if what == "tree" else about)
        found = stated(name, files.get(name, b""))
        tag, size = found.get("lfs", found)["oid"], str(found["size"])
        return self.send_file(name, files, X_Repo_Commit=commit, X_Linked_Etag=f'"{tag}"', X_Linked_Size=size)

    do_HEAD = do_GET

    def send_file(self, name: str, files: dict[str, bytes], **headers: str) -> None:
        """One file from where the Range header says, with the accident that a test ordered for it."""
        hub = self.server
        if name not in files:
            return self.send(b"", 404, X_Error_Code="EntryNotFound")
        data = hub.served.get(name, files[name]) if self.command == "GET" else files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers |= {"ETag": f'"{hashlib.md5(files[name]).hexdigest()}"', "Content_Length": str(len(data) - start)}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        end, silent = len(data), False
        if self.command == "GET" and name in hub.stop:
            end, silent = hub.stop.pop(name)
            self.close_connection = True
        self.send(data[start:end], 206 if start else 200, **headers)
        if silent:
            hub.released.wait(60)

    def do_PUT(self) -> None:
        hub, oid, size = self.server, self.path.rsplit("/", 1)[1], int(self.headers["Content-Length"])
        if oid == hub.breaks:
            self.rfile.read(size // 2)
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        hub.puts.append(oid)
        hub.blobs[oid] = self.rfile.read(size)
        return self.send({})

    def do_POST(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if hub.denies:
            return self.send({"error": "no"}, hub.denies)
        if path.endswith("/repos/create"):
            hub.private = hub.private if hub.private is not None else json.loads(body)["visibility"] == "private"
            return self.send({"url": f"{hub.url}/you/name"})
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if "lfs" in stated(name, b"") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            return self.send({"files": files})
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in hub.blobs:
                    one["actions"] = {"upload": {"href": f"{hub.url}/put/{one['oid']}"}}
            return self.send({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = b"other" if hub.swaps else hub.blobs[line["value"]["oid"]]
            return self.send({"commitUrl": f"{hub.url}/you/name/commit/{COMMIT}", "commitOid": COMMIT})
        return self.send({"warnings": [], "errors": []})  # validate-yaml


def stated(name: str, data: bytes) -> dict[str, Any]:
    """What the hub states of a file: weights and parquet are kept with LFS, small files in git itself."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if not name.endswith((".parquet", ".bin", ".safetensors", ".gguf")):
        return {"oid": blob, "blobId": blob, "size": len(data)}
    digest = hashlib.sha256(data).hexdigest()
    lfs = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 130}
    return {"oid": blob, "blobId": blob, "size": len(data), "lfs": lfs}
