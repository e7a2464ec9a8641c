"""Which models an engine says that it knows: architectures.yaml, and how a config.json is looked up in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

Config = Mapping[str, Any]
"""A model's config.json."""


@dataclass(frozen=True)
class Registry:
    """The models that an engine's own source lists, or that tests here load in it."""

    source: str
    by: Literal["architecture", "model_type", "decoder"]
    """What of a config the names are; decoder: the `model_type` of the part that is about text."""
    names: frozenset[str]
    derived: tuple[str, ...] = ()
    """Endings of other models, which the engine makes of the ForCausalLM that it knows."""
    dequantized: frozenset[str] = frozenset()
    """Those that load only if every packed weight is decoded on the way."""
    reshaped: frozenset[str] = frozenset()
    """Those of whose linears some read inputs that are not [batch, tokens, features]."""
    stacked: frozenset[str] = frozenset()
    """Those whose experts it reads from one tensor only, which nothing quantized is written as."""
    uneven: frozenset[str] = frozenset()
    """Those whose experts it takes to be quantized as the rest is, though they are no linears and stay in 16 bits."""
    settings: Mapping[str, Mapping[str, list]] | None = None
    """Where the engine does not look at a model's settings: by name, each setting and the values that it assumes."""

    def name_of(self, config: Config) -> str:
        """What the engine calls a model of this config.json."""
        if self.by == "architecture":
            return architecture_of(config)
        return str((decoder_of(config) if self.by == "decoder" else config).get("model_type") or "")

    def knows(self, config: Config) -> bool:
        """Whether the engine has code for such a model."""
        name = self.name_of(config)
        bases = [name.removesuffix(end) + "ForCausalLM" for end in self.derived if name.endswith(end)]
        return any(n in self.names or n in self.dequantized for n in (name, *bases))


def architecture_of(config: Config) -> str:
    """The class that config.json names first; empty where it names none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def decoder_of(config: Config) -> Config:
    """The part of a config that is about text."""
    text = config.get("text_config")
    return text if isinstance(text, dict) and text else config


@cache
def registry(name: str) -> Registry:
    """The row of architectures.yaml that is called so."""
    row = _rows()[name]
    fields = {
        field: str(row.get(field, "")).split()
        for field in ("names", "dequantized", "reshaped", "stacked", "uneven", "derived")
    }
    names = frozenset(fields["names"]) | (registry(row["includes"]).names if "includes" in row else frozenset())
    lists = {field: frozenset(fields[field]) for field in ("dequantized", "reshaped", "stacked", "uneven")}
    return Registry(row["source"], row["by"], names, tuple(fields["derived"]), **lists, settings=row.get("settings"))


@cache
def _rows() -> dict[str, Any]:
    return yaml.safe_load(files("halfbyte.engines").joinpath("architectures.yaml").read_text(encoding="utf-8"))


def auto_class(config: Config) -> str:
    """The class of Transformers that builds what config.json names, with its head."""
    name = architecture_of(config)
    for ending in ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"):
        if name.endswith(ending):
            return f"AutoModel{ending}"
    if name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        return "AutoModelForSpeechSeq2Seq" if "num_mel_bins" in config else "AutoModelForSeq2SeqLM"
    if name.endswith("ForConditionalGeneration"):
        return "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForMultimodalLM"
    return "AutoModel" if name.endswith("Model") and not name.endswith("LMHeadModel") else "AutoModelForCausalLM"
