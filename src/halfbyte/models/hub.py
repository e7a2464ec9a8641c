"""Models of the hub."""

from pathlib import Path

from halfbyte.errors import BadRequest
from halfbyte.registry import SOURCES


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
