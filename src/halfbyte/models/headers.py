"""A checkpoint of which only config.json and the headers are here: enough for every plan, and for no weight."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.containers.config import require_sound
from halfbyte.containers.safetensors import DTYPES, Entry
from halfbyte.errors import BadCheckpoint, BadRequest, brief
from halfbyte.models import heads, roles
from halfbyte.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from huggingface_hub import SafetensorsRepoMetadata


class HeaderCheckpoint(Checkpoint):
    """Tensors that have a shape and a dtype, and no bytes."""

    def __init__(self, path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]):
        self.path = path
        self.config = dict(config)
        require_sound(self.config, path / "config.json")
        self.entries = dict(entries)
        if self._reader:
            self.entries = self._reader.unfuse_experts(self.entries)
        self._seal()

    @cached_property
    def tied(self) -> bool:
        """As config.json has it, since values cannot be compared; what has no head of its own is tied."""
        said = self.config.get(heads.TIE, self.text_config.get(heads.TIE))
        has_head = any(map(roles.is_head, self.tensors()))
        return bool(said) if said is not None else not has_head

    def settings(self):
        """The config as Transformers reads it."""
        import transformers

        return transformers.AutoConfig.for_model(**self.config)


def of_hub(source: str) -> HeaderCheckpoint:
    """A model of the hub: config.json, the index, and the first kilobytes of each file of tensors.

    Raises BadRequest for one that the hub does not give us.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError
    from huggingface_hub.utils import disable_progress_bars

    name, _, revision = source.partition("@")
    disable_progress_bars()
    try:
        file = hf_hub_download(name, "config.json", revision=revision or None)
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        found = HfApi().get_safetensors_metadata(name, revision=revision or None)
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadRequest(f"the headers of {name} cannot be had of the hub: {brief(reason)}") from None
    if not isinstance(config, dict):
        raise BadCheckpoint(f"config.json of {name} is no object")
    return HeaderCheckpoint(Path(name), config, entries_of(name, found))


def entries_of(name: str, found: "SafetensorsRepoMetadata") -> dict[str, Entry]:
    """Every tensor, as the headers have it."""
    entries: dict[str, Entry] = {}
    for file, header in found.files_metadata.items():
        for tensor, info in header.tensors.items():
            if info.dtype not in DTYPES:
                raise BadCheckpoint(f"'{tensor}' of {name} is of dtype {info.dtype}, which is not known")
            if found.weight_map.get(tensor, file) == file:
                entries[tensor] = Entry(tuple(info.shape), DTYPES[info.dtype], Path(file), info.data_offsets[0])
    return entries
