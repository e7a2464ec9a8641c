"""A Hugging Face folder: safetensors under the checkpoint's own names, config.json, and a copy of everything else."""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from halfbyte.containers import kv
from halfbyte.containers.container import Config, Container
from halfbyte.containers.folder import Shard
from halfbyte.containers.place import PICTURE
from halfbyte.containers.safetensors import Entry, SafetensorsFileWriter, Spec, head_of
from halfbyte.errors import BrokenOutput
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.folder import INDEX
from halfbyte.models.linears import predicts_ahead
from halfbyte.names import fused_names
from halfbyte.targets.plan import Plan
from halfbyte.targets.target import CheckpointWriter, split

SHARD_GB = 5.0
OURS = {"README.md", "report.json", "recipe.yaml", PICTURE}


class FolderWriter(CheckpointWriter):
    """Bits as a container lays them, in files that Transformers and the engines find by config.json."""

    def __init__(self, plan: Plan, container: Container | None):
        super().__init__(plan)
        self.container = container

    def files(self) -> dict[str, dict[str, Spec]]:
        """What each file holds, in the order of the source."""
        parts = split(self.tensors(), (self.plan.recipe.shard_gb or SHARD_GB) * 1e9)
        names = (
            ["model.safetensors"]
            if len(parts) == 1
            else [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
        )
        return dict(zip(names, parts, strict=True))

    def shards(self, stem: str) -> dict[str, Shard]:
        """Files of safetensors of at most `shard_gb`, by their names."""
        return shards_of(self.files())

    def write_sidecars(self, folder: Path) -> None:
        """config.json, the index, the container's own files, and a copy of all else beside the source's weights."""
        plan, source = self.plan, self.plan.checkpoint
        config: Config = {}
        files: dict[str, Config] = {}
        if self.container:
            named = {w.name: s for w, s in plan.schemes.items()}
            config = self.container.config(named, self._unquantized_linears(), source.dtype)
            config = kv.config(config, plan.kv) if plan.kv else config
            files = self.container.extra_files(config)
        files = {"config.json": self._config(config), **files}
        copy_companions(source, folder, OURS)
        source.save_companions(folder)
        write_json(folder, files | index_of(self.files()))

    def _config(self, quantization: Config) -> Config:
        """The source's, with what this output is: what it said of the source's own quantization goes."""
        source = self.plan.checkpoint
        config = {name: value for name, value in source.config.items() if name != "quantization_config"}
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = {name: value for name, value in text.items() if name != "quantization_config"}
        if self.plan.unquantized_dtype:
            config = {name: value for name, value in config.items() if name != "torch_dtype"} | {
                "dtype": _name(self.plan.unquantized_dtype)
            }
        elif not config.keys() & {"dtype", "torch_dtype"}:
            config["dtype"] = _name(
                source.dtype
            )  # of a source that does not say: Transformers would take the first tensor's
        return {**config, "quantization_config": quantization} if quantization else config

    def _unquantized_linears(self) -> list[str]:
        """Modules left in 16 bits that engines would take to be quantized if config.json did not name them."""
        plan, source = self.plan, self.plan.checkpoint
        weights = {c.weight.tensor for c in plan.weights}
        matrices = (
            t for t in plan.unquantized if t.endswith(".weight") and t not in weights and len(source.spec(t).shape) == 2
        )
        routers = [t.removesuffix(".weight") for t in matrices if not roles.EMBEDDING.match(t)]
        unquantized = [c.weight.name for c in plan.weights if not c.scheme] + routers + self._ahead(routers)
        if all(w.block for w in plan.schemes) and "lm_head" not in unquantized:
            unquantized.append(
                "lm_head"
            )  # a head that is tied, or has another name in the file, is a linear to engines all the same
        if (
            "text_config" in source.config
        ):  # beside encoders of images or sound, names in the file and in the model differ
            from halfbyte.models import skeleton

            unquantized += skeleton.aliases(source, unquantized)
        return unquantized

    def _ahead(self, matrices: Sequence[str]) -> list[str]:
        """Of multi-token prediction: the other names that engines look for. SGLang's models of it do not say what
        they fuse (issue 35797), and experts that lie in stacks are asked for one by one."""
        source = self.plan.checkpoint
        stacks = (t for t in self.plan.unquantized if len(source.spec(t).shape) == 3 and predicts_ahead(source, t))
        experts = [
            f"{home}.{number}.{part}"
            for stack in stacks
            for number in range(source.spec(stack).shape[0])
            for home, part in roles.parts_of(stack, source.model_type)
        ]
        return fused_names([name for name in matrices if predicts_ahead(source, f"{name}.weight")]) + experts

    def reopen(self, folder: Path) -> Mapping[str, Entry]:
        """The entries of the folder as it is read. Raises BrokenOutput if other modules are quantized than planned."""
        written = Checkpoint(folder)
        if written.quantized.keys() != (expected := {w.name for w in self.plan.schemes}):
            raise BrokenOutput(
                f"the written folder holds {len(written.quantized)} quantized modules, not {len(expected)}"
            )
        return written.entries


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Files = Mapping[str, Mapping[str, Spec]]
"""The tensors of each file of safetensors."""


def shards_of(files: Files) -> dict[str, Shard]:
    """How each is laid out."""
    return {name: _shard(specs) for name, specs in files.items()}


def _shard(specs: Mapping[str, Spec]) -> Shard:
    def lay_out(path: Path, resume: bool) -> SafetensorsFileWriter:
        return SafetensorsFileWriter(path, specs, resume)

    size_bytes = sum(spec.size_bytes for spec in specs.values())
    return Shard(size_bytes, lay_out, lambda: len(head_of(specs)) + size_bytes)


def index_of(files: Files) -> dict[str, Config]:
    """What says which tensor lies where; one file needs no such."""
    if len(files) == 1:
        return {}
    total = sum(spec.size_bytes for specs in files.values() for spec in specs.values())
    places = {tensor: name for name, specs in files.items() for tensor in specs}
    return {INDEX: {"metadata": {"total_size": total}, "weight_map": places}}


def copy_companions(source: Checkpoint, folder: Path, but: Collection[str] = ()) -> None:
    """Tokenizer, template and all else that lies beside a checkpoint's weights, byte for byte."""
    for path in source.other_files:
        place = folder / path.relative_to(source.path)
        if str(path.relative_to(source.path)) not in but:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def write_json(folder: Path, files: Mapping[str, Config]) -> None:
    """Small files, as Transformers writes them."""
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
