"""The command: which engine it hands over to, as what; and its own server as a program."""

import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from openai import OpenAI

import tiny
from halfbyte import demo
from halfbyte.engines import handover as handing
from halfbyte.engines.engines import SERVERS
from halfbyte.engines.handover import Listening, handover
from halfbyte.errors import Unsupported
from halfbyte.inference import memory
from halfbyte.inference.server.port import listener
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.surroundings import of_the_user

STAND_IN = """#!/bin/sh
trap 'echo got TERM; exit 7' TERM
echo "$0" "$@"
env | grep -E '^(OMP_WAIT_POLICY|NUMBA_CACHE_DIR|.*API_KEY)=' | sort
[ -z "$STAY" ] || while true; do sleep 0.05; done
"""
ASKED = Listening("127.0.0.1", 8000, key="secret", name="my model", context=4096, slots=4)


@pytest.fixture
def engines(tmp_path, monkeypatch) -> Path:
    """A folder that is all of the PATH beside the system's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def install(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(stat.S_IRWXU)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    made = {"gguf": folder / "m.gguf", "gptq": folder / "gptq", "nf4": folder / "nf4"}
    for grid, (to, path) in zip(("q8_0", "int4-g128", "nf4"), made.items(), strict=True):
        more = ["--to", to] if to == "gptq" else []
        done = tiny.halfbyte("quantize", demo.MODEL, "-o", path, "--method", "nearest", "--grid", grid, *more)
        assert done.code == 0, done.err
    return made


def test_an_engine_gets_the_options_in_its_own_words(engines, quantized):
    install(engines, "vllm", "sglang", "llama-server")
    begin = "--host 127.0.0.1 --port 8000"
    folder, file = quantized["gptq"], quantized["gguf"]
    wanted = {
        ("vllm", folder): f"VLLM_API_KEY=... vllm serve {folder} {begin} --served-model-name 'my model' "
        "--max-model-len 4096 --max-num-seqs 4",
        ("sglang", folder): f"sglang serve --model-path {folder} {begin} --served-model-name 'my model' "
        "--context-length 4096 --max-running-requests 4 --api-key ...",
        ("llama.cpp", file): f"LLAMA_API_KEY=... llama-server -m {file} {begin} --alias 'my model' --ctx-size 16384 "
        "--parallel 4",
    }
    for (engine, path), line in wanted.items():
        command = handover(Checkpoint.open(path), ASKED, engine)
        assert command.line == line
        assert "secret" in (*command.words, *command.variables.values())
    bare = handover(Checkpoint.open(folder), Listening("::1", 1), "vllm", ["--tensor-parallel-size", "2"])
    assert bare.line == f"vllm serve {folder} --host ::1 --port 1 --tensor-parallel-size 2"
    assert bare.variables == {}


def test_the_engine_that_loads_it_best_is_taken(engines, quantized, monkeypatch):
    opened = {name: Checkpoint.open(path) for name, path in {**quantized, "16 bits": demo.MODEL}.items()}
    with pytest.raises(Unsupported, match=r"llama\.cpp is not installed"):
        handover(opened["gguf"], ASKED)
    install(engines, "vllm", "sglang")
    with pytest.raises(Unsupported, match=r"llama\.cpp is not installed"):
        handover(opened["gguf"], ASKED)
    install(engines, "llama-server")
    taken = {name: handover(checkpoint, ASKED).engine for name, checkpoint in opened.items()}
    assert taken == {"gguf": "llama.cpp", "gptq": "vllm", "nf4": "vllm", "16 bits": "vllm"}
    (engines / "vllm").unlink()
    assert handover(opened["gptq"], ASKED).engine == "sglang"
    monkeypatch.setattr(handing, "find_spec", lambda name: name)
    assert handover(opened["gptq"], ASKED).words[:3] == (sys.executable, "-m", "sglang.launch_server")


@pytest.mark.parametrize(
    ("engine", "model", "said"),
    [
        ("llama.cpp", "gptq", "llama.cpp does not read gptq: write gguf"),
        ("llama.cpp", "16 bits", "llama.cpp does not read safetensors: write gguf"),
        ("vllm", "gptq", "vllm is not installed"),
        ("sglang", "nf4", "sglang was not seen to load bitsandbytes"),
    ],
)
def test_why_an_engine_is_not_taken(engine, model, said, engines, quantized):
    checkpoint = Checkpoint.open({**quantized, "16 bits": demo.MODEL}[model])
    with pytest.raises(Unsupported, match=said):
        handover(checkpoint, ASKED, engine)


@contextmanager
def command(*words: object, **environment: str) -> Iterator[subprocess.Popen]:
    program = subprocess.Popen(
        [sys.executable, "-m", "halfbyte", "serve", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**of_the_user(), **environment},
    )
    with program:
        try:
            yield program
        finally:
            program.kill()


@pytest.mark.slow
def test_the_program_becomes_the_engine(engines):
    """It prints the command; signals reach the engine, whose environment is the user's."""
    install(engines, "vllm")
    with command(demo.MODEL, "--port", 0, HALFBYTE_API_KEY="secret", STAY="1") as program:
        lines = [program.stdout.readline() for _ in range(4)]
        assert lines[0].startswith(f"VLLM_API_KEY=... vllm serve {demo.MODEL} --host 127.0.0.1 --port ")
        assert lines[1].split()[1:] == lines[0].split()[2:]
        assert lines[2:] == ["HALFBYTE_API_KEY=secret\n", "VLLM_API_KEY=secret\n"]
        program.send_signal(signal.SIGTERM)
        assert program.stdout.read() == "got TERM\n"
        assert program.wait(10) == 7


@pytest.mark.slow
def test_our_own_server_serves_until_it_is_told_to_end(tmp_path):
    with command(demo.MODEL, "--engine", "halfbyte", "--port", 0, "--device", "cpu", "--name", "bookworm") as program:
        ready = next(line for line in program.stderr if "is served at" in line)
        client = OpenAI(base_url=ready.split()[-1], api_key="none", max_retries=0)
        answer = client.completions.create(model="bookworm", prompt="The sea", max_tokens=5, temperature=0)
        assert answer.usage.completion_tokens == 5
        assert "/v1/completions 200" in program.stderr.readline()
        stream = client.completions.create(model="bookworm", prompt="The sea", max_tokens=400, stream=True)
        next(stream)
        began = time.perf_counter()
        program.send_signal(signal.SIGINT)
        with pytest.raises(Exception, match="shut down before the answer was whole"):
            list(stream)
        assert program.wait(15) == 0
        assert time.perf_counter() - began < 15
        assert program.stderr.read().endswith("halfbyte: ended\n")


def test_what_is_printed_of_our_own_server():
    said = tiny.halfbyte("serve", demo.MODEL, "--engine", "halfbyte", "--port", 0, "--slots", 2, "--dry-run")
    assert said.code == 0
    line = f"halfbyte serve {demo.MODEL} --engine halfbyte --host 127.0.0.1 --port 0 --slots 2\n"
    assert said.out == line


def refused(*words: object, said: str) -> None:
    found = tiny.halfbyte("serve", *words)
    tiny.refused(found)
    assert said in found.err


def test_requests_that_cannot_be_met(engines, quantized, tmp_path):
    with listener("127.0.0.1", 0) as taken:
        taken.listen()
        refused(demo.MODEL, "--port", taken.getsockname()[1], said="is in use; name another with --port")
    refused(demo.MODEL, "--engine", "vlm", said="unknown engine 'vlm'; did you mean vllm?")
    refused(demo.MODEL, "--engine", "tgi", said="does not start Text Generation Inference")
    refused(demo.MODEL, "--port", 0, "--engine", "vllm", said="vllm is not installed; --engine halfbyte serves it")
    refused(demo.MODEL, "--port", 0, "--", "--tp", 2, said="no engine takes --tp 2: vllm is not installed")
    refused(demo.MODEL, "--port", 0, "--engine", "halfbyte", "--", "--tp", 2, said="own server has no --tp 2")
    refused(demo.MODEL, "--port", 0, "--api-key", "", said="--api-key is empty")
    refused(demo.MODEL, "--host", "nowhere.invalid", said="is no address")
    install(engines, "vllm")
    refused(demo.MODEL, "--port", 0, "--queue", 3, said="vllm is to serve it, which has no --queue")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((Path(demo.MODEL) / name).read_bytes())
    for engine in ("vllm", "halfbyte"):
        refused(bare, "--port", 0, "--engine", engine, said="tokenizer of")


def test_a_model_that_does_not_fit_is_not_loaded(tmp_path, monkeypatch):
    kind = SimpleNamespace(free_bytes=lambda _: 1_000_000, is_host=True)
    monkeypatch.setattr(memory, "kind_of", lambda _: kind)
    refused(demo.MODEL, "--engine", "halfbyte", "--port", 0, "--device", "cpu", said="of cpu are free")


def test_a_missing_package_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("halfbyte.inference.server.listen")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(demo.MODEL, "--engine", "halfbyte", "--port", 0, said="pip install 'halfbyte[serve]'")


def test_every_engine_says_where_its_options_were_read():
    assert {*SERVERS} == {"llama.cpp", "sglang", "vllm"}
    assert all(server.source for server in SERVERS.values())
