"""Sources over HTTP, from a web server of the test's, and over S3, from moto's: they are those of the files."""

import contextlib
import functools
import http.server
import io
import itertools
import json
import os
import pickle
import re
import sys
import tarfile
import threading
import urllib.parse

import pytest
import torch
from data.pairs import FORMS as NAMES
from data.pairs import everything, fill_folder, plain, png, which

from polydpo_fast.data import PairError, PairLoader, SourceError, open_source, read_ledger
from polydpo_fast.data.formats import remote
from polydpo_fast.data.formats.files import File

fsspec = pytest.importorskip("fsspec")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TINY = dict(size=2, dtype=torch.uint8)
COUNT = 12


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSES_S", (0.0, 0.0))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "web" / "the pairs"
    fill_folder(folder, range(COUNT))
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges, unless `server.whole`. If they are set, `server.status` is the answer to everything, and
    `server.busy` to every other request; as many as `server.breaks` are left without one."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which waits 40 ms for each answer

    def breaks(self):
        self.server.breaks -= 1
        self.close_connection = self.close_connection or self.server.breaks >= 0
        return self.server.breaks >= 0

    def do_GET(self):
        if self.breaks():
            return None
        self.server.asked.append((self.path, self.headers.get("Range")))
        if self.server.status:
            return self.send_error(self.server.status)
        if self.server.busy and len(self.server.asked) % 2:
            return self.send_error(self.server.busy)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        path = self.translate_path(self.path)
        if found is None or self.server.whole:
            return super().do_GET()
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return self.send_error(404)
        part = data[int(found[1]) : int(found[2] or len(data)) + 1]
        if not part:
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {found[1]}-{int(found[1]) + len(part) - 1}/{len(data)}")
        self.end_headers()
        return self.wfile.write(part)

    def do_HEAD(self):
        if self.breaks():
            return None
        return self.send_error(self.server.status) if self.server.status else super().do_HEAD()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(folder):
    """A server of the folder, and its address."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    handler = functools.partial(Handler, directory=str(folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.asked, server.whole, server.status, server.busy = True, [], False, 0, 0
        server.breaks = 0
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_port}/{urllib.parse.quote(folder.name)}"
        finally:
            fsspec.filesystem("http").clear_instance_cache()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", NAMES)
def test_the_web_gives_what_the_disk_does(folder, web, name):
    server, address = web
    local, remote = open_source(folder / name), open_source(f"{address}/{name}")
    assert everything(remote) == everything(local)
    assert len(remote) == COUNT
    assert remote.fingerprint == local.fingerprint
    assert remote.position(3) == local.position(3).replace(str(folder), address)
    assert everything(pickle.loads(pickle.dumps(remote))) == everything(local)
    data = (folder / name).read_bytes()
    parts = [part for path, part in server.asked if path.endswith(name)]
    if name in NAMES[:2]:  # whose images, too, are asked for as ranges
        assert any(part and part != f"bytes=0-{len(data) - 1}" for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_loaders_over_the_web(folder, web, name):
    _, address = web
    options = dict(batch_size=4, seed=3, **TINY)
    want = [which(batch.pixels) for batch in PairLoader(folder / name, **options)]
    loader = PairLoader(f"{address}/{name}", **options)
    assert [which(batch.pixels) for batch in loader] == want
    loader.set_epoch(0)
    outer = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=2)  # forked while connections are open
    assert [which(batch.pixels) for batch in outer] == want


def test_folders_globs_and_queries(folder, web):
    server, address = web
    assert everything(open_source(f"{address}/*.tar")) == everything(open_source(folder / "pairs.tar"))
    (folder / "pairs.jsonl").unlink()
    (folder / "pairs.parquet").unlink()
    assert everything(open_source(f"{address}/")) == everything(open_source(folder))
    signed = open_source(f"{address}/pairs.tar?signature=a/b&x=%20")
    assert everything(signed) == everything(open_source(folder))
    assert signed.fingerprint == open_source(folder).fingerprint
    assert any("signature" in path for path, _ in server.asked)


def test_names_that_mean_something_else_in_an_address(tmp_path, folder, web):
    _, address = web
    names = ["a b.png", "c#1.png", "d?2.png", "e%41.png", "ü+&.png", "f%2541.png"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number, 0, 0))
    for other in ("c", "d", "eA.png", "e%2541.png", "f%41.png"):
        (folder / other).write_bytes(png(99, 9, 9))
    records = [json.dumps({"win": name, "lose": "c"}) for name in names]
    for manifest in (tmp_path / "names.jsonl", folder / "names.jsonl"):
        manifest.write_text("\n".join(records))
    for source in (open_source(tmp_path / "names.jsonl", root=address), open_source(f"{address}/names.jsonl")):
        assert [bytes(source[i].win) for i in range(len(names))] == [png(i, 0, 0) for i in range(len(names))]
    whole = {"win": f"{address}/e%2541.png", "lose": f"{address}/c?x=1#2"}
    (folder / "whole.jsonl").write_text(json.dumps(whole))
    source = open_source(folder / "whole.jsonl")
    assert bytes(source[0].win) == png(3, 0, 0)
    assert bytes(source[0].lose) == png(99, 9, 9)


def test_a_manifest_with_a_query_and_a_root(folder, web):
    _, address = web
    want = everything(open_source(folder / "pairs.jsonl"))
    assert everything(open_source(f"{address}/pairs.jsonl?a=b/c")) == want
    assert everything(open_source(folder / "pairs.jsonl", root=address)) == want


@pytest.mark.parametrize("name", NAMES)
def test_what_the_web_does_not_have(web, name):
    server, address = web
    with pytest.raises(SourceError, match=f"none{name}: no such file"):
        open_source(f"{address}/none{name}")
    with pytest.raises(SourceError, match="no such file"):
        open_source(f"{address}/none/")
    server.status = 403
    with pytest.raises(SourceError, match=f"{name}: no such file: 403"):
        open_source(f"{address}/{name}")
    with pytest.raises(SourceError, match="403"):
        open_source(f"{address}/*.tar")


def test_a_server_that_is_gone(web, folder):
    _, address = web
    sources = [open_source(f"{address}/{name}") for name in NAMES]
    folder.rename(folder.parent / "elsewhere")
    for source in sources:
        with pytest.raises(PairError):
            source[0]
    with pytest.raises(SourceError, match=r"nowhere\.invalid"):
        open_source("http://nowhere.invalid/*.tar")


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_server_that_fails_in_the_middle(web, name, tmp_path):
    server, address = web
    loader = PairLoader(
        f"{address}/{name}", 2, shuffle=False, prefetch=1, readers=1, ledger=tmp_path / "bad", max_bad_run=3, **TINY
    )
    loader.source[0]
    server.status = 503
    with contextlib.suppress(RuntimeError):
        list(loader)
    assert "503" in next(read_ledger(tmp_path / "bad"))["reason"]


@pytest.mark.parametrize("busy", [429, 503])
@pytest.mark.parametrize("name", NAMES)
def test_a_server_that_is_busy_now_and_then_costs_no_pair(folder, web, name, busy):
    server, address = web
    source = open_source(f"{address}/{name}")
    server.busy = busy
    assert everything(source) == everything(open_source(folder / name))


@pytest.mark.parametrize("name", NAMES)
def test_a_connection_that_breaks_costs_no_pair(folder, web, name):
    """Of what it asks about a file fsspec says then that there is none."""
    server, address = web
    want = everything(open_source(folder / name))
    server.breaks = 4  # two kinds of question, and aiohttp asks each twice
    source = open_source(f"{address}/{name}")
    assert server.breaks < 0
    server.breaks = 4
    assert everything(source) == want
    assert server.breaks < 0


def test_what_a_server_does_not_have_is_not_asked_for_again(web, folder, monkeypatch):
    server, address = web
    source = open_source(f"{address}/pairs.tar")
    (folder / "pairs.tar").unlink()
    server.asked.clear()
    with pytest.raises(PairError, match=r"pairs\.tar at byte 0: no such file: http"):
        source[0]
    assert len(server.asked) == 1
    monkeypatch.setattr(remote, "_PAUSES_S", (60.0,))  # which would be waited for
    for status in (401, 403, 404, 416):
        server.status = status
        with pytest.raises(PairError):
            source[0]


class AnswerError(Exception):
    """As aiohttp's."""

    def __init__(self, status):
        self.status = status


def caused(error, cause):
    error.__cause__ = cause
    return error


def damaged():
    """What pyarrow says of a row group that is none."""
    file = io.BytesIO()
    pq.write_table(pa.table({"a": [b"x" * 1000]}), file, compression="none")
    file.getbuffer()[4:12] = bytes(b ^ 255 for b in file.getbuffer()[4:12])
    with pytest.raises(OSError, match=r"thrift|page header") as error:
        pq.ParquetFile(file).read_row_group(0)
    return error.value


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (ConnectionResetError("reset"), 3),
        (OSError(5, "its end came early"), 3),
        (caused(OSError("wrapped"), AnswerError(503)), 3),
        (caused(FileNotFoundError("wrapped"), AnswerError(503)), 3),
        (caused(FileNotFoundError("wrapped"), ConnectionResetError("reset")), 3),
        (caused(FileNotFoundError("wrapped"), AnswerError(404)), 1),
        (caused(FileNotFoundError("wrapped"), OSError(5, "of an answer")), 1),
        (caused(OSError("wrapped"), TimeoutError("after minutes")), 1),
        (type("TimeoutError", (Exception,), {})("asyncio's in Python 3.10"), 1),
        (MemoryError(), 1),
        (damaged(), 1),
        (AnswerError(500), 3),
        (AnswerError(503), 3),
        (AnswerError(429), 3),
        (AnswerError(403), 1),
        (AnswerError(404), 1),
        (FileNotFoundError("gone"), 1),
        (PermissionError("no"), 1),
        (TimeoutError("after minutes"), 1),
        (ValueError("damaged"), 1),
    ],
)
def test_what_is_asked_for_again(error, attempts):
    check_attempts(error, attempts)


@pytest.mark.parametrize(
    ("name", "attempts"),
    [("ReadTimeoutError", 1), ("ConnectTimeoutError", 1), ("NoCredentialsError", 1), ("EndpointConnectionError", 3)],
)
def test_what_is_asked_for_again_of_s3(name, attempts):
    exceptions = pytest.importorskip("botocore.exceptions", reason="botocore is not installed")
    about = {} if name == "NoCredentialsError" else {"endpoint_url": "https://s3"}
    check_attempts(getattr(exceptions, name)(**about), attempts)


def check_attempts(error, attempts):
    """Alone, and where it is a part of what is tried again."""
    asked = []

    def read():
        asked.append(1)
        raise error

    with pytest.raises(type(error)):
        remote.patiently(read)
    assert len(asked) == attempts
    with pytest.raises(type(error)):
        remote.patiently(lambda: remote.patiently(read))
    assert len(asked) == 2 * attempts


def test_servers_without_ranges_are_told(web):
    server, address = web
    source = open_source(f"{address}/pairs.tar")
    server.whole = True
    with pytest.raises(PairError, match="its server sends the whole file when it is asked for a part") as error:
        source[1]
    assert str(error.value).count(address) == 1


@pytest.mark.parametrize(("count", "length", "share"), [(300, 20_000, 1.0), (6, 3_000_000, 0.1)])
def test_indexing_a_shard_fetches_no_byte_twice_and_passes_over_large_members(folder, web, count, length, share):
    server, address = web
    with tarfile.open(folder / "large.tar", "w") as shard:
        for i in range(count):
            for name, size in ((f"{i:04}.win.jpg", length), (f"{i:04}.lose.jpg", length), (f"{i:04}.txt", 3)):
                facts = tarfile.TarInfo(name)
                facts.size = size
                shard.addfile(facts, io.BytesIO(bytes(size)))
    size = (folder / "large.tar").stat().st_size
    remote = open_source(f"{address}/large.tar")
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", part) for path, part in server.asked if path.endswith("large.tar")]
    fetched = [(int(part[1]), int(part[2]) + 1) for part in ranges]
    assert sum(end - begin for begin, end in fetched) <= share * size
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(fetched))
    assert len(fetched) < 20
    local = open_source(folder / "large.tar")
    assert [remote._rows[i].tolist() for i in range(count)] == [local._rows[i].tolist() for i in range(count)]
    assert len(remote) == len(local) == count


def test_of_a_parquet_file_no_more_is_fetched_than_what_is_read(folder, web):
    """Of fifteen megabytes, the labels at opening, and then a row group's images and prompts."""
    server, address = web
    large, groups = os.urandom(200_000), 5
    rows = [{"jpg_0": large, "jpg_1": large, "label_0": 1.0, "other": large, "caption": "p"}] * 5 * groups
    schema = pa.schema([(name, pa.binary()) for name in ("jpg_0", "jpg_1", "other")])
    schema = schema.append(pa.field("label_0", pa.float64())).append(pa.field("caption", pa.string()))
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, folder / "large.parquet", row_group_size=5, compression="none", use_dictionary=False)

    def fetched():
        parts = [re.fullmatch(r"bytes=(\d+)-(\d+)", part) for _, part in server.asked if part]
        server.asked.clear()
        return sum(int(part[2]) + 1 - int(part[1]) for part in parts)

    source = open_source(f"{address}/large.parquet")
    assert fetched() < 200_000 * groups
    assert bytes(source[7].win) == large
    assert 2_000_000 <= fetched() < 2_600_000


def test_a_part_of_a_file_costs_no_block_of_its_storage(monkeypatch):
    """Where a file system has no way of its own to read parts, fsspec opens the file, which reads ahead."""
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

    fetched = []

    class Buffered(AbstractBufferedFile):
        def _fetch_range(self, start, end):
            fetched.append(end - start)
            return bytes(end - start)

    class Blocks(AbstractFileSystem):
        protocol = "blocks"

        def info(self, path, **_):
            return {"name": path, "size": 100 << 20, "type": "file"}

        def _open(self, path, mode="rb", block_size=None, **more):
            return Buffered(self, path, mode, block_size or 50 << 20, size=100 << 20, **more)

    fsspec.register_implementation("blocks", Blocks, clobber=True)
    assert len(File("blocks://bucket/a.tar", 100 << 20, "").read(5 << 20, 1000)) == 1000
    assert fetched == [1000]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_another_one_now_gets_a_new_index(folder, web, name):
    """The web server knows no ETag, only the time of the last change, in seconds."""
    _, address = web
    first = everything(open_source(f"{address}/{name}"))
    before = (folder / name).stat()
    fill_folder(folder, range(COUNT)[::-1])
    os.utime(folder / name, (before.st_atime, before.st_mtime + 2))
    assert (folder / name).stat().st_size == before.st_size
    again = everything(open_source(f"{address}/{name}"))
    assert again == everything(open_source(folder / name)) != first


@pytest.mark.parametrize("name", NAMES)
def test_addresses_of_local_files(folder, name):
    suffix = name.rpartition(".")[2]
    want = everything(open_source(folder / name))
    for where in (f"file://{folder}/{name}", f"file://{folder}/*.{suffix}", f"local://{folder}/p*.{suffix}"):
        source = open_source(where)
        assert everything(source) == want
        assert source.position(0).startswith(f"{folder}/pairs.")
    records = [{"win": f"file://{folder}/images/00.win.png", "lose": f"file://{folder}/images/00.lose.png"}]
    assert plain(open_source(records)[0])[1:3] == want[0][1:3]


class Hosted(fsspec.get_filesystem_class("memory")):
    """Files of hosts, whose paths do not say of which; as FTP's."""

    protocol = "hosted"
    cachable = False

    def __init__(self, host):
        super().__init__()
        if host != "there":
            raise RuntimeError(f"no host {host}")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(re.sub("^hosted://[^/]*", "", path))

    @staticmethod
    def _get_kwargs_from_urls(path):
        return {"host": path.removeprefix("hosted://").partition("/")[0]}


def test_folders_that_are_named_as_files(folder):
    """As Spark writes tables; and what a glob finds beside them."""
    memory = fsspec.filesystem("memory")
    for name in ("part-0.parquet", "part-1.parquet", "_SUCCESS"):
        memory.pipe_file(f"/spark/pairs.parquet/{name}", (folder / "pairs.parquet").read_bytes())
    for name in ("pairs.tar", "more/pairs.txt"):
        memory.pipe_file(f"/spark/tars/{name}", (folder / "pairs.tar").read_bytes())
    try:
        for address in ("memory://spark/pairs.parquet", "memory://spark/pairs.parquet/"):
            assert len(open_source(address)) == 2 * COUNT
        assert len(open_source("memory://spark/tars/*")) == COUNT
        with pytest.raises(SourceError, match="no such file"):
            open_source("memory://spark/none.parquet")
    finally:
        memory.rm("/spark", recursive=True)


def test_suffixes_in_capitals(folder):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/capitals/PAIRS.TAR", (folder / "pairs.tar").read_bytes())
    try:
        for address in ("memory://capitals", "memory://capitals/PAIRS.TAR", "memory://capitals/*.TAR"):
            assert len(open_source(address)) == COUNT
    finally:
        memory.rm("/capitals", recursive=True)


def test_addresses_keep_their_host(folder):
    fsspec.register_implementation("hosted", Hosted, clobber=True)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/top/pairs", recursive=True)
    try:
        want = everything(open_source(folder / "pairs.tar"))
        for where in ("pairs.tar", "*.tar"):
            source = open_source(f"hosted://there/top/pairs/{where}")
            assert everything(source) == want
            assert source.position(0) == "hosted://there/top/pairs/pairs.tar at byte 0"
        with pytest.raises(SourceError, match=r"hosted://nowhere/pairs\.tar: no host nowhere"):
            open_source("hosted://nowhere/pairs.tar")
    finally:
        memory.rm("/top", recursive=True)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("zip://x.tar::/tmp/x.zip", "is a chain of protocols; expected one"),
        ("nope://x.tar", "Protocol not known: nope"),
        ("reference://x.tar", "missing 1 required"),
    ],
)
def test_addresses_that_mean_nothing(address, reason):
    with pytest.raises(SourceError, match=reason):
        open_source(address)


@pytest.mark.parametrize("address", ["s3://bucket/x.tar", "https://host/x.tar"])
def test_without_fsspec_the_extra_that_has_all_of_it_is_named(address, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ImportError, match=rf"reading {address} needs fsspec: pip install 'polydpo-fast\[remote\]'"):
        open_source(address)


@pytest.fixture
def bucket(folder, monkeypatch):
    """The folder in a bucket."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    try:
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("bucket")
        files.put(str(folder), "bucket/pairs", recursive=True)
        yield files
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        files.rm("bucket", recursive=True)
        server.stop()


@pytest.mark.parametrize("name", NAMES)
def test_s3_gives_what_the_disk_does(folder, bucket, name):
    suffix = name.rpartition(".")[2]
    local = open_source(folder / name)
    for where in (f"s3://bucket/pairs/{name}", f"s3://bucket/pairs/*.{suffix}"):
        remote = open_source(where)
        assert everything(remote) == everything(local)
        assert remote.fingerprint == local.fingerprint
        assert remote.position(3).startswith("s3://bucket/pairs/pairs.")
    loader = PairLoader(remote, 4, seed=3, **TINY)
    assert len(list(loader)) == 3
    bucket.rm(f"bucket/pairs/{name}")
    fresh = pickle.loads(pickle.dumps(remote))
    with pytest.raises(PairError):
        fresh[0]
    fsspec.filesystem("s3").invalidate_cache()
    with pytest.raises(SourceError, match="no such file"):
        open_source(f"s3://bucket/pairs/{name}")
