"""Odd places and things that lie about: links, other people's files, a tensor that is there twice, two runs at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from numba.core import caching
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte import pipeline
from halfbyte.errors import BadCheckpoint, BadRequest
from halfbyte.kernels.cpu import compiled
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.folder import INDEX
from halfbyte.pipeline import identity
from halfbyte.plan import resolve
from halfbyte.recipe import Recipe
from halfbyte.targets.gguf import file as gguf

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128}
NEAREST = ["--method", "nearest", "--grid", "int4-g32"]
SECRET = "a key that nobody is to see"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("places")
    tiny.make(home / "model", **SMALL)
    tiny.text(home / "text.txt")
    return home


@pytest.fixture
def model(home, tmp_path) -> Path:
    return Path(shutil.copytree(home / "model", tmp_path / "model"))


def split(model: Path) -> dict[str, torch.Tensor]:
    """The model in two shards, each of which has up_proj; another one in the first."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    twice = "model.layers.0.mlp.up_proj.weight"
    names = sorted(tensors)
    parts = {
        "a.safetensors": {n: tensors[n] for n in names[::2]},
        "b.safetensors": {n: tensors[n] for n in names[1::2]},
    }
    index = {name: shard for shard, part in parts.items() for name in part}
    other = "b.safetensors" if index[twice] == "a.safetensors" else "a.safetensors"
    parts[other][twice] = -tensors[twice]
    for shard, part in parts.items():
        save_file(part, model / shard, {"format": "pt"})
    (model / INDEX).write_text(json.dumps({"weight_map": index}))
    return {twice: tensors[twice]}


def test_the_index_says_which_of_two_counts(model):
    for name, tensor in split(model).items():
        assert torch.equal(Checkpoint(model).read(name), tensor)
        index = json.loads((model / INDEX).read_text())
        index["weight_map"][name] = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[
            index["weight_map"][name]
        ]
        (model / INDEX).write_text(json.dumps(index))
        assert torch.equal(Checkpoint(model).read(name), -tensor)


def test_two_without_an_index_are_refused(model):
    split(model)
    (model / INDEX).unlink()
    with pytest.raises(BadCheckpoint, match=r"is in a.safetensors and in b.safetensors"):
        Checkpoint(model)


def test_links_out_of_the_source_are_not_followed(model, tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    (model / "notes.txt").symlink_to(tmp_path / "secret")
    (model / "chat_template.jinja").symlink_to(tmp_path / "secret")
    (model / "within.txt").symlink_to(model / "tokenizer_config.json")
    report = halfbyte.quantize(model, tmp_path / "out", method="nearest", grid="int4-g32")
    assert {p.name for p in (tmp_path / "out").iterdir()} & {"notes.txt", "chat_template.jinja", "within.txt"} == {
        "within.txt"
    }
    assert any("chat_template.jinja, notes.txt" in warning for warning in report["warnings"])
    report = halfbyte.quantize(model, tmp_path / "out.gguf", method="nearest", grid="Q4_0")
    assert "tokenizer.chat_template" not in gguf.read(tmp_path / "out.gguf").metadata
    assert any("chat_template.jinja" in warning for warning in report["warnings"])
    assert not [
        p
        for p in tmp_path.rglob("*")
        if p.is_file() and not p.is_symlink() and p.name != "secret" and SECRET.encode() in p.read_bytes()
    ]


def test_the_hubs_cache_is_made_of_links(model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(model.iterdir()):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    report = halfbyte.quantize(snapshot, tmp_path / "out", method="nearest", grid="int4-g32")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert not any("left out" in warning for warning in report["warnings"])


@pytest.mark.parametrize("end", ["", ".jsonl", ".lock"])
def test_prepared_links_are_not_written_through(end, home, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir() if not end else victim.write_text("mine")
    if not end:
        (victim / "thesis").write_text("mine")
        (tmp_path / "out.partial.jsonl").write_text("{}\n")
    (tmp_path / f"out.partial{end}").symlink_to(victim)
    tiny.refused(
        tiny.halfbyte("quantize", home / "model", "-o", tmp_path / "out", *NEAREST), f"out.partial{end} is a link"
    )
    assert (victim if end else victim / "thesis").read_text() == "mine"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives a folder to another user")
def test_what_another_user_prepared_is_refused(home, tmp_path):
    (tmp_path / "out.partial").mkdir()
    os.chown(tmp_path / "out.partial", 65534, 65534)
    tiny.refused(
        tiny.halfbyte("quantize", home / "model", "-o", tmp_path / "out", *NEAREST),
        "out.partial belongs to another user",
    )


def test_an_importance_matrix_is_written_once_and_not_through_links(home, tmp_path):
    command = [
        "imatrix",
        home / "model",
        "-o",
        tmp_path / "i.gguf",
        "--calibration",
        home / "text.txt",
        "--samples",
        "1",
        "--length",
        "32",
    ]
    with filelock.FileLock(tmp_path / "i.gguf.partial.lock"):
        tiny.refused(tiny.halfbyte(*command), "another run is writing")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "i.gguf.partial").symlink_to(tmp_path / "victim")
    tiny.refused(tiny.halfbyte(*command), "i.gguf.partial is a link")
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_demonstration_does_not_write_into_a_checkpoint(home, tmp_path):
    before = sorted((home / "model").iterdir())
    tiny.refused(tiny.halfbyte("demo", "--keep", home / "model"), "name one that is new or empty")
    assert sorted((home / "model").iterdir()) == before


@pytest.mark.parametrize("run", ["quantize", "kv", "imatrix"])
def test_a_progress_that_cannot_be_called(run, home, tmp_path):
    words = {"method": "nearest"} if run == "quantize" else {}
    with pytest.raises(BadRequest, match=r"not 1$"):
        getattr(halfbyte, run)(home / "model", tmp_path / "out", progress=1, **words)
    assert not list(tmp_path.iterdir())


def test_another_number_of_threads_is_another_run(home, monkeypatch):
    """Where it changes last bits: a run that is taken up with other threads would be a mixture."""
    plan, samples = (
        resolve(Recipe.of(model=str(home / "model"), method="gptq", grid="int4-g32")),
        SimpleNamespace(digest="0"),
    )
    before = [identity(plan, None), identity(plan, samples)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    after = [identity(plan, None), identity(plan, samples)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_kernels_without_a_place_for_their_cache(monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert compiled.kernel(lambda x: x + 1)(1) == 2


READ_ONLY = """
import os, sys
from pathlib import Path

package = os.path.dirname(sys.argv.pop(1))

def refuse(event, args):
    opens = event == "open" and isinstance(args[2], int)
    writes = event == "os.mkdir" or (opens and args[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and str(args[0]).startswith(package):
        raise PermissionError(13, "Permission denied", args[0])

sys.addaudithook(refuse)
from halfbyte import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_installation_that_is_read_only_without_a_home(home, tmp_path):
    """As a container's image is run under any user's number; the folder for Numba's cache cannot be made either, and
    its threads are those of old systems."""
    nowhere = "/proc/none"
    env = {
        **tiny.ALONE,
        "HOME": nowhere,
        "XDG_CACHE_HOME": nowhere,
        "NUMBA_CACHE_DIR": nowhere,
        "NUMBA_THREADING_LAYER": "workqueue",
    }
    command = ["quantize", home / "model", *NEAREST, "-o"]
    words = [sys.executable, "-c", READ_ONLY, halfbyte.__file__, *command, tmp_path / "out"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env={**env, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert tiny.halfbyte(*command, tmp_path / "here").code == 0
    assert tiny.weights(tmp_path / "out") == tiny.weights(tmp_path / "here")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        ImportError("libtorch.so: failed to map segment from shared object"),
    ],
)
def test_too_little_memory_is_one_line(error, home, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(pipeline, "verify", fail)
    command = ["quantize", home / "model", "-o", tmp_path / "out", *NEAREST]
    tiny.refused(tiny.halfbyte(*command), "too little memory", "give the same command again")
    monkeypatch.undo()
    assert (tmp_path / "out.partial.jsonl").exists()
    assert tiny.halfbyte(*command).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
