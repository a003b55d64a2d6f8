"""A stand-in for the hub on this machine: a server of the routes that huggingface_hub, transformers and datasets ask for, for
repositories that are folders. Whatever else they ask for does not exist, which they take."""

import hashlib
import http.server
import json
import re
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+(?:/(.*))?)?")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def log_message(self, *words):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if found := FILE.fullmatch(path):
            data, name, inside = found.groups()
            return self.file("datasets" if data else "models", name, inside)
        if found := API.fullmatch(path):
            kind, name, what, inside = found.groups()
            return self.api(kind, name, what, inside, body)
        return self.send(200 if path == "/" else 404)

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what):
        self.send(404, json.dumps({"error": f"{what} not found"}).encode(), X_Error_Code=what, X_Error_Message=f"{what} not found")

    def file(self, kind, name, inside):
        folder = self.server.repos.get((kind, name))
        if folder is None:
            return self.missing("RepoNotFound")
        if not (folder / inside).is_file():
            return self.missing("EntryNotFound")
        content = (folder / inside).read_bytes()
        return self.send(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    def api(self, kind, name, what, inside, body):
        folder = self.server.repos.get((kind, name))
        if folder is None:
            return self.missing("RepoNotFound")
        files = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
            for path in sorted(folder.iterdir())
        ]
        if what == "paths-info":
            asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            return self.json([file for file in files if file["path"] in asked])
        if what == "tree":
            return self.missing("EntryNotFound") if inside else self.json(files)
        siblings = [{"rfilename": file["path"]} for file in files]
        return self.json({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False, "disabled": False})

    def json(self, value):
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")


@contextmanager
def hub(repos):
    """Serve `repos`, folders by ("models" or "datasets", id). Gives the address, and what was asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos, server.asked = {key: Path(folder) for key, folder in repos.items()}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
