"""What lies in a folder of safetensors: tensors by the index, and the files that belong beside them."""

import re
from pathlib import Path, PureWindowsPath

from halfbyte.containers.safetensors import Entry, read_header
from halfbyte.errors import BadCheckpoint, plural
from halfbyte.files import exists, is_within, read_object
from halfbyte.registry import SOURCES

INDEX = "model.safetensors.index.json"
MODELOPT = "hf_quant_config.json"
"""Where Model Optimizer says what it did; older releases of it say nothing in config.json."""
NOT_COPIED = ("config.json", MODELOPT, "quantize_config.json", "quant_config.json", "adapter_config.json")
"""They say how the source is quantized, or what is to be added to it; an output that needs such a file gets its own."""
ADAPTER = re.compile(r"adapter_.*\.safetensors")
WEIGHTS = ("safetensors", "bin", "pt", "pth", "ckpt", "msgpack", "h5", "onnx", *(suffix[1:] for suffix in SOURCES))
WEIGHT_FILE = re.compile(rf".*\.({'|'.join(WEIGHTS)})$|.*\.index\.json$")


def entries(path: Path) -> dict[str, Entry]:
    """Every tensor. Raises BadCheckpoint for a folder that is not whole, or that no index makes clear."""
    weight_map = _weight_map(path)
    shards = sorted(set(weight_map.values())) if weight_map is not None else _files_of_tensors(path)
    tensors: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in read_header(path / shard).items():
            counts = weight_map.get(name) if weight_map is not None else None
            if name in tensors and counts is None:
                raise BadCheckpoint(
                    f"{path}: '{name}' is in {tensors[name].path.name} and in {shard}, and no {INDEX} says which "
                    "of them counts"
                )
            if counts in (None, shard):
                tensors[name] = entry
    lost = [name for name in weight_map or () if name not in tensors]
    if lost:
        raise BadCheckpoint(
            f"{path}: {INDEX} names {plural(len(lost), 'tensor')} that no shard holds, the first '{lost[0]}'"
        )
    return tensors


def _weight_map(path: Path) -> dict[str, str] | None:
    """The file of every tensor, as an index says it, if there is one."""
    if not exists(path / INDEX):
        return None
    weight_map = read_object(path / INDEX).get("weight_map")
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
    if not shards:
        raise _without_tensors(path)
    return weight_map


def _files_of_tensors(path: Path) -> list[str]:
    shards = [p.name for p in sorted(path.glob("*.safetensors")) if not ADAPTER.fullmatch(p.name)]
    if not shards:
        raise _without_tensors(path)
    return shards


def _without_tensors(path: Path) -> BadCheckpoint:
    kinds = sorted({p.suffix for p in path.iterdir() if WEIGHT_FILE.fullmatch(p.name)} - {".json", ".safetensors"})
    hint = f"; it has {', '.join(kinds)} files: save it again as safetensors" if kinds else ""
    return BadCheckpoint(f"{path} is no checkpoint: it has no safetensors{hint}")


def other_files(path: Path) -> list[Path]:
    """Every file that is neither a weight nor says how the weights are quantized; what lies elsewhere is nobody's to
    publish."""
    return [file for file in _beside(path) if is_within(file, path)]


def left_out(path: Path) -> list[str]:
    """What is to be said of files that are links out of the folder."""
    out = [str(file.relative_to(path)) for file in _beside(path) if not is_within(file, path)]
    if not out:
        return []
    return [
        f"left out, as links out of the source's folder: {', '.join(out)}; if they belong to the model, put the files "
        "there"
    ]


def _beside(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    files = (p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file())
    return [
        path / p for p in files if not WEIGHT_FILE.fullmatch(p.name) and str(p) not in NOT_COPIED and not _hidden(p)
    ]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def adapter_hint(folder: Path) -> str:
    """What to do with an adapter's folder that was named as a model."""
    beside = folder / "adapter_config.json"
    if not beside.is_file():
        return ""
    base = read_object(beside).get("base_model_name_or_path") or "BASE"
    return f"; it is an adapter, to be merged into its base: halfbyte quantize {base} --adapter {folder} -o OUT"
