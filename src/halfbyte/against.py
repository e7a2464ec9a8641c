"""Models against their original: opened, held to belong together, and what a report says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from halfbyte import demo
from halfbyte.devices import device_named, title
from halfbyte.errors import BadRequest
from halfbyte.models import adapter as adapters
from halfbyte.models import heads
from halfbyte.models.calibrate import Samples
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.placement import Placement
from halfbyte.models.stamp import origin
from halfbyte.progress import Progress
from halfbyte.report import lineage

Name = str | Path


class Against(NamedTuple):
    """What is compared, and on which device."""

    reference: Checkpoint
    asked: list[tuple[Name, str]]
    """Models, and the KV cache that each runs with."""
    strangers: set[Name]
    """Models that were made of another than the reference, or have other tokens."""
    device: torch.device

    @classmethod
    def of(
        cls,
        models: Name | Sequence[Name],
        against: Name,
        kv: str | Sequence[str],
        adapter: Name | None,
        foreign: bool,
        device: str,
    ) -> "Against":
        """Raises BadRequest for what cannot be compared, and for strangers where they are not asked for."""
        chosen, reference = device_named(device), original(against, adapter)
        names, kinds = several(models), [kv] if isinstance(kv, str) else kv
        strangers = strangers_to(reference, names, foreign)
        return cls(reference, [(model, kind) for model in names for kind in kinds], strangers, chosen)

    @property
    def placement(self) -> Placement:
        """Where models and hidden states lie."""
        return Placement.on(self.device)

    def checkpoints(self, progress: Progress) -> list[Checkpoint]:
        """The reference, and all models with their caches."""
        from halfbyte.kv_cache import with_cache  # needs the model's code

        return [self.reference, *(with_cache(model, kind, progress, self.placement) for model, kind in self.asked)]

    @property
    def about(self) -> dict[str, Any]:
        """For the report."""
        return {"device": title(self.device), **about(self.reference)}


def original(against: Name, adapter: Name | None) -> Checkpoint:
    """What models are compared with, an adapter merged into it."""
    reference = heads.settled(Checkpoint.open(against))
    return adapters.merged(reference, adapter) if adapter else reference


def about(reference: Checkpoint) -> dict[str, Any]:
    """For the report."""
    merged = str(reference.adapter.path) if reference.adapter else None
    return {"reference_path": str(reference.path), "reference_adapter": merged, "reference_xxh3_128": origin(reference)}


def text_named(name: str) -> str:
    """The file or data set. Raises BadRequest for a name of several texts."""
    if name == "multilingual":
        raise BadRequest(
            f"'multilingual' is one text in each of {len(demo.LANGUAGES)} languages, measured one by one: name one, "
            "such as multilingual-fi, or run halfbyte eval --text multilingual"
        )
    return str(demo.TEXTS.get(name, name))


def conditions(text: str, taken: Samples, convention: str) -> dict[str, Any]:
    """Of a measurement on a text, for the report."""
    return {
        "text": text,
        "length": taken.tokens.shape[1],
        "windows": len(taken.tokens),
        "tokens_sha256": taken.digest,
        "convention": convention,
        "opening": list(taken.stream.opening_words),
    }


def several(names: Name | Sequence[Name]) -> Sequence[Name]:
    """One stands for a list of it: a text is a sequence too, of letters."""
    return [names] if isinstance(names, str | Path) else names


def strangers_to(reference: Checkpoint, models: Sequence[Name], foreign: bool) -> set[Name]:
    """Those of the models that were made of another than this reference, or have other tokens, if that was asked for.

    Raises BadRequest where it was not, and for models whose predictions cannot be compared at all.
    """
    strangers = set()
    for model in models:
        checkpoint = Checkpoint.open(model)
        if checkpoint.text_config.get("vocab_size") != reference.text_config.get("vocab_size"):
            raise BadRequest(
                f"{checkpoint.path} and {reference.path} have different vocabularies; their predictions cannot be "
                "compared"
            )
        reasons = _estrangements(checkpoint, reference)
        if reasons and not foreign:
            raise BadRequest(
                f"{reasons[0]}; name the source, or compare them all the same with --foreign (foreign=True)"
            )
        if reasons:
            strangers.add(model)
    return strangers


def _estrangements(checkpoint: Checkpoint, reference: Checkpoint) -> list[str]:
    """Why a model cannot have been made of the reference."""
    from halfbyte.evaluation import vocabulary  # needs tokenizers

    reasons = []
    if source := lineage.stranger(checkpoint.path, reference):
        given = lineage.model_name(reference.path, reference.adapter and reference.adapter.path)
        reasons.append(f"{checkpoint.path} was made of {source}, as its report says, and not of {given}")
    if odd := vocabulary.difference(reference, checkpoint):
        reasons.append(f"the tokenizers differ: {odd}; predictions of other tokens cannot be compared")
    return reasons
