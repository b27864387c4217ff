"""A bucket that does not exist: what fsspec and TensorStore ask of one, answered from a dictionary.

Like a real one it has no folders, only names with slashes in them; nothing is appended; moving is copying.
"""

import contextlib
import http.server
import io
import json
import os
import threading
import urllib.parse
from collections.abc import Generator
from unittest import mock

import fsspec
from fsspec.spec import AbstractFileSystem

OBJECTS: dict[str, bytes] = {}
"""``bucket/name`` -> content."""
READ_ONLY = threading.Event()


class Bucket(AbstractFileSystem):
    """The driver of ``gs://`` in place of gcsfs."""

    protocol = ("gs", "gcs")
    cachable = False

    def _below(self, path):
        prefix = path.rstrip("/") + "/"
        return {name: content for name, content in OBJECTS.items() if name.startswith(prefix)}

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if path in OBJECTS:
            return {"name": path, "size": len(OBJECTS[path]), "type": "file"}
        if self._below(path):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path in OBJECTS:
            found = [path]
        else:
            found = sorted({"/".join(name.split("/")[: path.count("/") + 2]) for name in self._below(path)})
        if not found:
            raise FileNotFoundError(path)
        return [self.info(name) for name in found] if detail else found

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            if path not in OBJECTS:
                raise FileNotFoundError(path)
            return io.BytesIO(OBJECTS[path])
        if mode != "wb":
            raise NotImplementedError(f"mode {mode!r}: objects are written whole")
        return _Written(path)

    def pipe_file(self, path, value, mode="overwrite", **_):
        path = self._strip_protocol(path)
        if mode == "create" and path in OBJECTS:
            raise FileExistsError(path)
        _put(path, value)

    def rm_file(self, path):
        if OBJECTS.pop(self._strip_protocol(path), None) is None:
            raise FileNotFoundError(path)

    def rm(self, path, recursive=False, maxdepth=None):
        path = self._strip_protocol(path)
        names = [path] if path in OBJECTS else list(self._below(path)) if recursive else []
        if not names:
            raise FileNotFoundError(path)
        for name in names:
            del OBJECTS[name]

    def cp_file(self, path1, path2, **_):
        _put(self._strip_protocol(path2), OBJECTS[self._strip_protocol(path1)])

    def makedirs(self, path, exist_ok=False): ...

    def mkdir(self, path, create_parents=True, **_): ...

    def rmdir(self, path): ...


class _Written(io.BytesIO):
    def __init__(self, path):
        super().__init__()
        self._path = path

    def close(self):
        if not self.closed:
            _put(self._path, self.getvalue())
        super().close()


def _put(path, content):
    if READ_ONLY.is_set():
        raise PermissionError("Forbidden: the account has no storage.objects.create")
    OBJECTS[path] = bytes(content)


class _Api(http.server.BaseHTTPRequestHandler):
    """The part of the JSON API of Cloud Storage that TensorStore uses."""

    protocol_version = "HTTP/1.1"

    def _answer(self, code, content=b"", kind="application/json"):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(content)

    def _about(self, name):
        bucket, _, rest = name.partition("/")
        size = str(len(OBJECTS[name]))
        return {"bucket": bucket, "name": rest, "generation": "1", "size": size}

    def _target(self):
        url = urllib.parse.urlsplit(self.path)
        words = url.path.split("/")
        bucket = words[words.index("b") + 1]
        rest = urllib.parse.unquote("/".join(words[words.index("o") + 1 :])) if "o" in words else ""
        return bucket, rest, {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}

    def do_GET(self):
        bucket, name, query = self._target()
        if not name:
            prefix = f"{bucket}/{query.get('prefix', '')}"
            items = [self._about(found) for found in sorted(OBJECTS) if found.startswith(prefix)]
            return self._answer(200, json.dumps({"items": items}).encode())
        content = OBJECTS.get(f"{bucket}/{name}")
        if content is None:
            return self._answer(404)
        if query.get("alt") != "media":
            return self._answer(200, json.dumps(self._about(f"{bucket}/{name}")).encode())
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            part = content[int(first) : end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.send_header("x-goog-generation", "1")
            self.end_headers()
            self.wfile.write(part)
            return None
        return self._answer(200, content, "application/octet-stream")

    def do_POST(self):
        bucket, _, query = self._target()
        OBJECTS[name := f"{bucket}/{query['name']}"] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, json.dumps(self._about(name)).encode())

    def do_DELETE(self):
        bucket, name, _ = self._target()
        self._answer(204 if OBJECTS.pop(f"{bucket}/{name}", None) is not None else 404)

    def log_message(self, *_): ...


@contextlib.contextmanager
def bucket() -> Generator[dict[str, bytes]]:
    """While it is open, ``gs://`` is the dictionary it gives, for fsspec, etils, Orbax and TensorStore."""
    from etils.epath import backend
    from orbax.checkpoint._src.path import gcs_utils

    OBJECTS.clear()
    server = _server()
    settings = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "EPATH_USE_TF": "false",
    }
    with (
        mock.patch.dict(os.environ, settings),
        mock.patch.object(gcs_utils, "is_hierarchical_namespace_enabled", return_value=False),
    ):
        fsspec.register_implementation("gcs", Bucket, clobber=True)
        backend.fsspec_backend._get_filesystem.cache_clear()
        try:
            yield OBJECTS
        finally:
            READ_ONLY.clear()
            backend.fsspec_backend._get_filesystem.cache_clear()


_SERVERS: list[http.server.ThreadingHTTPServer] = []


def _server():
    """One per process, as TensorStore asks for its address once."""
    if not _SERVERS:
        _SERVERS.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Api))
        threading.Thread(target=_SERVERS[0].serve_forever, daemon=True).start()
    return _SERVERS[0]
