"""A stand-in for the Hugging Face hub: the few endpoints that downloads and uploads use, with faults on demand."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1_000_000


class Hub(ThreadingHTTPServer):
    """Serves `repos`: {"datasets/owner/name" or "models/owner/name": {path: content}}.

    Large files are kept as the hub keeps them: known by their SHA-256 and served from another address. After
    `cut[path]` bytes the next transfer of that file breaks off; a file in `dying` answers 500 from then on.
    Files in `damaged` come with a byte changed; repositories in `gated` answer 403. `transfers` logs the path
    and the Range header of every transfer.
    """

    daemon_threads = True

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.cut: dict[str, int] = {}
        self.dying: set[str] = set()
        self.damaged: set[str] = set()
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.transfers: list[tuple[str, str | None]] = []
        self.objects: dict[str, bytes] = {}
        """What was uploaded as LFS does it, by its SHA-256."""
        self.verified: set[str] = set()
        self.refused_uploads = 0
        """How many of the next uploads of objects answer 500."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(repos: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(repos)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            return self._api("/".join(parts[1:4]), parts[4:])
        at = parts.index("resolve")
        path = "/".join(parts[at + 2 :])
        if parts[0] == "cdn":
            return self._file(self.server.repos["/".join(parts[1:at])][path], path)
        repo = "/".join(parts[:at] if parts[0] == "datasets" else ["models", *parts[:at]])
        content = self.server.repos[repo][path]
        if len(content) > LARGE:
            return self._send(302, b"", {"Location": f"{self.server.url}/cdn/{repo}/resolve/{COMMIT}/{path}"})
        return self._file(content, path)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer writer":
            return self._send(403, b'{"error": "this token may not write"}')
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        repo, action = "/".join(parts[1:4]), parts[4:5]
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            repo = f"models/{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repos.setdefault(repo, {})
            if "private" in (asked.get("visibility"), asked.get("private") and "private"):
                self.server.private.add(repo)
            return self._json({"url": f"{self.server.url}/{repo.removeprefix('models/')}"})
        if action == ["preupload"]:
            return self._json({"files": [{**file, **_mode(file)} for file in json.loads(body)["files"]]})
        if action == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":  # a pointer to what was uploaded and verified before
                    assert line["value"]["oid"] in self.server.verified
                    self.server.repos[repo][line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
            return self._json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/{repo}"})
        if parts[-3:] == ["info", "lfs", "objects"] or parts[-1] == "batch":
            return self._lfs_batch(json.loads(body))
        if parts[0] == "verify":
            asked = json.loads(body)
            content = self.server.objects.get(asked["oid"], b"")
            whole = (hashlib.sha256(content).hexdigest(), len(content)) == (asked["oid"], asked["size"])
            self.server.verified |= {asked["oid"]} if whole else set()
            return self._send(200 if whole else 422, b"{}")
        return self._json({})  # the card's front matter is valid

    def do_PUT(self) -> None:
        """An object of LFS, at the address that the batch gave."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refused_uploads:
            self.server.refused_uploads -= 1
            return self._send(500, b"{}")
        if self.headers.get("Authorization"):  # an address signed by itself: a token must not be sent along
            return self._send(400, b"{}")
        self.server.objects[urlsplit(self.path).path.rpartition("/")[2]] = body
        return self._send(200, b"")

    def _lfs_batch(self, asked: dict) -> None:
        url = self.server.url
        objects = [
            {
                **known,
                "actions": {
                    "upload": {"href": f"{url}/objects/{known['oid']}"},
                    "verify": {"href": f"{url}/verify", "header": {"Authorization": "Bearer writer"}},
                },
            }
            for known in asked["objects"]
        ]
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        self._json({"transfer": "basic", "objects": objects})

    def _json(self, content: dict) -> None:
        self._send(200, json.dumps(content).encode())

    def _api(self, repo: str, rest: list[str]) -> None:
        if repo in self.server.gated:
            self._send(403, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"})
        elif repo not in self.server.repos:
            self._send(404, b'{"error": "none"}', {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self._send(404, b'{"error": "none"}', {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [_sibling(path, content) for path, content in self.server.repos[repo].items()]
            answer = {"id": repo.split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "private": False}
            self._send(200, json.dumps(answer).encode())

    def _file(self, content: bytes, path: str) -> None:
        asked = self.headers.get("Range")
        self.server.transfers.append((path, asked))
        if path in self.server.dying and path not in self.server.cut:
            return self._send(500, b"{}")
        if path in self.server.damaged:
            content = b"?" + content[1:]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        self._send(206 if asked else 200, content[start:], headers, self.server.cut.pop(path, None))

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}, limit: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:limit])
        if limit is not None:  # hang up in the middle
            self.close_connection = True


def _mode(file: dict) -> dict:
    """Weights go the way of LFS, as on the hub."""
    large = file["path"].endswith((".safetensors", ".bin")) or file["size"] > LARGE
    return {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


def _sibling(path: str, content: bytes) -> dict:
    entry = {"rfilename": path, "size": len(content)}
    entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if len(content) > LARGE:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
    return entry
