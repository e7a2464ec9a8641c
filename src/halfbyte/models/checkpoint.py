"""The checkpoint is the truth: its tensors, its config, and everything else in its folder."""

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from halfbyte.containers import kv
from halfbyte.containers.config import require_sound
from halfbyte.containers.container import Reader
from halfbyte.containers.safetensors import Spec
from halfbyte.errors import BadCheckpoint
from halfbyte.files import exists, is_within, read_object
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import PackedMatrix, Quantized, Scheme
from halfbyte.models import cards, folder, hub, roles, tokenizers
from halfbyte.models.linears import Linears, linears
from halfbyte.models.precision import DTYPE_NAMES, require_finite
from halfbyte.models.stored import StoredModules, reader_of
from halfbyte.models.weight import Weight, weights_of
from halfbyte.registry import SOURCES, located, source_suffix

if TYPE_CHECKING:
    from halfbyte.models.adapter import Adapter
    from halfbyte.models.experts import ExpertSlice

MASKED = "ForMaskedLM"
"""How Transformers calls a class that fills gaps in a text."""


@runtime_checkable
class Rotation(Protocol):
    """What its hidden states are rotated by (halfbyte.transforms.rotate)."""

    digest: str
    """Tells it from others."""
    original: "Checkpoint"
    """Without it."""

    def prove(self) -> None:
        """Find what becomes of each tensor, before the first is read, and that the model still computes the same.
        Raises Unsupported."""
        ...

    def describe(self) -> dict[str, Any]:
        """For the report."""
        ...

    def turned(self, tensor: str, w: Tensor, apart: bool = False) -> Tensor:
        """A tensor, some of its leading dimension, or where it is `apart` a linear [out, in] that lies in it."""
        ...


class Checkpoint:
    """A folder of safetensors with a config.json."""

    adapter: "Adapter | None" = None
    """What is merged into its weights as they are read (halfbyte.models.adapter)."""
    rotation: Rotation | None = None
    """What these are turned by then."""
    expert_slices: "Mapping[str, ExpertSlice]" = MappingProxyType({})
    """Linears of single experts that are read out of stacks (halfbyte.models.experts)."""
    values: Mapping[str, Tensor] = MappingProxyType({})
    """Of tensors, in place of those in the files."""
    splits_stacks = True
    """Whether experts that lie in one tensor may be read apart."""

    def __init__(self, path: Path):
        self.path = path
        self.config = read_object(
            path / "config.json", missing=f"{path} is no checkpoint: it has no config.json{folder.adapter_hint(path)}"
        )
        require_sound(self.config, path / "config.json")
        self.entries = folder.entries(path)
        if self._reader:
            self.entries = self._reader.unfuse_experts(self.entries)
        self._seal()

    def _seal(self) -> None:
        """From now on it is a value: `replaced` makes another."""
        self.__dict__["_is_sealed"] = True

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("_is_sealed"):
            raise AttributeError(f"a checkpoint does not change; checkpoint.replaced({name}=...) makes another")
        super().__setattr__(name, value)

    def replaced(self, **parts: Any) -> "Checkpoint":
        """Another checkpoint that reads the same files, with some parts in place of its own: `kv`, another cache (or
        None); `adapter`, merged into its weights; `rotation`, by which they are turned; `expert_slices`, experts apart;
        `values` of tensors; `config`; `entries`."""
        other = copy.copy(self)
        for known in ("_shapes", "tied"):  # of which other parts make others
            other.__dict__.pop(known, None)
        other.__dict__.update(parts)
        return other

    @staticmethod
    def open(source: str | Path) -> "Checkpoint":
        """A folder of safetensors, a file or folder of another kind, or a hub id (org/name or org/name@revision).

        Raises BadCheckpoint for what is none of these.
        """
        path = located(source)
        if path is None:
            return Checkpoint(hub.download(str(source)))
        suffix = source_suffix(path)
        return resolve_name(SOURCES[suffix])(path) if suffix else Checkpoint(path)

    @property
    def text_config(self) -> dict[str, Any]:
        """The decoder's part of config.json: all of it, where there is no other part."""
        return self.config.get("text_config") or self.config

    @property
    def model_type(self) -> str:
        """Transformers' name of the decoder's family."""
        return self.text_config.get("model_type") or ""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that engines compute in."""
        for config in (self.config, self.text_config):
            name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
            if name in DTYPE_NAMES:
                return DTYPE_NAMES[name]
        floats = [e.dtype for e in self.entries.values() if e.dtype in DTYPE_NAMES.values()]
        return max(set(floats), key=floats.count) if floats else torch.float32

    @property
    def unquantized_dtype(self) -> torch.dtype:
        """What its weights are decoded to, where nothing else is asked for."""
        return self.dtype

    @cached_property
    def card(self) -> dict[str, Any]:
        """What the model's card says at its top, under the hub's names."""
        card = self.path / "README.md"
        return cards.front_matter(card) if is_within(card, self.path) else {}

    @property
    def vocabulary(self) -> dict[int, str] | None:
        """Every token by its number, where the file of the weights says them."""
        return None

    @property
    def known_as(self) -> tuple[str, str | None] | None:
        """The model's name and its repository on the hub, where the file of the weights says them."""
        return None

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer says how a chat is written."""
        beside = (self.path / name for name in ("chat_template.jinja", "chat_template.json"))
        return any(map(exists, beside)) or bool(read_object(self.path / "tokenizer_config.json").get("chat_template"))

    @property
    def generation(self) -> dict[str, Any]:
        """How answers are generated, in the words of generation_config.json; empty where nobody says."""
        return read_object(self.path / "generation_config.json")

    @property
    def ends(self) -> set[int]:
        """Tokens at which an answer ends, as config.json and generation_config.json say."""
        return _tokens(self.generation.get("eos_token_id")) | _tokens(self.text_config.get("eos_token_id"))

    @cached_property
    def tied(self) -> bool:
        """Whether the head shares the embedding's values, whatever config.json says: as Transformers reads it."""
        from halfbyte.models import heads  # which reads checkpoints

        return heads.is_tied(self)

    @property
    def other_files(self) -> list[Path]:
        """Every file that is neither a weight nor says how the weights are quantized; what lies elsewhere is nobody's
        to publish."""
        return folder.other_files(self.path)

    @property
    def left_out(self) -> list[str]:
        """What is to be said of files that are links out of the folder."""
        return folder.left_out(self.path)

    def settings(self):
        """The config as Transformers reads it."""
        import transformers  # seconds, which methods without calibration need not wait for

        return transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False)

    def tokenizer(self):
        """As Transformers reads it."""
        return tokenizers.load(self.path)

    def save_companions(self, folder: Path) -> None:
        """Write files that belong beside a checkpoint's safetensors and that this one holds in another form."""

    @cached_property
    def _quantization(self) -> dict[str, Any]:
        """What the folder says of how it is quantized; nothing if it is not."""
        config = self.config.get("quantization_config") or self.text_config.get("quantization_config")
        return config or read_object(self.path / folder.MODELOPT)

    @cached_property
    def _reader(self) -> Reader | None:
        return reader_of(self._quantization, self.path)

    @property
    def container(self) -> str | None:
        """The name of the container of a checkpoint that is quantized already."""
        return self._reader.name if self._reader else None

    @property
    def quantized(self) -> dict[str, tuple[Scheme, Shape]]:
        """Scheme and shape of every module that is quantized already."""
        return self._stored.modules if self._stored else {}

    @cached_property
    def kv(self) -> kv.KVCache | None:
        """How engines round its KV cache; None: it stays in 16 bits."""
        return kv.find(self._quantization, self.entries)

    @cached_property
    def kv_scales(self) -> frozenset[str]:
        """The tensors that belong to its KV cache."""
        return frozenset(kv.scales(self.entries))

    @cached_property
    def _stored(self) -> StoredModules | None:
        return StoredModules.of(self._reader, self._quantization, self.entries) if self._reader else None

    @cached_property
    def parts(self) -> Mapping[str, str]:
        """Tensor name to module, for every tensor that is a part of a quantized module."""
        return self._stored.parts if self._stored else {}

    def read_quantized(self, module: str) -> Quantized:
        """The matrix of a module that is quantized already."""
        return self.read_packed(module).quantized

    def read_packed(self, module: str) -> PackedMatrix:
        """The same as it lies in the file."""
        if self._stored is None:
            raise BadCheckpoint(f"{self.path} is not quantized")
        return self._stored.read(module, self.parts_of[module])

    def read_inputs(self, module: str) -> ActivationQuant | None:
        """How engines round what a module reads; None where it stays in 16 bits."""
        stored = self._stored if module in self.quantized else None
        return stored and stored.inputs(module, self.parts_of[module])

    @cached_property
    def parts_of(self) -> dict[str, list[str]]:
        """The tensors of every quantized module."""
        owned: dict[str, list[str]] = {}
        for tensor, module in self.parts.items():
            owned.setdefault(module, []).append(tensor)
        return owned

    def read(self, tensor: str) -> Tensor:
        """A tensor by its name in the unquantized checkpoint; decoded if it is stored quantized, with what an adapter
        adds, and turned."""
        w = self.values[tensor] if tensor in self.values else self._read(tensor)
        w = self.adapter.merge(tensor, w) if self.adapter else w
        return self._turned(tensor, w)

    def _turned(self, tensor: str, w: Tensor) -> Tensor:
        if self.rotation is None:
            return w
        part = self.expert_slices.get(tensor)
        return self.rotation.turned(part.stack if part else tensor, w, apart=part is not None)

    def lies_transposed(self, tensor: str) -> bool:
        """Whether a matrix lies [in, out]."""
        return roles.is_transposed(tensor, self.model_type)

    def _read(self, tensor: str) -> Tensor:
        if tensor in self.expert_slices:
            return self.expert_slices[tensor].read(self.entries[self.expert_slices[tensor].stack])
        if tensor in self.entries and tensor not in self.parts:  # a part may bear the name of the whole
            return self.entries[tensor].read()
        module = tensor.removesuffix(".weight")
        if module in self.quantized:
            w = self.read_quantized(module).decode()
            return w.T.contiguous() if roles.is_transposed(tensor, self.model_type) else w
        raise BadCheckpoint(f"{self.path} has no tensor '{tensor}'")

    def same(self, tensor: str, other: "Checkpoint") -> bool:
        """Whether both store this tensor, unquantized, and the same bits in it, and nothing adds to them."""
        if any(c.adapter or c.rotation or tensor in c.values for c in (self, other)):
            return False
        mine, its = (None if tensor in c.parts else c.entries.get(tensor) for c in (self, other))
        if mine is None or its is None or (mine.shape, mine.dtype) != (its.shape, its.dtype):
            return False
        return mine == its or torch.equal(mine.read().view(torch.uint8), its.read().view(torch.uint8))

    def spec(self, tensor: str) -> Spec:
        """Shape and dtype of a tensor by its name in the unquantized checkpoint; that of the model where it is stored
        quantized."""
        if tensor in self.expert_slices:
            return Spec(self.expert_slices[tensor].shape, self.entries[self.expert_slices[tensor].stack].dtype)
        entry = None if tensor in self.parts else self.entries.get(tensor)
        return Spec(entry.shape, entry.dtype) if entry else Spec(self._shapes[tensor], self.dtype)

    @property
    def original(self) -> "Checkpoint":
        """As its files have it, where its hidden states are rotated."""
        return self.rotation.original if self.rotation else self

    @property
    def untied(self) -> set[str]:
        """A head that was the embedding, and is read as a tensor of its own."""
        return self.entries.keys() - self.original.entries.keys()

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes as in the unquantized checkpoint, whose cache has no scales; fused experts that were
        quantized stay apart."""
        return dict(self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        shapes = {
            name: e.shape for name, e in self.entries.items() if name not in self.parts and name not in self.kv_scales
        }
        for module, (_, (out, width)) in self.quantized.items():
            name = f"{module}.weight"
            shapes[name] = (width, out) if roles.is_transposed(name, self.model_type) else (out, width)
        apart: dict[str, dict[str, Shape]] = {}
        for name, part in self.expert_slices.items():
            apart.setdefault(part.stack, {})[name] = part.shape
        return (
            {name: shape for t, whole in shapes.items() for name, shape in apart.get(t, {t: whole}).items()}
            if apart
            else shapes
        )

    def weights(self, embedding: bool = False) -> Iterator[Weight]:
        """The matrices inside the blocks that a method may quantize, the head, and the embedding if asked for."""
        return weights_of(self, embedding)

    @cached_property
    def linears(self) -> Linears:
        """Which tensors of the blocks are linears, and how they lie."""
        return linears(self)

    @property
    def has_encoder(self) -> bool:
        """Whether the model is an encoder and a decoder of text or sound, and not a decoder alone."""
        return bool(self.config.get("is_encoder_decoder"))

    @property
    def is_decoder(self) -> bool:
        """Whether it predicts one token of a text after the other, as what calibrates and measures takes models to
        do."""
        named = self.config.get("architectures")
        return not self.has_encoder and not str(named[0] if isinstance(named, list) and named else "").endswith(MASKED)

    def read_weight(self, weight: Weight) -> Tensor:
        """[out, in], in the stored precision. Raises BadCheckpoint for NaN or Inf."""
        if weight.row_offset is not None:
            w = self.entries[weight.tensor].read(weight.row_offset, weight.row_offset + weight.shape[0])
            w = self.adapter.merge(weight.tensor, w, weight.row_offset) if self.adapter else w
            w = self._turned(weight.tensor, w)
        elif weight.expert is not None and weight.tensor in self.entries:
            w = self.entries[weight.tensor].read(weight.expert, weight.expert + 1)[
                0
            ]  # an adapter of fused experts is refused
            w = self._turned(weight.tensor, w)
        else:
            w = self.read(weight.tensor)
            w = w if weight.expert is None else w[weight.expert]
        require_finite(weight.tensor, w)
        return w.T.contiguous() if weight.transposed else w


def _tokens(value: Any) -> set[int]:
    """One number or a list of them."""
    return {token for token in (value if isinstance(value, list) else [value]) if type(token) is int}
