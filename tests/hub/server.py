"""A loopback server speaking the part of the Hugging Face Hub's HTTP protocol that stock clients use.

Own code, standard library plus PyYAML (which huggingface_hub already needs). For tests only.

    with HubServer() as hub:                       # two ports on 127.0.0.1: the hub, and its "CDN"/object store
        os.environ.update(hub.env())               # before importing huggingface_hub
        HfApi(endpoint=hub.url, token="hf_alice_write").create_repo("org/m")

or `python server.py --port 8899` (prints the environment to use).

What is real: repositories, commits, branches, tags, PRs, git blob ids, LFS batch (basic and multipart, with
sha256 check), cross-origin signed redirects (an Authorization header sent to the store is refused, as S3 does),
ranges, etags, pagination, gating, private repos, read/write tokens, 412 on a stale parent, renames.
With xet=True the stock hf_xet client does its own chunking, deduplication and reconstruction against a CAS in a
local folder ("local://" is a scheme that client knows): uploads and downloads then never touch the object store. That
folder's database is locked by the process using it: one client process at a time, in that mode.
With xet=False (the default) set HF_HUB_DISABLE_XET=1, as env() does: an upload with hf_xet on does not fall back.
What is not here: git over HTTP, Spaces runtime, dataset viewer exports, the CAS over HTTP.

Faults: hub.fault("PUT", r"/_store/", status=503, times=2); hub.fault("GET", r"/_store/", cut=1_000_000)
        hub.fault("POST", r"/commit/", lost=True): done, but the answer never arrives
        hub.down(); hub.up(): an outage, then the same ports again
Log:    hub.log is a list of dicts, one a request, in the order answered.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import struct
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
LFS_GLOBS = [
    "*.arrow",
    "*.bin",
    "*.ckpt",
    "*.gz",
    "*.h5",
    "*.jpg",
    "*.msgpack",
    "*.npy",
    "*.npz",
    "*.onnx",
    "*.parquet",
    "*.pickle",
    "*.pkl",
    "*.png",
    "*.pt",
    "*.pth",
    "*.safetensors",
    "*.tar",
    "*.tar.*",
    "*.tgz",
    "*.zip",
    "*.zst",
]
VERBS = {
    "revision",
    "tree",
    "paths-info",
    "refs",
    "commits",
    "branch",
    "tag",
    "preupload",
    "commit",
    "discussions",
    "settings",
    "auth-check",
    "xet-read-token",
    "xet-write-token",
    "safetensors-metadata",
    "user-access-request",
    "resolve",
    "raw",
}


class HubError(Exception):
    def __init__(self, status, message, code=None, headers=None, body=None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers, self.body = status, message, code, headers or {}, body


@dataclass
class Entry:
    oid: str  # git blob id (of the pointer, for an LFS file)
    size: int
    sha256: str | None  # set for LFS
    data: bytes | None  # set for regular files


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    tree: dict


@dataclass
class Repo:
    type: str
    id: str
    owner: str
    private: bool = False
    gated: object = False
    granted: set = field(default_factory=set)
    created: str = ""
    uid: str = field(default_factory=lambda: uuid.uuid4().hex[:24])
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)  # "refs/heads/main" -> oid
    threads: list = field(default_factory=list)  # discussions and pull requests
    lock: threading.RLock = field(default_factory=threading.RLock)


def now():
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n".encode()


def front_matter(text: str):
    m = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.S)
    return yaml.safe_load(m.group(1)) if m else None


class Listener(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128  # with the default of 5, threads that come at once wait a second


class HubServer:
    """The state, and two listeners. Every argument is a knob a test may want."""

    def __init__(self, port=0, *, page_size=1000, multipart_above=16 << 20, chunk_size=8 << 20, root=None, xet=False):
        self.page_size, self.multipart_above, self.chunk_size, self.xet = page_size, multipart_above, chunk_size, xet
        self.xet_of = {}  # sha256 -> (xet file hash, size)
        self.repos, self.moved, self.faults, self.log, self.likes = {}, {}, [], [], {}
        self.users = {  # token -> (user, role, orgs in which the user may write)
            "hf_alice_write": ("alice", "write", ["org"]),
            "hf_alice_read": ("alice", "read", ["org"]),
            "hf_bob_write": ("bob", "write", []),
            "hf_bob_read": ("bob", "read", []),
        }
        self._tmp = None if root else tempfile.TemporaryDirectory(prefix="hub-")
        self.root = Path(root or self._tmp.name)
        self.lock, self.uploads, self.on_commit = threading.RLock(), {}, []
        self.is_down = False
        self.store_srv = self._listen(0, StoreHandler)
        self.hub_srv = self._listen(port, HubHandler)
        self.url = f"http://127.0.0.1:{self.hub_srv.server_port}"
        self.store_url = f"http://127.0.0.1:{self.store_srv.server_port}"

    def _listen(self, port, handler):
        srv = Listener(("127.0.0.1", port), handler)
        srv.hub = self
        threading.Thread(target=srv.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return srv

    def env(self, home=None, token="hf_alice_write"):
        home = home or str(self.root / "hf_home")
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": str(int(not self.xet)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def down(self):
        """An outage: both ports refuse connections, and connections that clients kept open are cut at the next use."""
        self.is_down = True
        for srv in (self.hub_srv, self.store_srv):
            srv.shutdown(), srv.server_close()

    def up(self):
        """The end of an outage: the same ports, with all that was there."""
        self.store_srv = self._listen(self.store_srv.server_port, StoreHandler)
        self.hub_srv = self._listen(self.hub_srv.server_port, HubHandler)
        self.is_down = False

    def close(self):
        if not self.is_down:
            self.down()
        if self._tmp:
            self._tmp.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *a):
        return self.close()

    def fault(
        self,
        method,
        pattern,
        *,
        status=None,
        times=1,
        headers=None,
        body=None,
        cut=None,
        lost=False,
        delay=0.0,
        skip=0,
    ):
        """The next `times` matching requests (after `skip`) get `status`, or their body is cut after `cut` bytes.

        With `lost` the request is carried out, and the connection closed in place of an answer.
        """
        f = {
            "method": method,
            "re": re.compile(pattern),
            "status": status,
            "times": times,
            "headers": headers or {},
            "body": body,
            "cut": cut,
            "lost": lost,
            "delay": delay,
            "skip": skip,
            "hits": 0,
        }
        self.faults.append(f)
        return f

    def take_fault(self, method, path):
        with self.lock:
            for f in self.faults:
                if f["times"] > 0 and f["method"] in (method, "*") and f["re"].search(path):
                    if f["skip"] > 0:
                        f["skip"] -= 1
                        continue
                    f["times"] -= 1
                    f["hits"] += 1
                    return f

    def blob(self, sha):
        return self.root / "lfs" / sha[:2] / sha

    # -- xet ------------------------------------------------------------
    @property
    def cas_url(self):
        return f"local://{self.root / 'cas'}"

    def find_xet(self, sha):
        """The size of `sha`, if a shard that a client wrote has it; notes its xet hash."""

        def swap(b):
            return b"".join(b[i : i + 8][::-1] for i in range(0, 32, 8)).hex()  # hashes are four LE words

        if self.xet and sha not in self.xet_of:
            for shard in (self.root / "cas").rglob("shards/*.mdb"):
                data, at = shard.read_bytes(), 48
                while data[at : at + 32] != b"\xff" * 32:
                    name, (flags, n) = swap(data[at : at + 32]), struct.unpack_from("<II", data, at + 32)
                    size = sum(struct.unpack_from("<I", data, at + 48 * (i + 1) + 36)[0] for i in range(n))
                    at += 48 * (1 + n * (2 if flags >> 31 else 1))
                    if flags >> 30 & 1:
                        self.xet_of[swap(data[at : at + 32])] = name, size
                        at += 48
        return self.xet_of.get(sha, (None, None))[1]

    def content(self, sha):
        """The path of an LFS file, rebuilt from the CAS if it came that way (waiting while a client locks it)."""
        path = self.blob(sha)
        if not path.exists() and sha in self.xet_of:
            import hf_xet

            tmp = self.root / "rebuild" / uuid.uuid4().hex
            tmp.parent.mkdir(exist_ok=True)
            for left in reversed(range(50)):
                try:
                    with hf_xet.XetSession().new_file_download_group(
                        endpoint=self.cas_url, token="t", token_expiry_unix_secs=int(time.time()) + 3600
                    ) as group:
                        group.start_download_file(hf_xet.XetFileInfo(*self.xet_of[sha]), str(tmp))
                    break
                except RuntimeError as e:
                    if "lock" not in str(e) or not left:
                        raise
                    time.sleep(0.2)
            save_blob(self, sha, tmp.read_bytes())
            tmp.unlink()
        return path

    # -- repositories ------------------------------------------------------------
    def get_repo(self, rtype, rid, user, *, write=None, content=False):
        repo = self.repos.get((rtype, rid))
        mine = repo is not None and user is not None and self.may_write(user, repo.owner)
        if repo is None or (repo.private and not mine):
            raise HubError(
                401 if user is None else 404,
                "Invalid username or password." if user is None else "Repository not found",
                "RepoNotFound",
            )
        if content and repo.gated and not mine and (user is None or user[0] not in repo.granted):
            raise HubError(
                401 if user is None else 403,
                f"Access to {rtype} {rid} is restricted and you are not in the authorized list. "
                f"Visit {self.url}/{rid} to ask for access.",
                "GatedRepo",
            )
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and (user[1] != "write" or not (mine or write == "pr")):
            raise HubError(
                403,
                "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
                if user[1] == "write"
                else "Forbidden: you must use a write token to upload to a repository.",
            )
        return repo

    @staticmethod
    def may_write(user, namespace):
        return user[0] == namespace or namespace in user[2]

    def create(self, rtype, rid, user, private=False, gated=False):
        with self.lock:
            if (rtype, rid) in self.repos:
                raise HubError(
                    409,
                    "You already created this model repo",
                    body={"error": f"You already created this {rtype} repo", "url": self.web(rtype, rid)},
                )
            repo = Repo(rtype, rid, rid.split("/")[0], bool(private), gated, created=now())
            self.moved.pop((rtype, rid), None)
            self.repos[rtype, rid] = repo
        attrs = "".join(f"{g} filter=lfs diff=lfs merge=lfs -text\n" for g in LFS_GLOBS).encode()
        self.add_commit(
            repo,
            "refs/heads/main",
            {".gitattributes": Entry(git_blob(attrs), len(attrs), None, attrs)},
            "initial commit",
            "",
            user[0],
        )
        return repo

    def web(self, rtype, rid):
        return f"{self.url}/{'' if rtype == 'model' else rtype + 's/'}{rid}"

    def add_commit(self, repo, ref, tree, title, message, author, parent=None):
        oid = hashlib.sha1(
            json.dumps(
                [repo.id, ref, parent, title, message, time.time_ns(), sorted((p, e.oid) for p, e in tree.items())]
            ).encode()
        ).hexdigest()
        repo.commits[oid] = Commit(oid, parent, title, message, author, now(), tree)
        repo.refs[ref] = oid
        return oid

    def resolve(self, repo, rev):
        rev = "main" if rev == "HEAD" else rev
        oid = repo.refs.get(f"refs/heads/{rev}") or repo.refs.get(f"refs/tags/{rev}") or repo.refs.get(rev)
        if oid is None and re.fullmatch(r"[0-9a-f]{7,40}", rev):
            oid = next((o for o in repo.commits if o.startswith(rev)), None)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return repo.commits[oid]

    def read(self, e: Entry) -> bytes:
        return self.content(e.sha256).read_bytes() if e.sha256 else e.data

    # -- what the hub derives from a revision's files ------------------------------------------------------------
    def info(self, repo, commit, blobs=False):
        tree = commit.tree
        card, config = {}, {}
        try:
            card = front_matter(self.read(tree["README.md"]).decode()) or {} if "README.md" in tree else {}
            config = json.loads(self.read(tree["config.json"])) if "config.json" in tree else {}
        except Exception:
            pass
        sib = []
        for p, e in sorted(tree.items()):
            s = {"rfilename": p}
            if blobs:
                s |= {"size": e.size, "blobId": e.oid}
                if e.sha256:
                    s["lfs"] = {"sha256": e.sha256, "size": e.size, "pointerSize": len(lfs_pointer(e.sha256, e.size))}
            sib.append(s)
        out = {
            "_id": repo.uid,
            "id": repo.id,
            "author": repo.owner,
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "siblings": sib,
            "usedStorage": sum(e.size for e in tree.values()),
        }
        if card:
            out["cardData"] = card
        tags = list(card.get("tags") or [])
        if card.get("license"):
            tags.append(f"license:{card['license']}")
        ds = card.get("datasets") or []
        tags += [f"dataset:{d}" for d in ([ds] if isinstance(ds, str) else ds)]
        if repo.type == "model":
            archs = config.get("architectures") or []
            lib = card.get("library_name") or (
                "transformers" if "model_type" in config else "timm" if "architecture" in config else None
            )
            task = card.get("pipeline_tag") or (
                "image-classification"
                if lib == "timm" or any(a.endswith("ForImageClassification") for a in archs)
                else None
            )
            if lib:
                out["library_name"] = lib
                tags.insert(0, lib)
            if any(p.endswith(".safetensors") for p in tree):
                tags.insert(1, "safetensors")
                # A file may not be safetensors, whatever its name says.
                with contextlib.suppress(ValueError, struct.error):
                    out["safetensors"] = self.count_params(tree)
            if config.get("model_type"):
                tags.append(config["model_type"])
            if "auto_map" in config:
                tags.append("custom_code")
            if task:
                out["pipeline_tag"] = task
                tags.append(task)
            if lib == "transformers" and archs:
                amap = config.get("auto_map") or {}
                auto = next((k for k, v in amap.items() if str(v).split(".")[-1] == archs[0]), None)
                out["transformersInfo"] = {
                    "auto_model": auto
                    or ("AutoModelForImageClassification" if task == "image-classification" else "AutoModel")
                }
                if task:
                    out["transformersInfo"]["pipeline_tag"] = task
                if "preprocessor_config.json" in tree:
                    out["transformersInfo"]["processor"] = "AutoImageProcessor"
                if auto:
                    out["transformersInfo"]["custom_class"] = amap[auto]
            out |= {
                "modelId": repo.id,
                "config": {k: config[k] for k in ("architectures", "model_type", "auto_map") if k in config},
                "spaces": [],
            }
            if card.get("widget"):
                out["widgetData"] = card["widget"]
        elif repo.type == "dataset":
            tags += [f"task_categories:{t}" for t in card.get("task_categories") or []]
        else:
            out |= {"sdk": card.get("sdk", "static"), "runtime": {"stage": "RUNNING", "hardware": {}}}
        out["tags"] = list(dict.fromkeys(map(str, tags))) + ["region:us"]
        return out

    def safetensors_header(self, e):
        with open(self.content(e.sha256), "rb") as f:
            n = struct.unpack("<Q", f.read(8))[0]
            if n > 100 << 20:
                raise ValueError("header too large")
            return json.loads(f.read(n))

    def count_params(self, tree):
        counts = {}
        for p, e in tree.items():
            if p.endswith(".safetensors") and e.sha256:
                for k, t in self.safetensors_header(e).items():
                    if k != "__metadata__":
                        n = 1
                        for d in t["shape"]:
                            n *= d
                        counts[t["dtype"]] = counts.get(t["dtype"], 0) + n
        return {"parameters": counts, "total": sum(counts.values())}


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, 1 << 16
    server_version, sys_version = "hub", ""

    hub = property(lambda self: self.server.hub)

    def log_message(self, *a):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def body(self):
        if self._body is None:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                out = bytearray()
                while n := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                    out += self.rfile.read(n)
                    self.rfile.readline()
                self.rfile.readline()
                self._body = bytes(out)
            else:
                n = int(self.headers.get("Content-Length") or 0)
                self._body = self.rfile.read(n)
                if len(self._body) < n:
                    self.close_connection = True
                    raise ConnectionResetError("body cut short")
        return self._body

    def json(self):
        return json.loads(self.body() or b"{}")

    def dispatch(self):
        self._body, self.status, t0 = None, 0, time.time()
        u = urlsplit(self.path)
        self.q = {k: v[-1] for k, v in parse_qs(u.query, keep_blank_values=True).items()}
        self.url_path, self.cut, self.lost = u.path, None, False
        if self.hub.is_down:  # on a connection from before the outage
            self.close_connection = True
            return self.connection.shutdown(2)
        fault = self.hub.take_fault(self.command, self.path)
        try:
            if fault and fault["delay"]:
                time.sleep(fault["delay"])
            if fault and fault["status"]:
                self.body()
                raise HubError(fault["status"], "injected", headers=fault["headers"], body=fault["body"])
            if fault:
                self.cut, self.lost = fault["cut"], fault["lost"]
            if self.cut is not None and self.command in ("PUT", "POST"):
                self.rfile.read(min(self.cut, int(self.headers.get("Content-Length") or 0)))
                self.close_connection = True
                self.status = -1
                self.connection.shutdown(2)
                return
            self.route()
        except HubError as e:
            try:
                self.body()
            except Exception:
                self.close_connection = True
            h = dict(e.headers)
            if e.code:
                h["X-Error-Code"] = e.code
            h["X-Error-Message"] = e.message.replace("\n", " ")
            self.reply(e.body if e.body is not None else {"error": e.message}, e.status, h)
        except (ConnectionError, BrokenPipeError):
            self.status, self.close_connection = self.status or -1, True
        except Exception as e:  # a bug in this server, or a request it does not know
            import traceback

            traceback.print_exc()
            self.reply({"error": f"loopback hub: {type(e).__name__}: {e}"}, 500)
        finally:
            self.hub.log.append(
                {
                    "m": self.command,
                    "path": self.path,
                    "status": self.status,
                    "port": "store" if isinstance(self, StoreHandler) else "hub",
                    "auth": (self.headers.get("Authorization") or "")[-14:] or None,
                    "range": self.headers.get("Range"),
                    "ua": self.headers.get("User-Agent", "")[:200],
                    "in": len(self._body or b""),
                    "ms": round(1000 * (time.time() - t0), 1),
                }
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = lambda self: self.dispatch()

    def reply(self, obj=None, status=200, headers=None, ctype="application/json"):
        data = (
            b""
            if obj is None
            else obj
            if isinstance(obj, bytes)
            else (obj.encode() if isinstance(obj, str) else json.dumps(obj).encode())
        )
        if self.lost:
            self.status, self.close_connection = status, True
            return self.connection.shutdown(2)
        self.start(status, len(data), ctype, headers)
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def start(self, status, length, ctype, headers=None):
        self.status = status
        self.send_response(status)
        h = {
            "Content-Type": ctype,
            "Content-Length": str(length),
            "X-Request-Id": uuid.uuid4().hex,
            "Access-Control-Allow-Origin": "*",
            "Access-Control-Expose-Headers": "X-Repo-Commit,X-Request-Id,X-Error-Code,X-Error-Message,X-Linked-Size,"
            "X-Linked-Etag,ETag,Link",
        }
        for k, v in (h | (headers or {})).items():
            self.send_header(k, str(v))
        self.end_headers()

    def send_content(self, src, size, etag, headers=None):
        """A file, honouring one Range and If-None-Match; `src` is bytes or a path."""
        start, end, status, h = 0, size - 1, 200, dict(headers or {})
        m = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if m and (m[1] or m[2]):
            start = int(m[1]) if m[1] else max(0, size - int(m[2]))
            end = min(size - 1, int(m[2])) if m[1] and m[2] else size - 1
            if start > end:
                raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
            status, h["Content-Range"] = 206, f"bytes {start}-{end}/{size}"
        h |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        self.start(status, end - start + 1, "application/octet-stream", h)
        if self.command == "HEAD":
            return self.wfile.flush()
        left = end - start + 1
        if isinstance(src, bytes):
            self.wfile.write(src[start : end + 1][: self.cut])
            if self.cut is not None and self.cut < left:
                self.wfile.flush()
                self.close_connection = True
                return self.connection.shutdown(2)
        else:
            with open(src, "rb") as f:
                f.seek(start)
                while left > 0:
                    chunk = f.read(min(left, 1 << 18))
                    if self.cut is not None and self.cut < len(chunk):
                        self.wfile.write(chunk[: self.cut])
                        self.wfile.flush()
                        self.close_connection = True
                        return self.connection.shutdown(2)
                    if self.cut is not None:
                        self.cut -= len(chunk)
                    self.wfile.write(chunk)
                    left -= len(chunk)
        self.wfile.flush()


class StoreHandler(Handler):
    """The object store: signed URLs only. Another origin, so clients must drop their token on the way here."""

    def route(self):
        _, kind, sha, *rest = self.url_path.split("/")[1:] + [""]
        if self.headers.get("Authorization"):
            raise HubError(400, "Only one auth mechanism allowed")
        if self.q.get("sig") != "ok":
            raise HubError(403, "Missing signature")
        if kind == "get":
            path = self.hub.content(sha)
            return self.send_content(path, path.stat().st_size, sha)
        data = self.body()
        if kind == "put":
            self.put(sha, data)
            return self.reply(b"", 200, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        if kind == "part":
            upload, n = rest[0], int(rest[1])
            self.hub.uploads[upload][n] = data
            return self.reply(b"", 200, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        raise HubError(404, "no such object")

    def put(self, sha, data):
        save_blob(self.hub, sha, data)


def save_blob(hub, sha, data):
    if hashlib.sha256(data).hexdigest() != sha:
        raise HubError(400, "sha256 does not match")
    path = hub.blob(sha)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix("." + uuid.uuid4().hex)
    tmp.write_bytes(data)
    tmp.rename(path)


class HubHandler(Handler):
    def user(self):
        auth = self.headers.get("Authorization", "")
        if not auth:
            return None
        u = self.hub.users.get(auth.removeprefix("Bearer ").strip())
        if u is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return u

    def route(self):
        path = self.url_path
        parts = path.strip("/").split("/")
        if self.command == "OPTIONS":
            return self.reply(b"", 204, {"Access-Control-Allow-Methods": "*", "Access-Control-Allow-Headers": "*"})
        if m := re.fullmatch(
            r"/(?:(datasets|spaces)/)?(.+?)\.git/info/lfs/(objects/batch|complete/\w+/\w+|verify)", path
        ):
            return self.lfs(TYPES[m[1] or "models"], unquote(m[2]), m[3])
        if parts[0] == "api":
            if parts[1] == "whoami-v2":
                return self.whoami()
            if parts[1] == "repos":
                return getattr(self, "repos_" + parts[2])()
            if parts[1] == "validate-yaml":
                return self.validate_yaml()
            if parts[1] == "resolve-cache":
                rtype, rest = TYPES[parts[2]], parts[3:]
                i = next(i for i, p in enumerate(rest) if re.fullmatch("[0-9a-f]{40}", p))
                return self.serve_file(
                    rtype, "/".join(rest[:i]), rest[i], unquote("/".join(rest[i + 1 :])), cached=True
                )
            if parts[1] in TYPES:
                rtype, rest = TYPES[parts[1]], parts[2:]
                if not rest:
                    return self.list_repos(rtype)
                n = 1 if len(rest) == 1 or rest[1] in VERBS else 2
                rid, rest = unquote("/".join(rest[:n])), rest[n:]
                self.redirect_if_moved(rtype, rid)
                verb = rest[0] if rest else "info"
                fn = getattr(self, "api_" + verb.replace("-", "_"), None)
                if fn is None:
                    raise HubError(404, "Sorry, we can't find the page you are looking for.")
                return fn(rtype, rid, [unquote(r) for r in rest[1:]])
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        rtype = "model"
        if parts[0] in TYPES:
            rtype, parts = TYPES[parts[0]], parts[1:]
        for n in (1, 2):
            if len(parts) > n + 1 and parts[n] in ("resolve", "raw"):
                rid = "/".join(parts[:n])
                self.redirect_if_moved(rtype, rid)
                # a revision such as refs/pr/1 arrives quoted, so it is one segment (quoted or not, be lenient)
                rest = parts[n + 1 :]
                k = 3 if rest[:2] in (["refs", "pr"], ["refs", "convert"]) else 1
                return self.serve_file(rtype, rid, unquote("/".join(rest[:k])), unquote("/".join(rest[k:])))
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def redirect_if_moved(self, rtype, rid):
        new = self.hub.moved.get((rtype, rid))
        if new and (rtype, rid) not in self.hub.repos:
            raise HubError(307, "moved", headers={"Location": self.path.replace(rid, new, 1)})

    # -- accounts and repositories ------------------------------------------------------------
    def whoami(self):
        u = self.user()
        if u is None:
            raise HubError(401, "Invalid username or password.")
        self.reply(
            {
                "type": "user",
                "id": hashlib.md5(u[0].encode()).hexdigest()[:24],
                "name": u[0],
                "fullname": u[0],
                "isPro": False,
                "orgs": [{"type": "org", "name": o, "fullname": o, "roleInOrg": "write"} for o in u[2]],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": u[1]}},
            }
        )

    def writer(self, namespace):
        u = self.user()
        if u is None:
            raise HubError(401, "Invalid username or password.")
        if u[1] != "write" or not self.hub.may_write(u, namespace):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        return u

    def repos_create(self):
        b = self.json()
        u = self.user() or self.writer("")
        ns = b.get("organization") or u[0]
        u = self.writer(ns)
        rtype, rid = b.get("type") or "model", f"{ns}/{b['name']}"
        private = b.get("private") or b.get("visibility") == "private"
        repo = self.hub.create(rtype, rid, u, private)
        self.reply({"url": self.hub.web(rtype, rid), "name": rid, "id": repo.uid})

    def repos_delete(self):
        b = self.json()
        u = self.user() or self.writer("")
        rtype, rid = b.get("type") or "model", f"{b.get('organization') or u[0]}/{b['name']}"
        self.hub.get_repo(rtype, rid, u, write=True)
        del self.hub.repos[rtype, rid]
        self.reply(b"OK", ctype="text/plain")

    def repos_move(self):
        b = self.json()
        rtype = b.get("type") or "model"
        repo = self.hub.get_repo(rtype, b["fromRepo"], self.user(), write=True)
        self.writer(b["toRepo"].split("/")[0])
        if (rtype, b["toRepo"]) in self.hub.repos:
            raise HubError(409, "target exists")
        del self.hub.repos[rtype, repo.id]
        self.hub.moved[rtype, repo.id] = b["toRepo"]
        repo.id, repo.owner = b["toRepo"], b["toRepo"].split("/")[0]
        self.hub.repos[rtype, repo.id] = repo
        self.reply(b"OK", ctype="text/plain")

    def list_repos(self, rtype):
        u, out = self.user(), []
        for (t, rid), r in sorted(self.hub.repos.items()):
            if t != rtype or (r.private and not (u and self.hub.may_write(u, r.owner))):
                continue
            i = self.hub.info(r, self.hub.resolve(r, "main"))
            if self.q.get("author") not in (None, r.owner) or self.q.get("search", "") not in rid:
                continue
            if self.q.get("pipeline_tag") not in (None, i.get("pipeline_tag")):
                continue
            if self.q.get("filter") and self.q["filter"] not in i["tags"]:
                continue
            out.append({k: v for k, v in i.items() if k not in ("siblings", "cardData", "config")})
        self.reply(out[: int(self.q.get("limit", 1000))])

    def validate_yaml(self):
        b = self.json()
        errors, warns = [], []
        try:
            card = front_matter(b["content"])
            if card is None:
                warns.append({"message": "empty or missing yaml metadata in repo card"})
            elif not isinstance(card, dict):
                errors.append({"message": "metadata must be a mapping"})
            else:
                lic = card.get("license")
                if lic is not None and not isinstance(lic, str):
                    errors.append({"message": '"license" must be a string'})
                for k in ("tags", "datasets", "metrics"):
                    if k in card and not isinstance(card[k], (list, str)):
                        errors.append({"message": f'"{k}" must be an array'})
        except yaml.YAMLError as e:
            errors.append({"message": f"Invalid YAML: {e}"})
        self.reply({"errors": errors, "warnings": warns}, 400 if errors else 200)

    # -- reading ------------------------------------------------------------
    def repo(self, rtype, rid, **kw):
        return self.hub.get_repo(rtype, rid, self.user(), **kw)

    def api_info(self, rtype, rid, rest):
        repo = self.repo(rtype, rid)
        c = self.hub.resolve(repo, rest[0] if rest else "main")
        out = self.hub.info(repo, c, blobs=self.q.get("blobs", "").lower() in ("true", "1"))
        expand = parse_qs(urlsplit(self.path).query).get("expand", []) + parse_qs(urlsplit(self.path).query).get(
            "expand[]", []
        )
        if expand:
            out = {k: v for k, v in out.items() if k in expand or k in ("_id", "id")}
        self.reply(out)

    api_revision = api_info

    def api_auth_check(self, rtype, rid, rest):
        self.repo(rtype, rid, content=True, write=True if rest == ["write"] else None)
        self.reply({})

    def api_settings(self, rtype, rid, rest):
        repo, b = self.repo(rtype, rid, write=True), self.json()
        if "visibility" in b or "private" in b:
            repo.private = b.get("private", b.get("visibility") == "private")
        if "gated" in b:
            repo.gated = b["gated"]
        self.reply({})

    def api_user_access_request(self, rtype, rid, rest):
        repo, b = self.repo(rtype, rid, write=True), self.json()
        repo.granted.add(b["user"]) if b.get("status", "accepted") == "accepted" else repo.granted.discard(b["user"])
        self.reply({})

    def entry_json(self, p, e, c=None):
        d = {"type": "file", "oid": e.oid, "size": e.size, "path": p}
        if e.sha256:
            d["lfs"] = {"oid": e.sha256, "size": e.size, "pointerSize": len(lfs_pointer(e.sha256, e.size))}
            if e.sha256 in self.hub.xet_of:
                d["xetHash"] = self.hub.xet_of[e.sha256][0]
        if c:
            d["lastCommit"] = {"id": c.oid, "title": c.title, "date": c.date}
            d["securityFileStatus"] = {"status": "safe"}
        return d

    def dir_json(self, d, c=None):
        out = {"type": "directory", "oid": hashlib.sha1(d.encode()).hexdigest(), "size": 0, "path": d}
        if c:
            out["lastCommit"] = {"id": c.oid, "title": c.title, "date": c.date}
        return out

    def api_tree(self, rtype, rid, rest):
        repo = self.repo(rtype, rid)
        c = self.hub.resolve(repo, rest[0])
        base = "/".join(rest[1:]).strip("/")
        rec, exp = (self.q.get(k, "").lower() in ("true", "1") for k in ("recursive", "expand"))
        rows = {}
        for p, e in c.tree.items():
            if base and not p.startswith(base + "/"):
                continue
            seg = p[len(base) + 1 if base else 0 :].split("/")
            for i in range(1, len(seg) if rec else min(2, len(seg))):
                d = "/".join(([base] if base else []) + seg[:i])
                rows.setdefault(d, self.dir_json(d, c if exp else None))
            if rec or len(seg) == 1:
                rows[p] = self.entry_json(p, e, c if exp else None)
        if base and not rows:
            raise HubError(404, f'{base} does not exist on "{rest[0]}"', "EntryNotFound")
        rows = [rows[k] for k in sorted(rows)]
        limit = min(int(self.q.get("limit", 10**9)), 50 if exp else self.hub.page_size, self.hub.page_size)
        start = int(base64.urlsafe_b64decode(self.q["cursor"])) if "cursor" in self.q else 0
        h = {"X-Repo-Commit": c.oid}
        if start + limit < len(rows):
            q = dict(self.q, cursor=base64.urlsafe_b64encode(str(start + limit).encode()).decode())
            h["Link"] = f'<{self.hub.url}{self.url_path}?{urlencode(q)}>; rel="next"'
        self.reply(rows[start : start + limit], headers=h)

    def api_paths_info(self, rtype, rid, rest):
        repo = self.repo(rtype, rid)
        c = self.hub.resolve(repo, rest[0])
        if "json" in self.headers.get("Content-Type", ""):
            b = self.json()
            paths, exp = b["paths"], b.get("expand")
        else:
            f = parse_qs(self.body().decode())
            paths, exp = f.get("paths", []), f.get("expand", ["false"])[-1].lower() in ("true", "1")
        out = []
        for p in [paths] if isinstance(paths, str) else paths:
            p = p.strip("/")
            if p in c.tree:
                out.append(self.entry_json(p, c.tree[p], c if exp else None))
            elif any(x.startswith(p + "/") for x in c.tree):
                out.append(self.dir_json(p, c if exp else None))
        self.reply(out, headers={"X-Repo-Commit": c.oid})

    def api_refs(self, rtype, rid, rest):
        repo = self.repo(rtype, rid)

        def ref(prefix):
            return [
                {"name": r[len(prefix) :], "ref": r, "targetCommit": o}
                for r, o in sorted(repo.refs.items())
                if r.startswith(prefix)
            ]

        out = {"branches": ref("refs/heads/"), "tags": ref("refs/tags/"), "converts": ref("refs/convert/")}
        if "include_prs" in self.q:
            out["pullRequests"] = ref("refs/pr/")
        self.reply(out)

    def api_commits(self, rtype, rid, rest):
        repo = self.repo(rtype, rid)
        c, out = self.hub.resolve(repo, rest[0]), []
        while c:
            out.append(
                {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
            )
            c = repo.commits.get(c.parent)
        self.reply(out, headers={"X-Total-Count": len(out)})

    def api_safetensors_metadata(self, rtype, rid, rest):
        repo = self.repo(rtype, rid, content=True)
        c = self.hub.resolve(repo, "main")
        index = json.loads(self.hub.read(c.tree["/".join(rest)]))
        heads = {}
        for shard in sorted(set(index["weight_map"].values())):
            heads[shard] = self.hub.safetensors_header(c.tree[shard])
        self.reply({"index": {"metadata": index.get("metadata")}, "headers": heads})

    def serve_file(self, rtype, rid, rev, path, cached=False):
        repo = self.repo(rtype, rid, content=True)
        c = self.hub.resolve(repo, rev)
        h = {"X-Repo-Commit": c.oid}
        e = c.tree.get(path)
        if e is None:
            raise HubError(404, "Entry not found", "EntryNotFound", h)
        if e.sha256:  # LFS: a signed URL on another origin
            h |= {
                "X-Linked-Size": e.size,
                "X-Linked-Etag": f'"{e.sha256}"',
                "Location": f"{self.hub.store_url}/_store/get/{e.sha256}?sig=ok&name={quote(path.split('/')[-1])}",
            }
            if e.sha256 in self.hub.xet_of:
                h |= {
                    "X-Xet-Hash": self.hub.xet_of[e.sha256][0],
                    "Link": f'<{self.hub.url}/api/{rtype}s/{repo.id}/xet-read-token/{c.oid}>; rel="xet-auth"',
                }
            return self.reply(b"Found. Redirecting", 302, h, "text/plain")
        if not cached:  # small file: a relative redirect to its immutable URL
            h |= {
                "X-Linked-Etag": f'"{e.oid}"',
                "X-Linked-Size": e.size,
                "Location": f"/api/resolve-cache/{rtype}s/{repo.id}/{c.oid}/{quote(path)}?"
                + urlencode({"etag": f'"{e.oid}"'}),
            }
            return self.reply(b"Temporary Redirect", 307, h, "text/plain")
        self.send_content(e.data, e.size, e.oid, h)

    # -- writing ------------------------------------------------------------
    def api_branch(self, rtype, rid, rest):
        repo, name = self.repo(rtype, rid, write=True), "/".join(rest)
        with repo.lock:
            if self.command == "DELETE":
                if name == "main" or repo.refs.pop("refs/heads/" + name, None) is None:
                    raise HubError(403 if name == "main" else 404, "Cannot delete", "RevisionNotFound")
                return self.reply({})
            if "refs/heads/" + name in repo.refs:
                raise HubError(409, f"Reference already exists: refs/heads/{name}")
            repo.refs["refs/heads/" + name] = self.hub.resolve(repo, self.json().get("startingPoint") or "main").oid
            self.reply({})

    def api_tag(self, rtype, rid, rest):
        repo, rev = self.repo(rtype, rid, write=True), "/".join(rest)
        with repo.lock:
            if self.command == "DELETE":
                if repo.refs.pop("refs/tags/" + rev, None) is None:
                    raise HubError(404, "Tag not found", "RevisionNotFound")
                return self.reply({})
            name = self.json()["tag"]
            if "refs/tags/" + name in repo.refs:
                raise HubError(409, f"Tag reference exists already: {name}")
            repo.refs["refs/tags/" + name] = self.hub.resolve(repo, rev).oid
            self.reply({})

    def write_level(self):
        return "pr" if self.q.get("create_pr") in ("1", "true") else True

    def api_preupload(self, rtype, rid, rest):
        repo, b = self.repo(rtype, rid, write=self.write_level()), self.json()
        tree = self.hub.resolve(repo, rest[0]).tree
        ignore = [g for g in (b.get("gitIgnore") or "").split() if not g.startswith("#")]
        globs = (
            [ln.split()[0] for ln in (tree[".gitattributes"].data or b"").decode().splitlines() if "filter=lfs" in ln]
            if ".gitattributes" in tree
            else []
        )
        out = []
        for f in b["files"]:
            name, sample = f["path"].split("/")[-1], base64.b64decode(f.get("sample", ""))
            binary = b"\0" in sample
            lfs = f["size"] > 10 << 20 or binary or any(fnmatch.fnmatch(name, g) for g in globs)
            e = tree.get(f["path"])
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": any(
                        fnmatch.fnmatch(f["path"], g) or fnmatch.fnmatch(name, g.rstrip("/")) for g in ignore
                    ),
                    **({"oid": e.sha256 or e.oid} if e else {}),
                }
            )
        self.reply({"files": out, "commitOid": self.hub.resolve(repo, rest[0]).oid})

    def xet_token(self, rtype, rid, rest, **kw):
        self.repo(rtype, rid, **kw)
        if not self.hub.xet:
            raise HubError(404, "this server has no xet storage")
        exp, cas = int(time.time()) + 3600, self.hub.cas_url
        self.reply(
            {"casUrl": cas, "accessToken": "xet", "exp": exp},
            headers={"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": exp},
        )

    def api_xet_read_token(self, *a):
        return self.xet_token(*a, content=True)

    def api_xet_write_token(self, *a):
        return self.xet_token(*a, write=self.write_level())

    def api_commit(self, rtype, rid, rest):
        hub, rev = self.hub, rest[0]
        repo = self.repo(rtype, rid, write=self.write_level())
        lines = [json.loads(ln) for ln in self.body().splitlines() if ln.strip()]
        head = next(x["value"] for x in lines if x["key"] == "header")
        with repo.lock:
            base = hub.resolve(repo, rev)
            if head.get("parentCommit") and head["parentCommit"] != base.oid:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(base.tree)
            for x in lines:
                k, v = x["key"], x["value"]
                if k == "file":
                    data = base64.b64decode(v["content"]) if v.get("encoding") == "base64" else v["content"].encode()
                    tree[v["path"]] = Entry(git_blob(data), len(data), None, data)
                elif k == "lfsFile":
                    blob = hub.blob(v["oid"])
                    n = blob.stat().st_size if blob.exists() else hub.find_xet(v["oid"])
                    if n is None:
                        raise HubError(400, f"LFS pointer pointed to a file that does not exist: {v['path']}")
                    tree[v["path"]] = Entry(git_blob(lfs_pointer(v["oid"], n)), n, v["oid"], None)
                elif k == "deletedFile":
                    if tree.pop(v["path"], None) is None:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                elif k == "deletedFolder":
                    pre = v["path"].rstrip("/") + "/"
                    for p in [p for p in tree if p.startswith(pre)]:
                        del tree[p]
            user, ref, extra = self.user()[0], f"refs/heads/{rev}", {}
            if rev.startswith("refs/pr/"):
                ref = rev
            elif ref not in repo.refs:
                raise HubError(400, "cannot commit to a tag or a commit")
            if self.write_level() == "pr":
                t = self.new_thread(repo, head["summary"], head.get("description", ""), user, True)
                ref = f"refs/pr/{t['num']}"
                extra = {"pullRequestUrl": f"{hub.web(rtype, rid)}/discussions/{t['num']}"}
            oid = hub.add_commit(repo, ref, tree, head["summary"], head.get("description", ""), user, base.oid)
        for fn in hub.on_commit:
            fn(repo, repo.commits[oid])
        self.reply(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{hub.web(rtype, rid)}/commit/{oid}",
                "hookOutput": "",
                **extra,
            }
        )

    def lfs(self, rtype, rid, what):
        hub = self.hub
        if what.startswith("complete/"):
            _, sha, upload = what.split("/")
            b, parts = self.json(), hub.uploads.get(upload)
            if parts is None or [p["partNumber"] for p in b["parts"]] != sorted(parts):
                raise HubError(400, "unknown upload, or parts missing")
            save_blob(hub, sha, b"".join(parts[n] for n in sorted(parts)))
            del hub.uploads[upload]
            return self.reply({"success": True})
        b = self.json()
        if what == "verify":
            if not hub.blob(b["oid"]).exists():
                raise HubError(404, "object not found")
            return self.reply({})
        # a pull request may bring objects too, so only a token is needed here; the commit checks the rest
        self.repo(rtype, rid, write="pr" if b["operation"] == "upload" else None)
        git = f"{hub.web(rtype, rid)}.git/info/lfs"
        out = []
        for o in b["objects"]:
            sha, size = o["oid"], o["size"]
            d = {"oid": sha, "size": size}
            if b["operation"] == "download":
                d["actions"] = {"download": {"href": f"{hub.store_url}/_store/get/{sha}?sig=ok"}}
            elif not hub.blob(sha).exists():
                if size > hub.multipart_above and "multipart" in b.get("transfers", []):
                    up = uuid.uuid4().hex
                    hub.uploads[up] = {}
                    n = -(-size // hub.chunk_size)
                    header = {"chunk_size": str(hub.chunk_size)} | {
                        f"{i:05d}": f"{hub.store_url}/_store/part/{sha}/{up}/{i}?sig=ok" for i in range(1, n + 1)
                    }
                    d["actions"] = {"upload": {"href": f"{git}/complete/{sha}/{up}", "header": header}}
                else:
                    d["actions"] = {"upload": {"href": f"{hub.store_url}/_store/put/{sha}?sig=ok"}}
                d["actions"]["verify"] = {"href": f"{git}/verify"}
            out.append(d)
        self.reply({"transfer": "basic", "objects": out}, ctype="application/vnd.git-lfs+json")

    # -- discussions and pull requests ------------------------------------------------------------
    def new_thread(self, repo, title, text, author, is_pr):
        t = {
            "num": len(repo.threads) + 1,
            "title": title,
            "author": author,
            "pr": is_pr,
            "at": now(),
            "changes_at": None,
            "status": "draft" if is_pr else "open",
            "events": [],
            "base": "refs/heads/main",
        }
        repo.threads.append(t)
        self.event(
            t,
            "comment",
            author,
            {
                "latest": {"raw": text, "html": text, "updatedAt": now(), "author": {"name": author}},
                "edited": False,
                "hidden": False,
            },
        )
        return t

    def event(self, t, kind, author, data):
        e = {"id": uuid.uuid4().hex, "type": kind, "createdAt": now(), "author": {"name": author}, "data": data}
        t["events"].append(e)
        return e

    def thread_json(self, repo, t, full=False):
        d = {
            "num": t["num"],
            "title": t["title"],
            "author": {"name": t["author"]},
            "createdAt": t["at"],
            "status": t["status"],
            "isPullRequest": t["pr"],
            "repo": {"name": repo.id, "type": repo.type},
            "numComments": len(t["events"]),
            "pinned": False,
            "repoOwner": {"name": repo.owner},
        }
        if full:
            d |= {"events": t["events"], "diff": "", "filesWithConflicts": []}
            if t["pr"]:
                d["changes"] = {"base": t["base"]} | ({"mergeCommitId": t["merged"]} if t.get("merged") else {})
        return d

    def api_discussions(self, rtype, rid, rest):
        repo = self.repo(rtype, rid)
        if not rest and self.command == "GET":
            rows = [self.thread_json(repo, t) for t in repo.threads]
            return self.reply({"discussions": rows, "count": len(rows), "start": 0})
        if rest and self.command == "GET":
            return self.reply(self.thread_json(repo, self.thread(repo, rest[0]), True))
        user, b = self.repo(rtype, rid, write="pr") and self.user()[0], self.json()
        if not rest:
            t = self.new_thread(repo, b["title"], b.get("description", ""), user, bool(b.get("pullRequest")))
            if t["pr"]:
                repo.refs[f"refs/pr/{t['num']}"] = repo.refs["refs/heads/main"]
            return self.reply(
                {"num": t["num"], "url": f"{self.hub.web(rtype, rid)}/discussions/{t['num']}", "pullRequest": t["pr"]}
            )
        t, verb = self.thread(repo, rest[0]), rest[1]
        if verb == "comment":
            e = self.event(
                t,
                "comment",
                user,
                {
                    "latest": {"raw": b["comment"], "html": b["comment"], "updatedAt": now(), "author": {"name": user}},
                    "edited": False,
                    "hidden": False,
                },
            )
            return self.reply({"newMessage": e})
        self.repo(rtype, rid, write=True)
        if verb == "status":
            t["status"] = b["status"]
            return self.reply({"newStatus": self.event(t, "status-change", user, {"status": b["status"]})})
        if verb == "title":
            e = self.event(t, "title-change", user, {"from": t["title"], "to": b["title"]})
            t["title"] = b["title"]
            return self.reply({"newTitle": e})
        if verb == "merge":
            with repo.lock:
                pr = repo.commits[repo.refs[f"refs/pr/{t['num']}"]]
                head = repo.commits[repo.refs["refs/heads/main"]]
                fork = pr
                while fork.parent and not self.is_ancestor(repo, fork.oid, head.oid):
                    fork = repo.commits[fork.parent]
                changed = {p for p in set(pr.tree) | set(fork.tree) if pr.tree.get(p) != fork.tree.get(p)}
                if any(head.tree.get(p) != fork.tree.get(p) for p in changed):
                    raise HubError(409, "This pull request has conflicts with its base")
                tree = {p: e for p, e in head.tree.items() if p not in changed}
                tree |= {p: pr.tree[p] for p in changed if p in pr.tree}
                t["merged"] = self.hub.add_commit(
                    repo, "refs/heads/main", tree, f"{t['title']} (#{t['num']})", "", user, head.oid
                )
                t["status"] = "merged"
            return self.reply({"newStatus": self.event(t, "status-change", user, {"status": "merged"})})
        raise HubError(404, "unknown action")

    @staticmethod
    def is_ancestor(repo, a, b):
        while b:
            if a == b:
                return True
            b = repo.commits[b].parent
        return False

    def thread(self, repo, num):
        n = int(num)
        if not 1 <= n <= len(repo.threads):
            raise HubError(404, "Discussion not found")
        return repo.threads[n - 1]


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--port", type=int, default=0)
    ap.add_argument("--root")
    ap.add_argument("--log", help="append each request to this file, as JSON lines")
    a = ap.parse_args()
    srv = HubServer(a.port, root=a.root)
    print("\n".join(f"export {k}={v}" for k, v in srv.env().items()), flush=True)
    seen = 0
    try:
        while True:
            time.sleep(0.2)
            if a.log and len(srv.log) > seen:
                with open(a.log, "a") as f:
                    for row in srv.log[seen:]:
                        f.write(json.dumps(row) + "\n")
                seen = len(srv.log)
    except KeyboardInterrupt:
        srv.close()
