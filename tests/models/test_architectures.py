"""Every family that is tried: what we compute is what Transformers computes, before and after quantization."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import halfbyte
import tiny
from halfbyte.grids import parse
from halfbyte.models import experts
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.walk import Walk
from halfbyte.transforms.fold import Finder
from halfbyte.transforms.scale import FoldSite
from models.families import FAMILIES, every

GRID = "int4-g32"
TOKENS = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(1))
ALIKE = {torch.float32: 1e-5, torch.bfloat16: 0.01}
"""Relative difference of logits that another order of summation may make."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint of a family, made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: FAMILIES[name].save(root / name))


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def by_transformers(path, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return logits_of(model)


def difference(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("family", every())
def test_a_walk_computes_what_transformers_computes(folders, family):
    checkpoint = Checkpoint.open(folders(family))
    walk = Walk(checkpoint, TOKENS, checkpoint.dtype)
    assert set(walk.weight_map) == set(checkpoint.tensors())
    assert len(list(walk)) == 2
    logits = torch.cat([logits for _, logits in walk.logits()])
    expected = by_transformers(checkpoint.path)
    assert expected.std() > 0.1
    assert torch.equal(logits, expected)


def called(tensor, block):
    return re.sub(r"\.\d+\.", ".*.", tensor.removeprefix(f"{block.name}.").removesuffix(".weight"))


def last_block(folder):
    checkpoint = Checkpoint.open(folder)
    walk = Walk(checkpoint, TOKENS, checkpoint.dtype)
    *_, block = walk.blocks
    steps = iter(walk)
    while next(steps) is not block:
        pass
    block.steps = steps  # as long as these are not closed, it is loaded
    return block


@pytest.mark.parametrize("family", every())
def test_folds_are_those_that_the_formulas_allow(folders, family):
    block = last_block(folders(family))
    found = {}
    for fold in Finder().find(block):
        name = "1+" * fold.producer.offset + called(fold.producer.tensor, block)
        found.setdefault(name, set()).update(called(m.tensor, block) for m in fold.readers)
        if fold.producer.expert is not None or "*" in name:
            numbers = {(m.expert, *re.findall(r"\.(\d+)\.", m.tensor.removeprefix(block.name))) for m in fold.readers}
            assert numbers == {
                (fold.producer.expert, *re.findall(r"\.(\d+)\.", fold.producer.tensor.removeprefix(block.name)))
            }
    assert found == {name: set(readers.split()) for name, readers in FAMILIES[family].folds.items()}


@pytest.mark.parametrize("family", every(name for name, f in FAMILIES.items() if f.dtype == torch.float32))
def test_a_block_with_scales_in_its_folds_computes_the_same(folders, family):
    block = last_block(folders(family))
    batch = 1  # not the probe that found the folds
    before = block.run(block.walk.inputs[batch], batch)
    grids = dict.fromkeys(block.weights, parse(GRID))
    generator = torch.Generator().manual_seed(0)
    for fold in Finder().find(block):
        rows = block.view(fold.producer.tensor).shape[0] if fold.producer.rows is None else max(fold.producer.rows) + 1
        if weight := next(
            (w for w in block.weights if (w.tensor, w.expert) == (fold.producer.tensor, fold.producer.expert)), None
        ):
            rows = weight.shape[0]
        FoldSite(block, fold, grids, {}).apply(torch.exp(torch.rand(rows, generator=generator) * 2 - 1))
    assert block.scales.columns
    for weight in block.weights:
        block.put(weight, block.target(weight))
    assert difference(block.run(block.walk.inputs[batch], batch), before) < 1e-5


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(tiny.text(tmp_path_factory.mktemp("text") / "text.txt"))


def with_decoded(source: Checkpoint, out: Checkpoint, folder: Path) -> Path:
    """A plain checkpoint: the source's tensors with decoded ones in their place."""
    folder.mkdir()
    tensors = {name: entry.read() for name, entry in source.entries.items()}
    for weight in source.weights():
        if weight.name in out.quantized:
            part = source.expert_slices.get(weight.tensor)
            home = tensors[weight.tensor] if part is None else tensors[part.stack][part.expert]
            home = home if weight.expert is None else home[weight.expert]
            home = home.T if weight.transposed or (part and part.transposed) else home
            first = part.row_offset if part else 0
            home[first : first + weight.shape[0]] = out.read_quantized(weight.name).decode()
    tensors |= {
        name: out.entries[name].read() for name in source.entries if name in out.entries and name not in out.parts
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(source.config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nearest", "awq+gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_exported_computes_what_we_computed(folders, text, tmp_path, family, method):
    source = experts.unstacked(Checkpoint.open(folders(family)))
    calibration = {"source": text, "samples": 4, "length": 32}
    report = halfbyte.quantize(
        source.path,
        tmp_path / "out",
        method=method,
        grid=GRID,
        to="compressed-tensors",
        calibration=calibration,
        engine="none",
    )

    out = Checkpoint.open(tmp_path / "out")
    weights = [w for w in source.weights() if w.block]
    assert {w.tensor for w in weights} | set(report["kept"]) == set(source.tensors())
    assert not {w.tensor for w in weights} & set(report["kept"])
    assert [row["name"] for row in report["weights"]] == [w.name for w in weights]
    assert {w.name for w in weights} == set(out.quantized)
    assert {n for n in out.entries if n not in out.parts} == set(report["kept"])
    assert all(row["error"] < 0.35 for row in report["weights"])

    logits = logits_of(halfbyte.load(tmp_path / "out"))
    expected = by_transformers(with_decoded(source, out, tmp_path / "decoded"))
    assert difference(logits, expected) <= ALIKE[source.dtype] / 10
    assert difference(logits, by_transformers(source.path)) < 0.7

    verdict = next(e for e in report["engines"] if e["engine"] == "transformers")
    if verdict["loads"]:
        options = (
            {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
            if "dequantize" in verdict["command"]
            else {}
        )
        assert difference(by_transformers(tmp_path / "out", **options), logits) <= ALIKE[source.dtype]
