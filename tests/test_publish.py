"""An output on a hub that is played by a server of this process: what arrives there, and what is said otherwise."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

import halfbyte
import tiny


@dataclass
class Hub:
    """What somebody has uploaded."""

    address: str = ""
    asked: list[str] = field(default_factory=list)
    token: str | None = None
    settings: dict = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    message: str = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

        def answer(self, value: dict, status: int = 200) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_PUT(self):
            hub.large[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_POST(self):
            body = self.body()
            hub.asked.append(self.path)
            hub.token = self.headers.get("Authorization")
            if hub.token != "Bearer hf_right":
                self.answer({"error": "Invalid credentials"}, 401)
            elif self.path == "/api/repos/create":
                hub.settings = json.loads(body)
                self.answer({"url": f"{hub.address}/me/model"})
            elif self.path.endswith("/preupload/main"):
                asked = json.loads(body)["files"]
                modes = {
                    f["path"]: "lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular" for f in asked
                }
                said = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
                self.answer({"files": said})
            elif self.path.endswith("/objects/batch"):
                wanted = json.loads(body)["objects"]
                self.answer({"transfer": "basic", "objects": [
                    {**one, "actions": {"upload": {"href": f"{hub.address}/upload/{one['oid']}"}}} for one in wanted
                ]})  # fmt: skip
            elif self.path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        hub.message = value["summary"]
                    elif line["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    else:
                        hub.files[value["path"]] = hub.large[value["oid"]]
                self.answer({"commitUrl": f"{hub.address}/me/model/commit/1", "commitOid": "1", "success": True})
            else:
                self.answer({})

    return Handler


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("publish")
    tiny.make(home / "model")
    tiny.text(home / "text.txt")
    for name, grid in (("four", "int4-g64"), ("Q4_0.gguf", "Q4_0")):
        halfbyte.quantize(home / "model", home / name, method="nearest", grid=grid)
    halfbyte.evaluate([home / "four"], home / "model", str(home / "text.txt"), 64, 2)
    return home


def test_a_folder(home, hub):
    result = tiny.halfbyte("push", home / "four", "me/model", "--private")
    assert result.code == 0, result.err
    assert f"{hub.address}/me/model" in result.out
    own = {path.relative_to(home / "four").as_posix(): path for path in (home / "four").rglob("*") if path.is_file()}
    assert hub.files.keys() == own.keys()
    changed = {name for name, path in own.items() if hub.files[name] != path.read_bytes()}
    assert changed == {"README.md", "report.json", "recipe.yaml"}
    assert hub.settings.get("visibility") == "private" or hub.settings.get("private")
    assert "int4-g64" in hub.message
    card = hub.files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert front["quantized_by"] == "me"
    assert "vllm serve me/model\n" in card
    assert "| perplexity |" in card
    for name in changed:  # nobody need know where it lay
        assert str(home) not in hub.files[name].decode()
    assert json.loads(hub.files["report.json"])["recipe"]["repository"] == "me/model"
    assert "repository" not in json.loads((home / "four" / "report.json").read_text())["recipe"]


def test_a_file(home, hub):
    address = halfbyte.push(home / "Q4_0.gguf", "me/model")
    assert address == f"{hub.address}/me/model"
    assert not {"visibility", "private"} & hub.settings.keys()  # as the organization has it
    assert hub.files.keys() - {"Q4_0.errors.png"} == {
        "Q4_0.gguf",
        "README.md",
        "Q4_0.report.json",
        "Q4_0.recipe.yaml",
        "Q4_0.Modelfile",
    }
    assert hub.files["Q4_0.gguf"] == (home / "Q4_0.gguf").read_bytes()


def test_nobody_learns_where_anything_lay(home, hub, tmp_path):
    text = tiny.text(tmp_path / "other.txt")
    halfbyte.convert(home / "four", tmp_path / "moved", "gptq")  # made of a folder that was made of another
    tiny.halfbyte("blame", tmp_path / "moved", "--against", home / "model", "--text", text, "--length", 64)
    assert str(home) in (tmp_path / "moved" / "report.json").read_text()
    assert "blame" in json.loads((tmp_path / "moved" / "report.json").read_text())
    halfbyte.push(tmp_path / "moved", "me/model")
    for name in ("README.md", "report.json", "recipe.yaml"):
        said = hub.files[name].decode()
        assert str(home) not in said
        assert str(tmp_path) not in said


def test_no_token(home, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    tiny.refused(tiny.halfbyte("push", home / "four", "me/model"), "token", "HF_TOKEN", "hf auth login")
    assert not hub.asked


def test_a_token_that_is_not_taken(home, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    tiny.refused(tiny.halfbyte("push", home / "four", "me/model"), "me/model was not uploaded", "401")
    assert not hub.files


def test_no_network(home, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    tiny.refused(tiny.halfbyte("push", home / "four", "me/model"), "me/model was not uploaded")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tiny.refused(tiny.halfbyte("push", home / "four", "me/model"), "me/model was not uploaded", "offline")


def test_what_is_not_uploaded(home, hub, tmp_path):
    tiny.refused(tiny.halfbyte("push", home / "model", "me/model"), "report.json")
    tiny.refused(tiny.halfbyte("push", home / "four", "no id"), "repository")
    halfbyte.quantize(home / "model", tmp_path / "out", method="nearest", grid="int4-g64")
    (tmp_path / "secret").write_text("it")
    (tmp_path / "out" / "link.txt").symlink_to(tmp_path / "secret")
    tiny.refused(tiny.halfbyte("push", tmp_path / "out", "me/model"), "link.txt", "outside")
    halfbyte.quantize(home / "model", tmp_path / "out" / "one.gguf", method="nearest", grid="Q4_0")
    (tmp_path / "out" / "one.Modelfile").unlink()
    (tmp_path / "out" / "one.Modelfile").symlink_to(tmp_path / "secret")
    tiny.refused(tiny.halfbyte("push", tmp_path / "out" / "one.gguf", "me/model"), "one.Modelfile", "outside")
    assert not hub.asked
