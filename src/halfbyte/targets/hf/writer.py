"""A Hugging Face folder: safetensors under the checkpoint's own names, config.json, and a copy of everything else."""

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.containers import kv
from halfbyte.containers.container import Config, ConfigContainer
from halfbyte.containers.folder import Shard
from halfbyte.containers.safetensors import Entry, Spec, Writer
from halfbyte.errors import BrokenOutput
from halfbyte.grids.quantized import AnyScheme, Quantized
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint, Weight
from halfbyte.targets.plan import Job
from halfbyte.targets.target import Edition, Part, split

SHARD_GB = 5.0
OURS = {"README.md", "report.json", "recipe.yaml"}


class FolderEdition(Edition):
    """Bits as a ConfigContainer lays them, in files that Transformers and the engines find by config.json."""

    def __init__(self, job: Job, container: ConfigContainer):
        super().__init__(job)
        self.container = container

    def files(self) -> dict[str, dict[str, Spec]]:
        """What each file holds, in the order of the source."""
        by_tensor: dict[str, list[tuple[Weight, AnyScheme]]] = {}
        for weight, scheme in self.job.schemes.items():
            by_tensor.setdefault(weight.tensor, []).append((weight, scheme))
        specs: dict[str, Spec] = {}
        for tensor in self.job.checkpoint.tensors():
            if tensor in self.job.kept:
                specs[tensor] = self.job.spec(tensor)
            for weight, scheme in by_tensor.get(tensor, []):
                specs.update(
                    {
                        f"{weight.name}.{suffix}": spec
                        for suffix, spec in self.container.plan(scheme, weight.shape).items()
                    }
                )
        specs.update(self.job.scales)
        parts = split(specs, (self.job.recipe.shard_gb or SHARD_GB) * 1e9)
        names = (
            ["model.safetensors"]
            if len(parts) == 1
            else [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
        )
        return dict(zip(names, parts, strict=True))

    def shards(self, stem: str) -> dict[str, Shard]:
        return {
            name: Shard(sum(s.size_bytes for s in specs.values()), partial(_writer, specs))
            for name, specs in self.files().items()
        }

    def pack(self, weight: Weight, q: Quantized) -> Iterator[Part]:
        for suffix, tensor in self.container.pack(q).items():
            yield Part(f"{weight.name}.{suffix}", tensor)

    def unpack(self, entries: Mapping[str, Entry], weight: Weight, scheme: AnyScheme) -> Quantized:
        tensors = {
            suffix: entries[f"{weight.name}.{suffix}"].read() for suffix in self.container.plan(scheme, weight.shape)
        }
        return self.container.unpack(tensors, scheme, weight.shape)

    def keep(self, tensor: str, value: Tensor) -> Iterator[Part]:
        yield Part(tensor, value)

    def kept(self, entries: Mapping[str, Entry], tensor: str) -> list[Tensor]:
        return [entries[tensor].read()]

    def restored(self, entries: Mapping[str, Entry], tensor: str) -> Tensor:
        return entries[tensor].read()

    def accompany(self, folder: Path) -> None:
        job, source = self.job, self.job.checkpoint
        config = self.container.config({w.name: s for w, s in job.schemes.items()}, self._linears_kept(), source.dtype)
        config = kv.config(config, job.kv) if job.kv else config
        files = {"config.json": self._config(config), **self.container.extra_files(config)}
        for path in source.other_files:
            name = str(path.relative_to(source.path))
            if name not in OURS:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
        source.save_companions(folder)
        if len(shards := self.files()) > 1:
            total = sum(spec.size_bytes for specs in shards.values() for spec in specs.values())
            index = {t: name for name, specs in shards.items() for t in specs}
            files["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": index}
        for name, content in files.items():
            (folder / name).write_text(
                json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
            )

    def _config(self, quantization: Config) -> Config:
        """The source's, with what this output is: what it said of the source's own quantization goes."""
        source = self.job.checkpoint
        config = {name: value for name, value in source.config.items() if name != "quantization_config"}
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = {name: value for name, value in text.items() if name != "quantization_config"}
        if self.job.plain_dtype:
            config = {name: value for name, value in config.items() if name != "torch_dtype"} | {
                "dtype": _name(self.job.plain_dtype)
            }
        elif not config.keys() & {"dtype", "torch_dtype"}:
            config["dtype"] = _name(
                source.dtype
            )  # of a GGUF, which does not say: Transformers would take the first tensor's
        return {**config, "quantization_config": quantization} if quantization else config

    def _linears_kept(self) -> list[str]:
        """Modules left in 16 bits that engines would take to be quantized if config.json did not name them."""
        job, source = self.job, self.job.checkpoint
        weights = {c.weight.tensor for c in job.choices}
        matrices = (
            t for t in job.kept if t.endswith(".weight") and t not in weights and len(source.spec(t).shape) == 2
        )
        routers = [t.removesuffix(".weight") for t in matrices if not roles.EMBEDDING.match(t)]
        kept = [c.weight.name for c in job.choices if not c.scheme] + routers
        if all(w.block for w in job.schemes) and "lm_head" not in kept:
            kept.append(
                "lm_head"
            )  # a head that is tied, or has another name in the file, is a linear to engines all the same
        if (
            "text_config" in source.config
        ):  # beside encoders of images or sound, names in the file and in the model differ
            from halfbyte.models import skeleton

            kept += skeleton.aliases(source, kept)
        return kept

    def reopen(self, folder: Path) -> Mapping[str, Entry]:
        written = Checkpoint(folder)
        if written.quantized.keys() != (expected := {w.name for w in self.job.schemes}):
            raise BrokenOutput(
                f"the written folder holds {len(written.quantized)} quantized modules, not {len(expected)}"
            )
        return written.entries


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _writer(specs: Mapping[str, Spec], path: Path, resume: bool) -> Writer:
    return Writer(path, specs, resume)
