"""Downloads against a small server that speaks both hubs' interfaces: resume, checksums, mirrors, refusals."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import urllib.parse

import pytest

from research.core.errors import WeightsError
from research.core.weights import hub as hubs
from research.core.weights.hub import download, hub
from research.tasks.cli import main
from tests.core.weights.cases import Case, folder_tensors, same

CASE = Case("qwen2", layers=2)


class Server(http.server.BaseHTTPRequestHandler):
    """``files`` by name; ``cut``: name -> after how many bytes the connection drops, once each; ``asked``: ranges seen."""

    files: dict[str, bytes]
    cut: dict[str, int]
    wrong: set[str]
    asked: list[tuple[str, str | None]]
    tokens: list[str | None]

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(url.query)
        self.tokens.append(self.headers.get("Authorization"))
        if url.path == "/api/models/Qwen/Tiny/tree/main":
            return self.page(query)
        if url.path == "/api/v1/models/Qwen/Tiny/repo/files":
            rows = [
                {"Path": name, "Size": len(data), "Type": "blob", "Sha256": hashlib.sha256(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return self.answer(json.dumps({"Code": 200, "Data": {"Files": rows}}).encode())
        name = query["FilePath"][0] if "FilePath" in query else url.path.removeprefix("/Qwen/Tiny/resolve/main/")
        if name not in self.files:
            return self.send_error(404)
        self.asked.append((name, self.headers.get("Range")))
        data = self.files[name]
        if name in self.wrong:
            self.wrong.discard(name)
            data = bytes(len(data))
        self.answer(data, name)

    def page(self, query):
        """Hugging Face's list, two files a page."""
        names = sorted(self.files)
        at = int(query.get("cursor", ["0"])[0])
        rows = []
        for name in names[at : at + 2]:
            data = self.files[name]
            row = {"type": "file", "path": name, "size": len(data)}
            row["oid"] = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            if name.endswith(".safetensors"):
                row |= {"oid": "0" * 40, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}}
            rows.append(row)
        rows.append({"type": "directory", "path": "original", "size": 0, "oid": "x"})
        link = f'<http://{self.headers["Host"]}/api/models/Qwen/Tiny/tree/main?cursor={at + 2}>; rel="next"'
        self.answer(json.dumps(rows).encode(), link=link if at + 2 < len(names) else None)

    def answer(self, data: bytes, name: str | None = None, link: str | None = None):
        begin = 0
        if name is not None and self.headers.get("Range"):
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - begin))
        if link:
            self.send_header("Link", link)
        self.end_headers()
        stop = self.cut.pop(name, len(data))
        self.wfile.write(data[begin:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = CASE.write(tmp_path / "published", shards=2)
    kinds = {"files": {path.name: path.read_bytes() for path in folder.iterdir()}, "cut": {}, "wrong": set()}
    kinds["files"] |= {"README.md": b"no", "model.onnx": b"no", "tokenizer_config.json": b"{}", "LICENSE": b""}
    handler = type("Handler", (Server,), kinds | {"asked": [], "tokens": []})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint + "/")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hubs, "RETRY_S", 0.01)
    yield handler
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_a_model_arrives_whole_from_either_hub(server, tmp_path, name):
    seen = []
    download(hub(name), "Qwen/Tiny", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert same(folder_tensors(tmp_path / "out"), CASE.weights())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == set(server.files) - {"README.md", "model.onnx"}  # and no parts
    assert seen[-1][0] <= seen[-1][1]
    server.asked.clear()
    download(hub(name), "Qwen/Tiny", tmp_path / "out")
    assert not server.asked  # all there


def test_a_dropped_connection_is_continued_where_it_ended(server, tmp_path):
    server.cut["model-00002-of-00002.safetensors"] = 777
    said: list[str] = []
    download(hub("huggingface"), "Qwen/Tiny", tmp_path / "out", log=said.append)
    assert ("model-00002-of-00002.safetensors", "bytes=777-") in server.asked
    assert said and same(folder_tensors(tmp_path / "out"), CASE.weights())


def test_a_part_of_an_earlier_run_is_continued(server, tmp_path):
    (tmp_path / "out").mkdir()
    name = "model-00001-of-00002.safetensors"
    (tmp_path / "out" / f".{name}.part").write_bytes(server.files[name][:500])
    download(hub("modelscope"), "Qwen/Tiny", tmp_path / "out")
    assert (name, "bytes=500-") in server.asked
    assert same(folder_tensors(tmp_path / "out"), CASE.weights())


def test_wrong_bytes_are_noticed_and_fetched_again(server, tmp_path):
    name = "model-00001-of-00002.safetensors"
    server.wrong.add(name)
    download(hub("huggingface"), "Qwen/Tiny", tmp_path / "out")
    assert same(folder_tensors(tmp_path / "out"), CASE.weights())
    # small files have git's checksum
    (tmp_path / "out" / "config.json").write_bytes(bytes(len(server.files["config.json"])))
    download(hub("huggingface"), "Qwen/Tiny", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == server.files["config.json"]


def test_bytes_that_stay_wrong_are_refused(server, tmp_path, monkeypatch):
    name = "model-00001-of-00002.safetensors"
    monkeypatch.setattr(server, "wrong", type("Always", (set,), {"discard": lambda *_: None})({name}))
    with pytest.raises(WeightsError, match="checksum"):
        download(hub("huggingface"), "Qwen/Tiny", tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


def test_pickles_are_fetched_only_when_asked_for(server, tmp_path):
    for name in [name for name in server.files if "safetensors" in name]:
        del server.files[name]
    server.files["pytorch_model.bin"] = b"pickle"
    with pytest.raises(WeightsError, match="pickle can run code"):
        download(hub("huggingface"), "Qwen/Tiny", tmp_path / "out")
    download(hub("huggingface"), "Qwen/Tiny", tmp_path / "out", allow_pickle=True)
    assert (tmp_path / "out" / "pytorch_model.bin").read_bytes() == b"pickle"


def test_unknown_models_and_dead_servers_are_clear_errors(server, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="HTTP 404"):
        download(hub("huggingface"), "Qwen/None", tmp_path / "out")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match="cannot be reached"):
        download(hub("huggingface"), "Qwen/Tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_token_travels_in_the_header(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    download(hub("huggingface"), "Qwen/Tiny", tmp_path / "out")
    assert set(server.tokens) == {"Bearer secret"}


def test_make_weights_links_a_local_folder(tmp_path, capsys):
    folder = CASE.write(tmp_path / "hf")
    target = tmp_path / "weights" / "tiny"
    assert main(["task=weights", f"weights={folder}", f"output={target}"]) == 0
    assert target.is_symlink() and same(folder_tensors(target), CASE.weights())
    assert main(["task=weights", f"weights={folder}", f"output={target}"]) == 0  # again
    assert main(["task=weights", "model=qwen2_5_7b", f"weights={folder}", f"output={target}"]) == 2
    assert "these weights are not qwen2_5_7b" in capsys.readouterr().err
    assert main(["task=weights", "model=qwen2_5_tiny", f"output={tmp_path / 'x'}"]) == 2
    assert "no published weights" in capsys.readouterr().err
