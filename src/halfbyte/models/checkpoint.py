"""The checkpoint is the truth: its tensors, its config, and everything else in its folder."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path, PureWindowsPath
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.containers import kv
from halfbyte.containers.config import require_sound
from halfbyte.containers.container import Modules, Reader, described, require_parts
from halfbyte.containers.safetensors import Entry, Spec, read_header
from halfbyte.containers.table import READERS
from halfbyte.errors import BadCheckpoint, BadRequest, Unsupported, plural
from halfbyte.files import exists, is_within, read_object
from halfbyte.formats import DTYPES
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import PackedMatrix, Quantized, Scheme
from halfbyte.models import cards, roles, tokenizers
from halfbyte.models.linears import Linears, linears
from halfbyte.registry import SOURCES, located, source_suffix

if TYPE_CHECKING:
    from halfbyte.models.adapter import Adapter
    from halfbyte.models.experts import ExpertSlice

INDEX = "model.safetensors.index.json"
MODELOPT = "hf_quant_config.json"
"""Where Model Optimizer says what it did; older releases of it say nothing in config.json."""
COARSEST, CHECKED = 2**-8, 1 << 18
"""Relative error that a tensor in 16 bits may have, that of BF16, over rows of so many numbers in all."""
NOT_COPIED = ("config.json", MODELOPT, "quantize_config.json", "quant_config.json", "adapter_config.json")
"""They say how the source is quantized, or what is to be added to it; an output that needs such a file gets its own."""
ADAPTER = re.compile(r"adapter_.*\.safetensors")
WEIGHTS = ("safetensors", "bin", "pt", "pth", "ckpt", "msgpack", "h5", "onnx", *(suffix[1:] for suffix in SOURCES))
WEIGHT_FILE = re.compile(rf".*\.({'|'.join(WEIGHTS)})$|.*\.index\.json$")
MASKED = "ForMaskedLM"
"""How Transformers calls a class that fills gaps in a text."""
CODES = (torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
"""What stands for a weight together with a scale only, in a checkpoint that is quantized."""
DTYPE_NAMES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True)
class Weight:
    """One matrix that a method may quantize: a 2-D tensor, or one expert of a 3-D tensor."""

    name: str
    """The module in the output: the tensor's name without `.weight`, with the expert's number where experts are
    fused."""
    tensor: str
    block: str | None
    shape: Shape
    """[out, in], whichever way it lies in the file."""
    transposed: bool = False
    expert: int | None = None
    row_offset: int | None = None
    """Of a chunk of rows: the first of them."""


class Checkpoint:
    """A folder of safetensors with a config.json."""

    adapter: "Adapter | None" = None
    """What is merged into its weights as they are read (halfbyte.models.adapter)."""
    expert_slices: "Mapping[str, ExpertSlice]" = MappingProxyType({})
    """Linears of single experts that are read out of stacks (halfbyte.models.experts)."""
    values: Mapping[str, Tensor] = MappingProxyType({})
    """Of tensors, in place of those in the files."""
    splits_stacks = True
    """Whether experts that lie in one tensor may be read apart."""

    def __init__(self, path: Path):
        self.path = path
        self.config = read_object(
            path / "config.json", missing=f"{path} is no checkpoint: it has no config.json{_adapter_hint(path)}"
        )
        require_sound(self.config, path / "config.json")
        self.entries = _entries(path)
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
        None); `adapter`, merged into its weights; `expert_slices`, experts apart; `values` of tensors; `config`."""
        other = copy.copy(self)
        other.__dict__.pop("_shapes", None)  # which other parts make others
        other.__dict__.update(parts)
        return other

    @staticmethod
    def open(source: str | Path) -> "Checkpoint":
        """A folder of safetensors, a file or folder of another kind, or a hub id (org/name or org/name@revision).

        Raises BadCheckpoint for what is none of these.
        """
        path = located(source)
        if path is None:
            return Checkpoint(download(str(source)))
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
    def ends(self) -> set[int]:
        """Tokens at which an answer ends, as config.json and generation_config.json say."""
        said = read_object(self.path / "generation_config.json").get("eos_token_id")
        return _tokens(said) | _tokens(self.text_config.get("eos_token_id"))

    @cached_property
    def tied(self) -> bool:
        """Whether the head shares the embedding's values, whatever config.json says: as Transformers reads it."""
        from halfbyte.models import heads  # which reads checkpoints

        return heads.is_tied(self)

    @property
    def other_files(self) -> list[Path]:
        """Every file that is neither a weight nor says how the weights are quantized; what lies elsewhere is nobody's
        to publish."""
        return [path for path in self._files if is_within(path, self.path)]

    @property
    def left_out(self) -> list[str]:
        """What is to be said of files that are links out of the folder."""
        out = [str(path.relative_to(self.path)) for path in self._files if not is_within(path, self.path)]
        return (
            [
                f"left out, as links out of the source's folder: {', '.join(out)}; if they belong to the model, put "
                "the files there"
            ]
            if out
            else []
        )

    @cached_property
    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        files = (p.relative_to(self.path) for p in sorted(self.path.rglob("*")) if p.is_file())
        return [
            self.path / p
            for p in files
            if not WEIGHT_FILE.fullmatch(p.name) and str(p) not in NOT_COPIED and not _hidden(p)
        ]

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
        said = self.config.get("quantization_config") or self.text_config.get("quantization_config")
        return said or read_object(self.path / MODELOPT)

    @cached_property
    def _reader(self) -> Reader | None:
        config = self._quantization
        if not config:
            return None
        known = next((reader for reader in READERS.values() if reader.reads(config)), None)
        if known is None:
            raise Unsupported(
                f"{self.path} is quantized with '{config.get('quant_method')}', which is not read yet; known: "
                f"{', '.join(READERS)}"
            )
        return known

    @property
    def container(self) -> str | None:
        """The name of the container of a checkpoint that is quantized already."""
        return self._reader.name if self._reader else None

    @property
    def quantized(self) -> dict[str, tuple[Scheme, Shape]]:
        """Scheme and shape of every module that is quantized already."""
        return self._opened[1]

    @cached_property
    def kv(self) -> kv.KVCache | None:
        """How engines round its KV cache; None: it stays in 16 bits."""
        return kv.find(self._quantization, self.entries)

    @cached_property
    def kv_scales(self) -> frozenset[str]:
        """The tensors that belong to its KV cache."""
        return frozenset(kv.scales(self.entries))

    @cached_property
    def _opened(self) -> tuple[Reader | None, Modules]:
        """How the checkpoint is read, and what of it is quantized."""
        if self._reader is None:
            return None, {}
        reader, found = self._reader.opened(self._quantization, self.entries)
        for module, (scheme, shape) in found.items():
            has = partial(_has, self.entries, module)
            require_parts(module, scheme, shape, reader.parts(scheme, shape, has), self.entries)
        for name, entry in self.entries.items():
            if name.endswith(".weight") and entry.dtype in CODES and name.removesuffix(".weight") not in found:
                raise BadCheckpoint(
                    f"'{name}' is {described(entry)}, and no scale of it is stored; the checkpoint is not whole"
                )
        return reader, found

    @cached_property
    def parts(self) -> dict[str, str]:
        """Tensor name to module, for every tensor that is a part of a quantized module."""
        reader, modules = self._opened
        if reader is None:
            return {}
        suffixes = {suffix for scheme, shape in set(modules.values()) for suffix in reader.suffixes(scheme, shape)}
        return {f"{m}.{s}": m for m in modules for s in suffixes if f"{m}.{s}" in self.entries}

    def read_quantized(self, module: str) -> Quantized:
        """The matrix of a module that is quantized already."""
        return self.read_packed(module).quantized

    def read_packed(self, module: str) -> PackedMatrix:
        """The same as it lies in the file."""
        scheme, shape = self.quantized[module]
        tensors = {n.removeprefix(f"{module}."): self.entries[n].read() for n in self.parts_of[module]}
        return PackedMatrix(tensors, partial(self._layout.unpack, scheme=scheme, shape=shape))

    @property
    def _layout(self) -> Reader:
        reader, _ = self._opened
        if reader is None:
            raise BadCheckpoint(f"{self.path} is not quantized")
        return reader

    def read_inputs(self, module: str) -> ActivationQuant | None:
        """How engines round what a module reads; None where it stays in 16 bits."""
        scheme, _ = self.quantized.get(module, (None, ()))
        if scheme is None or scheme.activations is None:
            return None
        numbers = {
            n.removeprefix(f"{module}."): self.entries[n].read()
            for n in self.parts_of[module]
            if prod(self.entries[n].shape) == 1
        }
        return self._layout.inputs(numbers, scheme.activations)

    @cached_property
    def parts_of(self) -> dict[str, list[str]]:
        """The tensors of every quantized module."""
        owned: dict[str, list[str]] = {}
        for tensor, module in self.parts.items():
            owned.setdefault(module, []).append(tensor)
        return owned

    def read(self, tensor: str) -> Tensor:
        """A tensor by its name in the unquantized checkpoint; decoded if it is stored quantized, with what an adapter
        adds."""
        w = self.values[tensor] if tensor in self.values else self._read(tensor)
        return self.adapter.merge(tensor, w) if self.adapter else w

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
        if self.adapter or other.adapter or tensor in self.values or tensor in other.values:
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
            {name: shape for t, own in shapes.items() for name, shape in apart.get(t, {t: own}).items()}
            if apart
            else shapes
        )

    def weights(self, embedding: bool = False) -> Iterator[Weight]:
        """The matrices inside the blocks that a method may quantize, the head, and the embedding if asked for."""
        lies_transposed = self.linears.transposed
        for name, shape in self.tensors().items():
            if name in self.expert_slices:
                yield Weight(name.removesuffix(".weight"), name, roles.block_of(name), shape)
                continue
            if name not in lies_transposed:
                outside = roles.block_of(name) is None and len(shape) == 2
                if outside and ((roles.is_head(name) and not self.tied) or (embedding and roles.EMBEDDING.match(name))):
                    yield Weight(name.removesuffix(".weight"), name, None, shape)
                continue
            block, transposed = roles.block_of(name, self.has_encoder), lies_transposed[name]
            out, width = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
            if len(shape) == 2:
                yield Weight(name.removesuffix(".weight"), name, block, (out, width), transposed)
            else:
                head, _, last = name.removesuffix(".weight").rpartition(".")
                for expert in range(shape[0]):
                    yield Weight(f"{head}.{expert}.{last}", name, block, (out, width), transposed, expert)

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
        elif weight.expert is not None and weight.tensor in self.entries:
            w = self.entries[weight.tensor].read(weight.expert, weight.expert + 1)[
                0
            ]  # an adapter of fused experts is refused
        else:
            w = self.read(weight.tensor)
            w = w if weight.expert is None else w[weight.expert]
        require_finite(weight.tensor, w)
        return w.T.contiguous() if weight.transposed else w


def _has(entries: Mapping[str, Entry], module: str, suffix: str) -> bool:
    return f"{module}.{suffix}" in entries


def require_finite(name: str, w: Tensor) -> None:
    """Raise BadCheckpoint for NaN or Inf: one reduction finds them all, since both survive a sum (and an overflow of
    the sum is looked into)."""
    if w.is_floating_point() and not torch.isfinite(
        (w if w.dtype.itemsize > 1 else w.float()).sum()
    ):  # torch has no sum of floats of 8 bits
        bad = int((~torch.isfinite(w.float())).sum())
        if bad:
            raise BadCheckpoint(
                f"tensor '{name}' holds {bad} NaN or Inf values; no method can round it (mend it, or --skip it with "
                "a method that needs no calibration)"
            )


def cast(name: str, value: Tensor, dtype: torch.dtype, instead: str) -> Tensor:
    """A tensor in another precision. Raises Unsupported where that has no such numbers: large ones would become Inf, or
    small ones 0."""
    if value.dtype == dtype or not value.is_floating_point():
        return value.to(dtype)
    narrow = value.to(dtype)
    if dtype == torch.float16 and value.numel():
        rows = value.reshape(-1, value.shape[-1]) if value.dim() else value.view(1, 1)
        some = slice(0, len(rows), max(1, value.numel() // CHECKED))
        exact, rounded = (w.reshape(rows.shape)[some].double() for w in (value, narrow))
        overflows = not torch.isfinite(narrow.sum(dtype=torch.float32)) and torch.isfinite(value.float().abs().amax())
        if overflows or (rounded - exact).norm() > COARSEST * exact.norm():
            low, high = (w.item() for w in value.float().abs().aminmax())
            raise Unsupported(
                f"'{name}' holds numbers from {low:.3g} to {high:.3g}, and F16 only those from 6e-08 to "
                f"65504; {instead}"
            )
    return narrow


def _entries(path: Path) -> dict[str, Entry]:
    index = read_object(path / INDEX) if exists(path / INDEX) else None
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(s, str) and ".." not in s and not PureWindowsPath(s).anchor for s in weight_map.values()
        ):
            raise BadCheckpoint(f"{path / INDEX} maps no tensors to files of the folder")
        shards = sorted(set(weight_map.values()))
        missing = [s for s in shards if not exists(path / s)]
        if missing:
            raise BadCheckpoint(
                f"{path} lacks {len(missing)} of {len(shards)} shards that {INDEX} names, the first {missing[0]}; "
                "download it again"
            )
    else:
        shards = [p.name for p in sorted(path.glob("*.safetensors")) if not ADAPTER.fullmatch(p.name)]
    if not shards:
        found = sorted({p.suffix for p in path.iterdir() if WEIGHT_FILE.fullmatch(p.name)} - {".json", ".safetensors"})
        hint = f"; it has {', '.join(found)} files: save it again as safetensors" if found else ""
        raise BadCheckpoint(f"{path} is no checkpoint: it has no safetensors{hint}")
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in read_header(path / shard).items():
            counts = index["weight_map"].get(name) if index else None
            if name in entries and counts is None:
                raise BadCheckpoint(
                    f"{path}: '{name}' is in {entries[name].path.name} and in {shard}, and no {INDEX} says which "
                    "of them counts"
                )
            if counts in (None, shard):
                entries[name] = entry
    if index:
        lost = [name for name in index["weight_map"] if name not in entries]
        if lost:
            raise BadCheckpoint(
                f"{path}: {INDEX} names {plural(len(lost), 'tensor')} that no shard holds, the first '{lost[0]}'"
            )
    return entries


def _tokens(said: Any) -> set[int]:
    """One number or a list of them."""
    return {token for token in (said if isinstance(said, list) else [said]) if type(token) is int}


def _adapter_hint(folder: Path) -> str:
    """What to do with an adapter's folder that was named as a model."""
    beside = folder / "adapter_config.json"
    if not beside.is_file():
        return ""
    base = read_object(beside).get("base_model_name_or_path") or "BASE"
    return f"; it is an adapter, to be merged into its base: halfbyte quantize {base} --adapter {folder} -o OUT"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def download(source: str) -> Path:
    """The folder of a model of the hub. Raises BadRequest."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    others = [f"*{suffix}" for suffix in SOURCES]
    name, _, revision = source.partition("@")
    if ":" in name:
        name, _, word = name.partition(":")
        raise BadRequest(
            f"single files of {name} are planned for, and not downloaded: hf download {name} --include '*{word}*' "
            "--local-dir FOLDER, and name the file"
        )
    try:
        folder = snapshot_download(
            name,
            revision=revision or None,
            ignore_patterns=["*.bin", "*.pt", "*.pth", "*.onnx", "*.h5", "original/*", *others],
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadRequest(f"{name} is neither a folder nor a model that the hub gives us: {reason}") from None
    return Path(folder)
