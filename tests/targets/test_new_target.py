"""A form of output that nobody has heard of: one class, and one line in the table."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import halfbyte
from halfbyte import demo
from halfbyte.containers.folder import Shard
from halfbyte.containers.safetensors import Entry, Output, Spec
from halfbyte.errors import BrokenOutput, Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import AnyScheme, Quantized
from halfbyte.grids.scalar import is_integer
from halfbyte.targets import TARGETS, CheckpointWriter, Plan, Target

MODULE = "model.layers.0.mlp.up_proj"


class RawWriter(CheckpointWriter):
    """A file of bare numbers for each tensor, and a list of them."""

    def shards(self, stem: str) -> dict[str, Shard]:
        return {
            f"{name}.raw": Shard(spec.size_bytes, partial(_output, name, spec)) for name, spec in self.tensors().items()
        }

    def write_sidecars(self, folder: Path) -> None:
        said = {name: [list(spec.shape), str(spec.dtype)] for name, spec in self.tensors().items()}
        (folder / "tensors.json").write_text(json.dumps(said))

    def reopen(self, folder: Path) -> Mapping[str, Entry]:
        found = {}
        for name, (shape, dtype) in json.loads((folder / "tensors.json").read_text()).items():
            kind = getattr(torch, dtype.removeprefix("torch."))
            found[name] = Entry(tuple(shape), kind, folder / f"{name}.raw", 1)
        if found.keys() != self.tensors().keys():
            raise BrokenOutput("the list of tensors is not whole")
        return found


def _output(name: str, spec: Spec, path: Path, resume: bool) -> Output:
    return Output(path, b"\n", {name: Entry(spec.shape, spec.dtype, path, 1)}, 1 + spec.size_bytes, resume)


@dataclass(frozen=True)
class Raw(Target):
    """int8 per channel, a byte for each weight."""

    marks = ("tensors.json",)

    @property
    def name(self) -> str:
        return "raw"

    def resolve(self, scheme: AnyScheme, dtype: torch.dtype) -> AnyScheme:
        return scheme.weight.with_scale("fp32") if is_integer(scheme) else scheme

    def check(self, scheme: AnyScheme, shape: Shape) -> None:
        if str(scheme) != "int8-channel-fp32":
            raise Unsupported(f"raw holds int8-channel, not {scheme}")

    def specs(self, scheme: AnyScheme, shape: Shape) -> dict[str, Spec]:
        return {"codes": Spec(shape, torch.uint8), "scale": Spec((shape[0], 1), torch.float32)}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        return {"codes": q.codes, "scale": q.params["scale"]}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: AnyScheme, shape: Shape) -> Quantized:
        return Quantized(scheme.weight, tensors["codes"], {"scale": tensors["scale"]})

    def writer(self, plan: Plan) -> CheckpointWriter:
        return RawWriter(plan)


@pytest.fixture
def raw(monkeypatch):
    monkeypatch.setitem(TARGETS, "raw", Raw())
    return {"method": "nearest", "grid": "int8-channel", "to": "raw", "engine": "none"}


def test_a_model_is_quantized_and_verified(raw, tmp_path):
    report = halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw)
    plain = halfbyte.quantize(demo.MODEL, tmp_path / "ct", **{**raw, "to": "compressed-tensors"})
    assert report.output.container == "raw"
    assert {row.name for row in report.weights} == {row.name for row in plain.weights}
    out, width = next(row.shape for row in report.weights if row.name == MODULE)
    codes = np.fromfile(tmp_path / "out" / f"{MODULE}.codes.raw", np.uint8)[1:].reshape(out, width)
    scale = np.fromfile(tmp_path / "out" / f"{MODULE}.scale.raw", np.uint8)[1:].view(np.float32).reshape(out, 1)
    original = halfbyte.load(demo.MODEL, torch.float32).get_parameter(f"{MODULE}.weight").numpy()
    assert np.abs((codes.astype(np.float32) - 128) * scale - original).max() <= 0.51 * scale.max()


def test_what_the_disk_spoils_is_found(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(Raw, "pack", lambda self, q: {"codes": q.codes ^ 1, "scale": q.params["scale"]})
    with pytest.raises(BrokenOutput, match="raw's reader is broken"):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw)
    assert not (tmp_path / "out").exists()


def test_its_words_are_refused_and_its_folders_replaced_as_others_are(raw, tmp_path):
    with pytest.raises(Unsupported, match="raw holds int8-channel, not int4-g128"):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **{**raw, "grid": "int4-g128"})
    with pytest.raises(halfbyte.HalfbyteError, match="pure is for GGUF, and this is to be raw"):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw, pure=True)
    with pytest.raises(Unsupported, match="raw stores nothing of a KV cache"):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw, kv="fp8-e4m3")
    for overwrite in (False, True):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw, overwrite=overwrite)
    moved = halfbyte.convert(ct(tmp_path), tmp_path / "moved", "raw", grid="int8-channel", engine="none")
    assert moved.output.container == "raw"


def ct(folder: Path) -> Path:
    halfbyte.quantize(demo.MODEL, folder / "ct", method="nearest", grid="int8-g128", to="compressed-tensors")
    return folder / "ct"
