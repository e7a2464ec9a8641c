"""A checkpoint as a GGUF of F32, and back, by the tables alone: nothing is quantized."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from halfbyte.targets.gguf.families import FAMILIES, Translation, checkpoint_shapes, family_of
from halfbyte.targets.gguf.file import Writer, read
from halfbyte.targets.gguf.hyperparameters import config as config_of
from halfbyte.targets.gguf.hyperparameters import metadata
from halfbyte.targets.gguf.tokenizer import tokenizer_metadata


def write(folder: Path, path: Path) -> Path:
    """The checkpoint in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    checkpoint = {
        name: t.float() for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()
    }
    family = family_of(config)
    translation = Translation(family, config, {name: tuple(t.shape) for name, t in checkpoint.items()})
    filled: dict[str, dict[int, torch.Tensor]] = {}
    for name, t in checkpoint.items():
        for place in translation.places(name):
            value = t.transpose(-1, -2) if place.transposed else t
            if place.rows is not None:
                value = value.index_select(place.dim(value.dim()), place.rows)
            filled.setdefault(place.name, {})[place.expert or 0] = value + place.add
    tensors = {
        name: parts[0] if len(parts) == 1 else torch.stack([parts[e] for e in sorted(parts)])
        for name, parts in filled.items()
    } | translation.extra()
    said = metadata(config, family, folder) | tokenizer_metadata(folder, translation.settings.vocab_size)
    writer = Writer(path, said, {name: ("F32", tuple(t.shape)) for name, t in tensors.items()})
    for name, t in tensors.items():
        writer.write(name, t.contiguous())
    writer.close()
    return path


def read_back(path: Path, folder: Path) -> Path:
    """A checkpoint of the GGUF at `path`."""
    file = read(path)
    shapes = {name: stored.shape for name, stored in file.tensors.items()}
    rope = {name: stored.entry.read() for name, stored in file.tensors.items() if name.startswith("rope_")}
    config = config_of(file.metadata, shapes, rope)
    family = FAMILIES[config["model_type"]]
    shapes = checkpoint_shapes(family, shapes)
    translation = Translation(family, config, shapes)
    found = {}
    for name, shape in shapes.items():
        value = torch.empty(shape)
        for place in translation.places(name):
            stored = file.tensors[place.name].entry.read()
            part = (stored if place.expert is None else stored[place.expert]) - place.add
            view = value.transpose(-1, -2) if place.transposed else value
            dim = place.dim(view.dim())
            view.index_copy_(
                dim,
                torch.arange(part.shape[dim]) if place.rows is None else place.rows,
                part.reshape(*view.shape[:dim], -1, *view.shape[dim + 1 :]),
            )
        found[name] = value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return folder
