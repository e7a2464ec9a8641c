"""What a start costs: wrong words are refused before torch is imported, and threads that wait leave the processor to
others."""

import subprocess
import sys

import numba
import pytest

import tiny
from halfbyte import demo, surroundings
from halfbyte.kernels.cpu import compiled
from halfbyte.progress import told_of_kernels

COMMAND = """
import os, sys
from halfbyte.cli import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, os.environ["OMP_WAIT_POLICY"], file=sys.stderr)
"""


WITHOUT_A_MODEL = (
    *(["quantize"], ["quantize", "-o", "y"], ["quantize", "--for", "vllm"], ["convert", "-o", "y", "--to", "gptq"]),
    *(["dequantize", "-o", "y"], ["kv", "-o", "y"], ["imatrix", "-o", "y"], ["inspect"], ["plan"]),
    *([name, str(demo.MODEL), "--against"] for name in ("eval", "needle", "blame")),
    ["compare", str(demo.MODEL)],
    ["chat"],
    ["chat", str(demo.MODEL), "--compare"],
)
"""Commands that lack but the name of a checkpoint."""


def start(*words: str) -> tuple[int, list[str]]:
    """The exit status of a process of its own, and its last lines."""
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "int4-g128"], "needs a model and an output folder"),
        (["--for", "vlm"], "did you mean vllm"),
        (["--for", "vllm@rtx-4099"], "did you mean rtx-4090"),
        (["--for", "vllm", "--grid", "fp8"], "leave out --grid"),
        (["-o", "x", "--method", "gtpq"], "gptq"),
        (["-o", "x", "--method", "gptq+awq"], "put transforms first"),
        (["-o", "x", "--samples", "0"], "calibration.samples"),
        (["-o", "x", "--override", "no-sign"], "PATTERN=GRID"),
        (["-o", "x", "--override", "layers.0.*=int4-h128"], "unknown grid 'int4-h128'"),
        (["-o", "x", "--grid", "int4"], "did you mean int4-g128"),
        (["-o", "x", "--grid", "q4km", "--to", "gguf"], "did you mean Q4_K_M"),
        (["-o", "x", "--grid", "q4km", "--engine", "llama.cpp"], "unknown preset or type of GGUF 'q4km'"),
        (["-o", "x", "--to", "gtpq"], "did you mean gptq"),
        (["-o", "x", "--engine", "vlm"], "did you mean vllm"),
        (["-o", "x", "--grid", "int8-channel/int8-tokn"], "did you mean int8-token"),
        (["-o", "x", "--grid", "int8-channel/fp8-e4m3-token-asym"], "write fp8-e4m3-token"),
        (["-o", "x", "--grid", "int8-chanel/int8-token"], "unknown grid 'int8-chanel'; did you mean int8-channel"),
        (["-o", "x", "--kv", "fp9"], "'fp9' is no KV cache"),
    ],
)
def test_wrong_words_are_refused_without_torch(words, said):
    refused_early("quantize", str(demo.MODEL), *words, said=said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "x", "-o", "y", "--to", "gtpq"], "did you mean gptq"),
        (["convert", "x", "-o", "y", "--to", "gptq", "--grid", "int4"], "did you mean int4-g128"),
        (["convert", "x", "-o", "y"], "Missing option '--to'"),
        (["dequantize", "x", "-o", "y", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["dequantize", "x", "-o", "y", "--to", "gptq"], "16 bits are written as safetensors or gguf"),
        (["eval", "x", "--against", "y", "--convention", "paper"], "did you mean papers"),
        (["chat", "x", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["chat", "x", "--temperature", "-1"], "temperature"),
        (["run", "x"], "Missing argument 'prompt'"),
        (["run", "x", "y", "--top-p", "0"], "top_p"),
        (["support", "--engine", "vlm"], "did you mean vllm"),
        (["plan", "x", "--engine", "vlm"], "did you mean vllm"),
        (["plan", "x", "--device", "rtx-4099"], "did you mean rtx-4090"),
        (["plan", "x", "--memory", "many"], "is no size"),
        (["plan", "x", "--device", "l40s", "--memory", "8GB"], "not both"),
        (["plan", "x", "--engine", "llama.cpp", "--cache", "fp8"], "has no cache in fp8"),
        (["inspect"], "Missing argument 'path'"),
        (["kv", "x", "-o", "y", "--kv", "int8-tensor"], "write int8-static or int8-token"),
        (["kv", "x", "-o", "y", "--kv", "none"], "'none' is no KV cache"),
        (["kv", "x", "-o", "y", "--observer", "mx"], "'max', 'percentile' or 'mse'"),
        (["eval", "x", "--against", "y", "--kv", "q8_1"], "'q8_1' is no KV cache"),
        (["needle", "x", "--against", "y", "--kv", "int9"], "'int9' is no KV cache"),
        (["needle", "x", "--against", "y", "--lengths", "long"], "--lengths takes numbers"),
        *(([*words, "there/is/none"], "there is no folder there/is/none") for words in WITHOUT_A_MODEL),
    ],
)
def test_wrong_words_of_other_commands_are_refused_without_torch(words, said):
    refused_early(*words, said=said)


def refused_early(*words: str, said: str) -> None:
    status, lines = start(*words)
    assert status == 2
    assert said in lines[-2]
    assert lines[-1] == "False PASSIVE"


def test_help_needs_no_torch():
    assert start("--help") == (0, ["False PASSIVE"])


def test_a_process_ends_at_once():
    """What is frozen is not looked through again."""
    code = """if True:
        import atexit, gc
        from halfbyte.cli import main
        atexit.register(lambda: print("frozen", gc.get_freeze_count() > 10_000))
        main(["devices", "rtx-4090"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "frozen True"


def test_inspecting_a_gguf_needs_no_torch(tmp_path):
    made = tiny.halfbyte("quantize", demo.MODEL, "-o", tmp_path / "q.gguf", "--method", "nearest", "--grid", "Q4_K_M")
    assert made.code == 0, made.err
    for words in ([], ["--json"]):  # with the report that lies beside it
        assert start("inspect", str(tmp_path / "q.gguf"), *words) == (0, ["False PASSIVE"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["plan", demo.MODEL], "halfbyte.sizing.advice"),
        (["quantize", demo.MODEL, "-o", "out", "--method", "nearest", "--grid", "int4-g64"], "halfbyte.streaming"),
        (["quantize", demo.MODEL, "-o", "out.gguf", "--method", "nearest", "--grid", "Q4_K_M"], "halfbyte.streaming"),
    ],
    ids=["plan", "nearest", "gguf"],
)
def test_what_runs_no_model_imports_none(words, module, tmp_path):
    """Transformers' models take most of a start, and 200 MB."""
    code = "import sys; from halfbyte.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    asked = [sys.executable, "-c", code, *map(str, words), "--json"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=tmp_path)
    modules = done.stdout.splitlines()[-1].split()
    assert module in modules
    assert not {"transformers.modeling_utils", "halfbyte.models.walk"} & {*modules}
    assert words[0] != "plan" or "transformers" not in modules


def test_kernels_are_kept_in_the_users_cache_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = surroundings.kernels()
    assert place is not None
    assert place.parent == tmp_path / "halfbyte"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert surroundings.kernels() is None


def test_who_waits_for_a_kernel_to_be_compiled_is_told():
    told: list[bool] = []
    double = numba.njit(lambda x: 2 * x)
    with told_of_kernels(lambda: told.append(True)):
        assert double(2) == 4
        before = len(told)
        assert before > 0
        assert double(3) == 6
    assert len(told) == before


def test_threads_share_all_tasks_out():
    done = []
    compiled.in_threads(lambda first, last: done.extend(range(first, last)), 37)
    assert sorted(done) == list(range(37))
