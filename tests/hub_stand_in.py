"""A stand-in for the Hub on loopback: what huggingface_hub 2.4 calls to upload and download a model, without Xet.

`python tests/hub_stand_in.py --port 8123` serves until it is stopped. Point HF_ENDPOINT at it, and set
HF_HUB_DISABLE_XET=1 so that huggingface_hub takes the LFS protocol. Everything is in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, USER = "hf_stand_in", "alice"
READ_TOKEN = "hf_may_only_read"
LARGE = (".safetensors", ".gguf", ".bin", ".png")
NAME = r"([^/]+/[^/]+)"


@dataclass
class Repository:
    """Files of the newest commit: bytes of small ones, the sha256 of large ones. past: the same of every commit."""

    private: bool
    small: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, str] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    past: dict[str, Repository] = field(default_factory=dict)

    def add_commit(self, commit: str, small: dict[str, bytes], large: dict[str, str]) -> None:
        """Make these the files of the newest commit."""
        self.small, self.large = small, large
        self.commits.append(commit)
        self.past[commit] = Repository(self.private, small, large, list(self.commits))

    def at(self, revision: str | None) -> Repository:
        """The repository as it was at a commit; for the name of a branch, as it is now."""
        return self.past.get(revision or "", self)

    def facts(self, path: str, objects: dict[str, bytes]) -> dict[str, Any]:
        """What is listed about a file: size and blob id, and where it is a large one its sha256."""
        if path in self.small:
            return {"size": len(self.small[path]), "blobId": blob_id(self.small[path])}
        oid = self.large[path]
        size = len(objects[oid])
        return {"size": size, "blobId": oid[:40], "lfs": {"sha256": oid, "size": size, "pointerSize": 134}}


@dataclass
class Hub:
    """What the stand-in holds, every request it got, and faults to inject.

    breaks: called with (method, path) before a request is answered; a status code is the answer instead, 0 hangs up.
    cuts: by file name, after how many bytes the next download of it hangs up. spoilt: by path, the bytes that are given
    instead of those listed. ranges: (path, first byte, byte after the last) of every request for a part of a file.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, str, int]] = field(default_factory=list)
    breaks: Callable[[str, str], int | None] | None = None
    cuts: dict[str, int] = field(default_factory=dict)
    spoilt: dict[str, bytes] = field(default_factory=dict)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, repository: str, folder: Path) -> str:
        """A new commit that holds the files of a folder, and its name."""
        held = self.repositories.setdefault(repository, Repository(private=False))
        small: dict[str, bytes] = {}
        large: dict[str, str] = {}
        for path in sorted(file for file in folder.iterdir() if file.is_file()):
            content = path.read_bytes()
            if path.name.endswith(LARGE):
                large[path.name] = hashlib.sha256(content).hexdigest()
                self.objects[large[path.name]] = content
            else:
                small[path.name] = content
        held.add_commit(hashlib.sha1(json.dumps([large, held.commits]).encode()).hexdigest(), small, large)
        return held.commits[-1]

    def requests(self, method: str, part: str) -> list[str]:
        """Paths of the requests with this method that contain `part`."""
        return [path for called, path, _ in self.log if called == method and part in path]

    def content(self, repository: str) -> dict[str, bytes]:
        """Every file of a repository."""
        held = self.repositories[repository]
        return held.small | {name: self.objects[oid] for name, oid in held.large.items()}


def blob_id(content: bytes) -> str:
    """What git calls a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Silent: `Hub.log` keeps the requests."""

    def answer(self, code: int, value: Any = None, raw: bytes | None = None, **headers: str) -> None:
        content = raw if raw is not None else json.dumps(value if value is not None else {}).encode()
        self.send_response(code)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = self.hub.cuts.pop(unquote(urlsplit(self.path).path).rpartition("/")[2], None)
        self.wfile.write(content[:sent])
        if sent is not None:
            self.close_connection = True

    def refuse(self, code: int, name: str, message: str) -> None:
        self.answer(code, {"error": message}, X_Error_Code=name, X_Error_Message=message)

    def body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        content = b""
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return content

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def handle_any(self) -> None:
        path, content = unquote(urlsplit(self.path).path), self.body()
        with self.hub.lock:
            self.hub.log.append((self.command, path, len(content)))
            broken = self.hub.breaks(self.command, path) if self.hub.breaks else None
        if broken == 0:
            self.close_connection = True
            return
        if broken:
            self.answer(broken, {"error": "injected"})
            return
        if self.token not in ("", TOKEN, READ_TOKEN):
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                method(self, content, *found.groups())
                return
        self.answer(404, {"error": f"the stand-in has no route {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def may_write(self) -> bool:
        if self.token == TOKEN:
            return True
        self.refuse(403 if self.token == READ_TOKEN else 401, "", "this token may not write")
        return False

    def repository(self, name: str) -> Repository | None:
        """A repository that the caller may see; else 404 is answered, as the Hub does for private ones, too."""
        held = self.hub.repositories.get(name)
        if held is None or (held.private and not self.token):
            self.refuse(404, "RepoNotFound", "Repository not found")
            return None
        return held

    def whoami(self, _content: bytes) -> None:
        if not self.token:
            self.refuse(401, "", "Invalid username or password.")
            return
        self.answer(200, {"type": "user", "name": USER, "fullname": USER, "orgs": []})

    def validate(self, content: bytes) -> None:
        """The Hub refuses unknown licences; the stand-in knows that much."""
        text = json.loads(content)["content"]
        wrong = re.search(r"^license: *no-such-licence$", text, re.MULTILINE)
        errors = [{"message": '"license" must be one of the known ones'}] if wrong else []
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, content: bytes) -> None:
        if not self.may_write():
            return
        asked = json.loads(content)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": url})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private)
        self.answer(200, {"url": url, "name": name, "id": name})

    def preupload(self, content: bytes, name: str, _revision: str) -> None:
        held = self.repository(name)
        if held is None or not self.may_write():
            return
        files = []
        for file in json.loads(content)["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 1 << 20
            known = held.small.get(file["path"])
            oid = held.large.get(file["path"]) or (blob_id(known) if known is not None else None)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def lfs_batch(self, content: bytes, name: str) -> None:
        if self.repository(name) is None or not self.may_write():
            return
        objects = []
        for wanted in json.loads(content)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs-store/{wanted['oid']}", "header": {}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify", "header": {}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, content: bytes, oid: str) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            self.answer(400, {"error": "the bytes are not those that were announced"})
            return
        self.hub.objects[oid] = content
        self.answer(200)

    def verify(self, content: bytes) -> None:
        self.answer(200 if json.loads(content)["oid"] in self.hub.objects else 404)

    def commit(self, content: bytes, name: str, _revision: str) -> None:
        held = self.repository(name)
        if held is None or not self.may_write():
            return
        small, large = dict(held.small), dict(held.large)
        for line in filter(None, content.splitlines()):
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind != "header":
                small.pop(value["path"], None)
                large.pop(value["path"], None)
            if kind == "file":
                small[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self.answer(400, {"error": f"object {value['oid']} was never sent"})
                    return
                large[value["path"]] = value["oid"]
        commit = hashlib.sha1(content + held.commits[-1].encode()).hexdigest()
        held.add_commit(commit, small, large)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def tree(self, _content: bytes, name: str, revision: str) -> None:
        held = self.repository(name)
        if held is None:
            return
        held = held.at(revision)
        entries = []
        for path in (*held.small, *held.large):
            found = held.facts(path, self.hub.objects)
            lfs = {"lfs": {"oid": held.large[path], **found["lfs"]}} if "lfs" in found else {}
            entries.append({"type": "file", "path": path, "oid": found["blobId"], "size": found["size"], **lfs})
        self.answer(200, sorted(entries, key=lambda entry: entry["path"]))

    def info(self, _content: bytes, name: str, revision: str | None = None) -> None:
        held = self.repository(name)
        if held is None:
            return
        held = held.at(revision)
        siblings = [{"rfilename": path} for path in sorted({**held.small, **held.large})]
        if "blobs=true" in urlsplit(self.path).query.lower():
            for entry in siblings:
                entry |= held.facts(entry["rfilename"], self.hub.objects)
        facts = {"id": name, "modelId": name, "sha": held.commits[-1], "private": held.private, "siblings": siblings}
        self.answer(200, {"_id": "1", "tags": [], "downloads": 0, "likes": 0, **facts})

    def resolve(self, _content: bytes, name: str, revision: str, path: str) -> None:
        held = self.repository(name)
        if held is None:
            return
        held = held.at(revision)
        content = held.small.get(path, self.hub.objects.get(held.large.get(path, "")))
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        tag = held.large.get(path) or blob_id(content)
        content = self.hub.spoilt.get(path, content)
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": held.commits[-1], "Accept_Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None or self.command == "HEAD":
            self.answer(200, raw=content, **headers)
            return
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        with self.hub.lock:
            self.hub.ranges.append((path, first, last + 1))
        about = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, raw=content[first : last + 1], Content_Range=about, **headers)


ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/validate-yaml", Handler.validate),
    (r"/api/repos/create", Handler.create),
    (rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/lfs-store/([0-9a-f]{64})", Handler.store),
    (r"/lfs-verify", Handler.verify),
    (rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"/api/models/{NAME}/tree/(.+)", Handler.tree),
    (rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"/api/models/{NAME}", Handler.info),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)


@contextmanager
def serving(port: int = 0) -> Iterator[Hub]:
    """A hub on loopback, on a free port unless one is named."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8123)
    with serving(parser.parse_args().port) as running:
        print(f"HF_ENDPOINT={running.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={TOKEN}", flush=True)
        threading.Event().wait()
