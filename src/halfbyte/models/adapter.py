"""A LoRA adapter: low-rank products that are added to a checkpoint's weights as they are read.

Format: huggingface/peft, docs/source/developer_guides/checkpoint.md; Hu et al. 2021 (LoRA), Kalajdzievski 2023
(rsLoRA), Liu et al. 2024 (DoRA).
"""

import re
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float32
from torch import Tensor

from halfbyte.containers.safetensors import Entry, read_header
from halfbyte.errors import BadCheckpoint, Unsupported, brief
from halfbyte.files import matches, read_object
from halfbyte.models.checkpoint import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LOW_RANK = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?")
PREFIX = "base_model.model."
LARGEST = 1 << 24
"""Rank or alpha that anybody has, and far beyond."""
PATTERNS = ("rank_pattern", "alpha_pattern")
"""Entries of a config that have numbers for some modules."""
ELSEWHERE = ("use_qalora", "target_parameters", "alora_invocation_tokens", "lora_bias", "layer_replication")
"""Entries of a config that make of an adapter more than a product for each linear."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def merged(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """The checkpoint as it reads with the adapter in `folder` merged into it. Raises BadCheckpoint for one that does
    not fit it."""
    return checkpoint.replaced(adapter=Adapter(Path(folder).expanduser(), checkpoint))


class Adapter:
    """What an adapter's folder adds to the tensors of one checkpoint."""

    def __init__(self, path: Path, checkpoint: Checkpoint):
        self.path = path
        self.config = self._read_config()
        self.low_rank: dict[str, dict[str, Entry]] = {}
        """Of a tensor of the checkpoint, the parts of its product."""
        self.whole: dict[str, Entry] = {}
        """Tensors that the adapter brings trained as they are."""
        self.modules: dict[str, str] = {}
        """What peft calls the module of a tensor: patterns of ranks are over these names."""
        self.transposed: set[str] = set()
        self._bind(checkpoint)

    def _read_config(self) -> dict[str, Any]:
        if not is_adapter(self.path):
            raise BadCheckpoint(f"{self.path} is no adapter: it has no {CONFIG}")
        config = read_object(self.path / CONFIG)
        if config.get("peft_type") != "LORA":
            raise Unsupported(
                f"{self.path} is an adapter of kind {config.get('peft_type')!r}; LORA is merged, others with peft's "
                "own merge_and_unload()"
            )
        if odd := next((name for name in ELSEWHERE if config.get(name)), None):
            raise Unsupported(
                f"{self.path} has '{odd}', which is not merged here; merge it with peft's merge_and_unload(), and "
                "quantize that"
            )
        if odd := next((name for name in PATTERNS if not isinstance(config.get(name) or {}, dict)), None):
            raise BadCheckpoint(
                f"{self.path / CONFIG}: {odd} is {brief(config[odd])}, which should be an object of "
                "patterns and numbers"
            )
        if not (self.path / WEIGHTS).is_file():
            raise BadCheckpoint(f"{self.path} has no {WEIGHTS}; save the adapter again as safetensors")
        return config

    def _bind(self, checkpoint: Checkpoint) -> None:
        shapes = checkpoint.tensors()
        entries = {
            name.removeprefix(PREFIX).replace(".base_layer.", "."): entry
            for name, entry in read_header(self.path / WEIGHTS).items()
        }
        low_rank = {name: match for name in entries if (match := LOW_RANK.fullmatch(name))}
        wanted = {f"{match[1]}.weight" for match in low_rank.values()} | (entries.keys() - low_rank.keys())
        tensors = {name: name for name in wanted if name in shapes}
        if len(tensors) < len(
            wanted
        ):  # the model's own names, which differ from the file's beside encoders of images or sound
            tensors |= _by_parameter(checkpoint, wanted - tensors.keys())
        if lost := sorted(wanted - tensors.keys()):
            raise BadCheckpoint(
                f"{self.path} adapts '{lost[0].removesuffix('.weight')}' ({len(lost)} such), which {checkpoint.path} "
                "has no matrix of"
            )
        for name, entry in entries.items():
            if match := low_rank.get(name):
                tensor = tensors[f"{match[1]}.weight"]
                self.low_rank.setdefault(tensor, {})[match[2]] = entry
                self.modules[tensor] = match[1]
            else:
                self.whole[tensors[name]] = entry
        self.transposed = {t for t in self.low_rank if checkpoint.lies_transposed(t)}
        for tensor in (*self.low_rank, *self.whole):
            self._require_fit(tensor, shapes[tensor])

    def _require_fit(self, tensor: str, shape: tuple[int, ...]) -> None:
        made = [self.whole[tensor].shape] if tensor in self.whole else []
        if tensor in self.low_rank:
            parts = self.low_rank[tensor].keys() - {"magnitude_vector"}
            if parts not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
                raise BadCheckpoint(
                    f"{self.path}: the product for '{tensor}' has {', '.join(sorted(parts)) or 'no parts'} alone"
                )
            a, b = (self.low_rank[tensor][part].shape for part in sorted(parts))
            inner = len(a) == len(b) == 2 and a[0] == b[1] == self._rank(tensor)
            product = (b[0], a[1]) if inner else ()
            made.append(product[::-1] if tensor in self.transposed or "embedding_A" in parts else product)
        if (wrong := next((m for m in made if m != shape), None)) is not None:
            raise BadCheckpoint(
                f"{self.path}: what it has for '{tensor}' makes {list(wrong)}, and the checkpoint's is {list(shape)}"
            )

    def _rank(self, tensor: str) -> int:
        return self._of_module("rank_pattern", tensor, self.config.get("r"))

    def scaling(self, tensor: str) -> float:
        """What the product of a tensor is multiplied by."""
        rank, alpha = self._rank(tensor), self._of_module("alpha_pattern", tensor, self.config.get("lora_alpha"))
        return alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of_module(self, patterns: str, tensor: str, otherwise: Any) -> Any:
        overrides, path = self.config.get(patterns) or {}, self.path / CONFIG
        value = next(
            (v for pattern, v in overrides.items() if matches(rf"(.*\.)?({pattern})$", self.modules[tensor], path)),
            otherwise,
        )
        if type(value) not in (int, float) or not 0 < value < LARGEST:
            raise BadCheckpoint(f"{path}: rank and alpha of '{tensor}' are numbers above 0, not {brief(value)}")
        return value

    def merge(self, tensor: str, w: Tensor, row_offset: int = 0) -> Tensor:
        """`w`, rows of the tensor from `row_offset` on as it lies in the checkpoint, with what the adapter adds: in
        float32, so that it is rounded once, to what it is written in."""
        if tensor in self.whole:
            w = self.whole[tensor].read(row_offset, row_offset + len(w)).float()
        if tensor not in self.low_rank:
            return w
        parts = {name: entry.read().float() for name, entry in self.low_rank[tensor].items()}
        total = w.float() + self._product(tensor, parts)[row_offset : row_offset + len(w)]
        if (magnitude := parts.get("magnitude_vector")) is not None:
            total = self._with_magnitude(tensor, total, magnitude.flatten(), row_offset)
        return total

    def _product(self, tensor: str, parts: dict[str, Tensor]) -> Float32[Tensor, "rows columns"]:
        a, b = (parts[name] for name in sorted(parts.keys() - {"magnitude_vector"}))
        product = b @ a * self.scaling(tensor)
        return product.T if tensor in self.transposed or "embedding_A" in parts else product

    def _with_magnitude(self, tensor: str, total: Tensor, magnitude: Tensor, row_offset: int) -> Tensor:
        """DoRA: the product turns each out-feature, and its length is a number of its own."""
        if tensor in self.transposed:
            return total * (magnitude / total.norm(dim=0))
        return total * (magnitude[row_offset : row_offset + len(total)] / total.norm(dim=1))[:, None]

    @cached_property
    def digest(self) -> str:
        """Of every byte that it adds."""
        hasher = xxhash.xxh3_128()
        for name in (CONFIG, WEIGHTS):
            with open(self.path / name, "rb") as file:
                while chunk := file.read(1 << 24):
                    hasher.update(chunk)
        return hasher.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {
            "path": str(self.path),
            "xxh3_128": self.digest,
            "low_rank": len(self.low_rank),
            "whole": len(self.whole),
        }


def _by_parameter(checkpoint: Checkpoint, wanted: set[str]) -> dict[str, str]:
    """Tensors of the checkpoint by the names that their parameters have in Transformers' model."""
    from halfbyte.models import mapping, skeleton  # needs the model's code

    weight_map = mapping.places(skeleton.build(checkpoint, torch.float32), checkpoint.tensors())
    alone = {
        view.parameter: tensor
        for tensor, view in weight_map.items()
        if view.expert is None and not view.offset and not view.transposed
    }
    shared = [view.parameter for view in weight_map.values()]
    return {name: alone[name] for name in wanted if name in alone and shared.count(name) == 1}
