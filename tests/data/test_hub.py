"""Sources on the Hugging Face hub, which a server of the test's plays: they are those of the files."""

import collections
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import pytest
import torch
from data.pairs import FORMS, everything, fill_folder, which

from polydpo_fast.data import PairLoader, SourceError, open_source

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("pyarrow")

REPOSITORY = "me/pairs"
COUNT = 12


class Handler(http.server.BaseHTTPRequestHandler):
    """What the hub's file system asks: whether a repository is there, what a folder has, parts of files."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        kind, _, rest = path.removeprefix("/").partition(f"datasets/{REPOSITORY}")
        found = re.fullmatch(r"(?:/(tree|resolve|revision)/([^/]+))?(?:/(.*))?", rest)
        self.server.asked[kind + (found[1] or "")] += 1
        if not path.startswith((f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/")) or self.server.private:
            return self.answer({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        if found[2] not in (None, "main", "v1.0"):
            return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        place = self.server.folder / (found[3] or "")
        if found[1] in (None, "revision"):
            return self.answer({"id": REPOSITORY, "sha": "a" * 40})
        if found[1] == "tree" and place.is_dir():
            return self.answer([self.entry(path) for path in sorted(place.iterdir())])
        if found[1] == "resolve" and place.is_file():
            data, asked = place.read_bytes(), self.headers["Range"]
            if asked is None:
                return self.answer(data)
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            part = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            return self.answer(data[first : last + 1], 206, part)
        return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def entry(self, path):
        name = path.relative_to(self.server.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        data = path.read_bytes()
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}

    def answer(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pairs"
    fill_folder(folder, range(COUNT))
    return folder


@pytest.fixture
def hub(folder, monkeypatch):
    """The server of a repository that is the folder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.folder, server.private = True, folder, False
        server.asked = collections.Counter()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        options = {"endpoint": f"http://127.0.0.1:{server.server_port}", "token": False}
        monkeypatch.setitem(fsspec.config.conf, "hf", options)
        try:
            yield server
        finally:
            fsspec.get_filesystem_class("hf").clear_instance_cache()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("revision", ["", "@v1.0"])
@pytest.mark.parametrize("name", FORMS)
def test_the_hub_gives_what_the_disk_does(folder, hub, name, revision):
    local = open_source(folder / name)
    root = f"hf://datasets/{REPOSITORY}{revision}"
    for where in (f"{root}/{name}", f"{root}/*.{name.rpartition('.')[2]}"):
        remote = open_source(where)
        assert everything(remote) == everything(local)
        assert remote.fingerprint == local.fingerprint
        assert remote.position(3).startswith(f"{root}/pairs.")


@pytest.mark.parametrize("name", FORMS)
def test_loaders_over_the_hub_ask_it_once_what_there_is(folder, hub, name):
    options = dict(batch_size=4, seed=3, size=2, dtype=torch.uint8)
    want = [which(batch.pixels) for batch in PairLoader(folder / name, **options)]
    loader = PairLoader(f"hf://datasets/{REPOSITORY}/{name}", **options)
    assert [which(batch.pixels) for batch in loader] == want
    # About the repository and each folder, perhaps in each reading thread: not about each file.
    assert hub.asked["api/"] <= 1 + loader._readers
    assert hub.asked["api/tree"] <= 2 * (1 + loader._readers) < 2 * COUNT
    loader.set_epoch(0)
    outer = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=2)  # forked while connections are open
    assert [which(batch.pixels) for batch in outer] == want


@pytest.mark.parametrize("place", ["pairs.tar", "", "*.parquet"])
def test_a_repository_that_is_private_or_missing_is_told_as_the_hub_tells_it(hub, place):
    hub.private = True
    with pytest.raises(SourceError, match=f"(?si)datasets/{REPOSITORY}/{re.escape(place)}: .*repository not found"):
        open_source(f"hf://datasets/{REPOSITORY}/{place}")


@pytest.mark.parametrize("place", ["@v2/pairs.tar", "/nothing.tar", "/images"])
def test_what_a_repository_does_not_have(hub, place):
    reason = "(?i)revision not found" if "@" in place else "no such file"
    with pytest.raises(SourceError, match=reason):
        open_source(f"hf://datasets/{REPOSITORY}{place}")
