"""A form of output that nobody has heard of: one class of a target, and one of a writer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.containers.folder import Shard
from halfbyte.containers.safetensors import Entry, FileWriter, Spec
from halfbyte.errors import BrokenOutput, Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import is_integer
from halfbyte.targets.plan import Plan
from halfbyte.targets.target import CheckpointWriter, Target


class RawWriter(CheckpointWriter):
    """A file of bare numbers for each tensor, and a list of them."""

    def shards(self, stem: str) -> dict[str, Shard]:
        return {
            f"{name}.raw": Shard(spec.size_bytes, partial(_output, name, spec), partial(int, 1 + spec.size_bytes))
            for name, spec in self.tensors().items()
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


def _output(name: str, spec: Spec, path: Path, resume: bool) -> FileWriter:
    return FileWriter(path, b"\n", {name: Entry(spec.shape, spec.dtype, path, 1)}, 1 + spec.size_bytes, resume)


@dataclass(frozen=True)
class Raw(Target):
    """int8 per channel, a byte for each weight."""

    marks = ("tensors.json",)

    @property
    def name(self) -> str:
        return "raw"

    def resolve(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        return scheme.weight.with_scale("fp32") if is_integer(scheme) else scheme

    def check(self, scheme: Scheme, shape: Shape) -> None:
        if str(scheme) != "int8-channel-fp32":
            raise Unsupported(f"raw holds int8-channel, not {scheme}")

    def specs(self, scheme: Scheme, shape: Shape) -> dict[str, Spec]:
        return {"codes": Spec(shape, torch.uint8), "scale": Spec((shape[0], 1), torch.float32)}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        return {"codes": q.codes, "scale": q.params["scale"]}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        return Quantized(scheme.weight, tensors["codes"], {"scale": tensors["scale"]})

    def writer(self, plan: Plan) -> CheckpointWriter:
        return RawWriter(plan)
