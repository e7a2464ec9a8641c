"""A model that the hub has as GGUFs is planned for by their heads: no weights are fetched."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

import halfbyte
import tiny
from halfbyte.errors import BadRequest
from halfbyte.models import headers
from halfbyte.models.checkpoint import Checkpoint

WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "vocab_size": 8192}


class Hub:
    """Files of org/demo, and how many bytes of each were sent."""

    def __init__(self, folder: Path):
        self.folder, self.sent, self.ranges = folder, {}, True

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *words):
                pass

            def answer(self, status: int, data: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def do_GET(self):
                if self.path.startswith("/api/models/org/demo"):
                    files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(hub.folder.iterdir())]
                    self.answer(200, json.dumps({"id": "org/demo", "siblings": files}).encode())
                    return
                file = hub.folder / self.path.rpartition("/")[2].partition("?")[0]
                if not file.exists():
                    self.answer(404, b"", X_Error_Code="EntryNotFound")
                    return
                data, asked = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if asked and hub.ranges:
                    data = data[int(asked[1]) : int(asked[2]) + 1]
                    hub.sent[file.name] = hub.sent.get(file.name, 0) + len(data)
                self.answer(206 if asked and hub.ranges else 200, data)

            do_HEAD = do_GET  # noqa: N815

        return Handler


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("hub")
    (home / "files").mkdir()
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    tiny.make(home / "model", **WIDE, rope_parameters=scaled)
    for name in ("Q8_0", "Q4_K_M"):
        halfbyte.quantize(home / "model", home / "files" / f"demo-{name}.gguf", method="nearest")
    for path in (home / "files").iterdir():
        if path.suffix != ".gguf":
            path.unlink()
    return home / "files"


@pytest.fixture
def hub(files, monkeypatch):
    hub = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    server.shutdown()
    server.server_close()


def test_heads_are_enough(hub, files):
    found, whole = headers.of_hub("org/demo:Q4_K_M"), Checkpoint.open(files / "demo-Q4_K_M.gguf")
    assert found.tensors() == whole.tensors()
    assert found.config == whole.config  # of whose rope some is in a tensor
    assert found.quantized == whole.quantized
    assert list(hub.sent) == ["demo-Q4_K_M.gguf"]
    assert hub.sent["demo-Q4_K_M.gguf"] < (files / "demo-Q4_K_M.gguf").stat().st_size / 2


def test_it_is_planned_like_the_file(hub, files):
    words = {"device": "rtx-4090", "engine": "llama.cpp"}
    there, here = (halfbyte.advise(source, **words) for source in ("org/demo:q8_0", files / "demo-Q8_0.gguf"))
    assert [row.as_dict() for row in there.rows if not row.refused] == [
        row.as_dict() for row in here.rows if not row.refused
    ]


def test_one_of_several_is_to_be_named(hub):
    with pytest.raises(BadRequest, match=r"there are 2 GGUFs, of which 2 are meant; .* such as :Q4_K_M or :Q8_0"):
        headers.of_hub("org/demo")
    with pytest.raises(BadRequest, match="of which 0 are meant"):
        headers.of_hub("org/demo:Q2_K")
    with pytest.raises(BadRequest, match="are planned for, and not downloaded: hf download org/demo"):
        halfbyte.quantize("org/demo:Q8_0", "out", requantize=True)


def test_a_server_that_sends_whole_files_is_not_listened_to(hub):
    hub.ranges = False
    with pytest.raises(BadRequest, match=r"would send all of .* of org/demo"):
        headers.of_hub("org/demo:Q8_0")
