"""Weights and loads, as engines' own logs and others' tables have them (published.yaml)."""

import json

import huggingface_hub
import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from outlines import GIB, PUBLISHED, config_of, outline

from halfbyte import demo
from halfbyte.containers.safetensors import DTYPES
from halfbyte.errors import BadRequest
from halfbyte.models import headers
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.plan import resolve
from halfbyte.recipe import Recipe
from halfbyte.sizing.accounting import accounting_of
from halfbyte.sizing.cache import TYPES, ModelConfig, layers_of
from halfbyte.sizing.devices import device_called
from halfbyte.sizing.memory import Load, MemoryModel, Weights, parameters_of, weights_of

H100 = device_called("h100")


def weights(name: str, grid: str | None, engine: str = "vllm") -> Weights:
    """Bytes of what halfbyte would write."""
    checkpoint = outline(name)
    s = ModelConfig(checkpoint.config)
    if grid is None:
        return weights_of({name: entry.size_bytes for name, entry in checkpoint.entries.items()}, checkpoint, s)
    plan = resolve(Recipe.of(model=name, grid=grid, engine=engine), checkpoint)
    tensors = plan.target.writer(plan).tensors()
    return weights_of({name: spec.size_bytes for name, spec in tensors.items()}, checkpoint, s)


@pytest.mark.parametrize("row", PUBLISHED["vllm"], ids=lambda row: f"{row['model']}-{row.get('grid')}")
def test_loads_that_vllm_accounts_for(row):
    """Each part, and all but the cache together, within 10 %."""
    config, cards = config_of(row["model"]), row.get("cards", 1)
    s = ModelConfig(config)
    model = MemoryModel(weights(row["model"], row.get("grid")), layers_of(config), s, accounting_of("vllm"), H100)
    memory = model.memory(Load(8192, 1, TYPES[row.get("type", "16 bits")], cards))
    assert memory.weights / GIB + row.get("beside", 0) == pytest.approx(row["weights"], rel=0.1)
    assert memory.activations / GIB == pytest.approx(row["activations"], rel=0.1)
    used = memory.total - memory.cache
    assert used / GIB + row.get("beside", 0) == pytest.approx(0.95 * 79.19 - row["cache"], rel=0.1)


LLAMA_3_8B = {"Q8_0": 7.96, "Q6_K": 6.14, "Q5_K_M": 5.33, "Q4_K_M": 4.58, "Q4_K_S": 4.37, "Q3_K_M": 3.74, "Q2_K": 2.96}


@pytest.mark.parametrize("grid", LLAMA_3_8B)
def test_files_of_llama_cpp(grid):
    """GiB in llama.cpp's tools/perplexity/README.md, the scoreboard of Llama 3 8B."""
    assert weights("llama-3-8b", grid, "llama.cpp").total / GIB == pytest.approx(LLAMA_3_8B[grid], abs=0.015)


def test_active_parameters():
    """Qwen3-30B-A3B has 30.5 billion parameters, of which 3.3 are active (its card), the embedding counted."""
    checkpoint = outline("qwen3-30b-a3b")
    found = parameters_of(checkpoint, ModelConfig(checkpoint.config))
    assert found.total / 1e9 == pytest.approx(30.5, rel=0.01)
    assert (found.of_token + found.looked_up) / 1e9 == pytest.approx(3.3, rel=0.03)
    assert found.read(1) == found.of_token
    assert found.of_token < found.read(8) < found.read(512) <= found.always + found.experts


def test_longest_and_largest_are_the_last_that_fit():
    config, device = config_of("llama-3-8b"), device_called("rtx-4090")
    own = weights("llama-3-8b", None)
    model = MemoryModel(own, layers_of(config), ModelConfig(config), accounting_of("vllm"), device)
    load = Load(4096, 1, TYPES["16 bits"])
    longest = model.longest(load, 131072)
    assert model.fits(Load(longest, 1, load.kind))
    assert not model.fits(Load(longest + 16, 1, load.kind))
    largest = model.largest(load)
    assert model.fits(Load(4096, largest, load.kind))
    assert not model.fits(Load(4096, largest + 1, load.kind))
    assert model.longest(Load(4096, 1, load.kind), 2048) == 2048


def test_headers_are_enough():
    """What is planned from headers is what is planned from the files."""
    whole = Checkpoint.open(demo.MODEL)
    alone = headers.HeaderCheckpoint(whole.path, whole.config, whole.entries)
    plans = [resolve(Recipe.of(model="demo", grid="int4-g128"), source) for source in (whole, alone)]
    assert plans[0].target.writer(plans[0]).tensors() == plans[1].target.writer(plans[1]).tensors()


def test_a_hub_id_costs_config_and_headers(monkeypatch, tmp_path):
    """Of a hub that has one model; nothing else is asked for."""
    whole = Checkpoint.open(demo.MODEL)
    (tmp_path / "config.json").write_text(json.dumps(whole.config))
    asked = []

    def download(name, file, revision=None):
        asked.append((name, file, revision))
        return str(tmp_path / file)

    def metadata(self, name, revision=None):
        asked.append((name, "headers", revision))
        said = {str(dtype): name for name, dtype in DTYPES.items()}
        tensors = {
            t: TensorInfo(said[str(e.dtype)], list(e.shape), (0, e.size_bytes)) for t, e in whole.entries.items()
        }
        files = {"model.safetensors": SafetensorsFileMetadata({}, tensors)}
        return SafetensorsRepoMetadata(None, False, dict.fromkeys(tensors, "model.safetensors"), files)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", metadata)
    found = headers.of_hub("org/demo@main")
    assert found.tensors() == whole.tensors()
    assert asked == [("org/demo", "config.json", "main"), ("org/demo", "headers", "main")]


def test_a_hub_that_gives_nothing_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no such model\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(BadRequest, match="no such model") as error:
        headers.of_hub("org/none")
    assert "\n" not in str(error.value)
