"""Engines that are timed, and which of them load what."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

from halfbyte.engines.engines import OURS, timed_named
from halfbyte.engines.handover import check_stored
from halfbyte.errors import BadRequest
from halfbyte.models.checkpoint import Checkpoint

_PACKAGE = "halfbyte.inference.timing"


class TimedEngine(NamedTuple):
    """How an engine is timed."""

    home: str
    """The class that does it, as module:Class."""
    package: str
    """What has to be installed."""
    install: str = ""
    plainer: Mapping[str, Any] = MappingProxyType({})
    """What its model is opened with once it was killed without that."""
    about_plainer: str = ""


HOMES = {
    OURS: TimedEngine(f"{_PACKAGE}.in_transformers:InTransformers", "transformers"),
    "llama.cpp": TimedEngine(
        f"{_PACKAGE}.in_llama_cpp:InLlamaCpp",
        "llama_cpp",
        "pip install llama-cpp-python",
        MappingProxyType({"laid_out_anew": False}),
        "it was ended by {0} with weights laid out anew for its fastest kernels, whose instructions some virtual "
        "machines announce and do not have; it is measured without these",
    ),
    "vllm": TimedEngine(f"{_PACKAGE}.in_vllm:InVllm", "vllm", "pip install vllm"),
}


def why_not(engine: str, checkpoint: Checkpoint) -> str | None:
    """Why an engine does not load a checkpoint, if it does not."""
    if engine == OURS:
        return None
    verdict = check_stored(checkpoint, engine)
    return None if verdict.loads else verdict.reasons[0]


def missing(engine: str) -> str | None:
    """Why an engine is not here, if it is not."""
    row = HOMES[engine]
    return None if find_spec(row.package) else f"{engine} is not installed ({row.install})"


def chosen(engines: Sequence[str], checkpoints: Sequence[Checkpoint]) -> tuple[list[str], dict[str, str]]:
    """The engines that are here and load some of these, and why others are left out. `engines`: those that are asked
    for; none: all. Raises UnknownName, and BadRequest for one that is asked for and cannot be."""
    asked = list(dict.fromkeys(map(timed_named, engines)))
    left_out: dict[str, str] = {}
    for engine in asked or HOMES:
        refusals = [why_not(engine, checkpoint) for checkpoint in checkpoints]
        reason = missing(engine) or (refusals[0] if all(refusals) else None)
        if reason:
            left_out[engine] = reason
    if asked and left_out:
        raise BadRequest(next(iter(left_out.values())))
    names = [engine for engine in asked or HOMES if engine not in left_out]
    for checkpoint in checkpoints:
        if all(refusals := [why_not(engine, checkpoint) for engine in names]):
            raise BadRequest(f"{checkpoint.path}: {refusals[0]}")
    return names, left_out
