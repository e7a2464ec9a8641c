"""A checkpoint of which only config.json and the headers are here: enough for every plan, and for no weight."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from http import HTTPStatus
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from halfbyte.containers.config import require_sound
from halfbyte.containers.safetensors import DTYPES, Entry
from halfbyte.errors import BadCheckpoint, BadRequest, brief
from halfbyte.models import heads, roles
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.registry import REMOTE

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
        in_config = self.config.get(heads.TIE, self.text_config.get(heads.TIE))
        has_head = any(map(roles.is_head, self.tensors()))
        return bool(in_config) if in_config is not None else not has_head

    def settings(self):
        """The config as Transformers reads it."""
        import transformers

        return transformers.AutoConfig.for_model(**self.config)


def of_hub(source: str) -> Checkpoint:
    """A model of the hub: config.json, the index, and the first kilobytes of each file of tensors; of one in files of
    another kind, or where org/name:WORD means one of these, their heads.

    Raises BadRequest for one that the hub does not give us.
    """
    from huggingface_hub.errors import NotASafetensorsRepoError, RemoteEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    name, _, revision = source.partition("@")
    name, _, word = name.partition(":")
    disable_progress_bars()
    with _asking(name):
        try:
            return _of_heads(name, revision or None, word) if word else _of_safetensors(name, revision or None)
        except (RemoteEntryNotFoundError, NotASafetensorsRepoError):
            return _of_heads(name, revision or None)


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """What the hub refuses is one line."""
    from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError

    try:
        yield
    except (HfHubHTTPError, SafetensorsParsingError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadRequest(f"the headers of {name} cannot be had of the hub: {brief(reason)}") from None


def _of_safetensors(name: str, revision: str | None) -> HeaderCheckpoint:
    from huggingface_hub import HfApi, hf_hub_download

    file = hf_hub_download(name, "config.json", revision=revision)
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    metadata = HfApi().get_safetensors_metadata(name, revision=revision)
    if not isinstance(config, dict):
        raise BadCheckpoint(f"config.json of {name} is no object")
    return HeaderCheckpoint(Path(name), config, entries_of(name, metadata))


def _of_heads(name: str, revision: str | None, word: str | None = None) -> Checkpoint:
    """Of the one model in files of another kind, or of that whose name has a word."""
    from huggingface_hub import HfApi

    listed = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or ()
    for suffix, home in REMOTE.items():
        sizes = {file.rfilename: file.size or 0 for file in listed if file.rfilename.endswith(suffix)}
        if sizes:
            with TemporaryDirectory() as folder:  # opened while it is there, and all that plans need is then known
                path = resolve_name(home)(sizes, word, partial(_bytes, name, revision), Path(folder))
                return Checkpoint.open(path)
    raise BadRequest(
        f"{name} has neither safetensors with a config.json nor a file that ends with {' or '.join(REMOTE)}"
    )


def _bytes(name: str, revision: str | None, file: str, first: int, count: int) -> bytes:
    """Some of a file's."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "range": f"bytes={first}-{first + count - 1}"}
    with get_session().stream("GET", hf_hub_url(name, file, revision=revision), headers=headers) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != HTTPStatus.PARTIAL_CONTENT:
            raise BadRequest(f"the hub would send all of {file} of {name}, and not its first bytes alone")
        return answer.read()


def entries_of(name: str, metadata: "SafetensorsRepoMetadata") -> dict[str, Entry]:
    """Every tensor, as the headers have it."""
    entries: dict[str, Entry] = {}
    for file, header in metadata.files_metadata.items():
        for tensor, info in header.tensors.items():
            if info.dtype not in DTYPES:
                raise BadCheckpoint(f"'{tensor}' of {name} is of dtype {info.dtype}, which is not known")
            if metadata.weight_map.get(tensor, file) == file:
                entries[tensor] = Entry(tuple(info.shape), DTYPES[info.dtype], Path(file), info.data_offsets[0])
    return entries
