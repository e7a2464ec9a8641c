"""The public functions: what the command line calls, and nothing more."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import demo, pipeline
from halfbyte.containers import CONTAINERS
from halfbyte.containers.place import one_file
from halfbyte.errors import BadRequest
from halfbyte.evaluation.conventions import convention_named
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.pipeline import convert, dequantize
from halfbyte.recipe import Recipe
from halfbyte.report import build
from halfbyte.report.inspect import inspect
from halfbyte.report.numbers import require_finite
from halfbyte.run import Progress, require_callable, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def quantize(model: str | Path | Recipe, out: str | Path, *, overwrite: bool = False, progress: Progress = silent, **recipe: Any) -> dict[str, Any]:
    """Quantize `model` (a folder, a GGUF, a hub id, or a whole Recipe) into `out`, a folder or a .gguf file; returns the report.

    `recipe` takes the entries of Recipe: adapter, requantize, method, grid, to, engine, calibration, skip, override, input_range,
    alpha, kv, head, pure, imatrix, pre, shard_gb.
    Raises HalfbyteError.
    """
    words = model.model_dump(exclude_unset=True) if isinstance(model, Recipe) else {"model": str(model)}
    whole = Recipe.of(**{**words, **recipe})
    if whole.method == "convert":
        if whole.to is None:
            raise BadRequest(f"method convert needs a container in the recipe's entry 'to': {', '.join(CONTAINERS)}")
        return convert(whole.model, out, whole.to, overwrite=overwrite, progress=progress)
    if whole.method == "dequantize":
        return dequantize(whole.model, out, whole.to, whole.grid, whole.adapter, overwrite, progress)
    return pipeline.quantize(whole, out, overwrite=overwrite, progress=progress)


def evaluate(
    models: Sequence[str | Path],
    against: str | Path,
    text: str = "heldout",
    length: int = 512,
    windows: int | None = None,
    convention: str = "served",
    kv: Sequence[str] = ("stored",),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity of `against` and `models`, and what each of `models` diverges from it, on the same tokens.

    `text`: a file, a dataset, or "heldout", the embedded text. `convention`: "served", each window begins as the tokenizer begins a text;
    "papers", none does; "llama.cpp". `kv`: caches to run each model with; "stored" is the one that it says
    it has, "none" one of 16 bits. The result is also written into each model's report.json.
    """
    from halfbyte.evaluation.divergence import compare
    from halfbyte.kv_cache import with_cache

    rule = convention_named(convention)
    reference = Checkpoint.open(against)
    kinds = [(model, kind) for model in models for kind in kv]
    checkpoints = [reference, *(with_cache(model, kind, progress) for model, kind in kinds)]
    require_one_vocabulary(reference, checkpoints[1:])
    taken = calibrate.evaluation(reference, str(demo.HELDOUT) if text == "heldout" else text, length, windows, rule.begin)
    rows = compare(checkpoints, taken.tokens, rule.first(length, len(taken.stream.opening)), progress=progress)
    common = {
        "text": text,
        "length": length,
        "windows": len(taken.tokens),
        "tokens_sha256": taken.digest,
        "convention": rule.name,
        "opening": list(taken.stream.opening_words),
        "reference_path": str(reference.path),
    }
    require_finite(rows, "evaluation")
    measured = [{"path": str(c.path), "kv": str(c.kv.grid) if c.kv else None, **row} for c, row in zip(checkpoints[1:], rows[1:], strict=True)]
    for (model, kind), row in zip(kinds, measured, strict=True):
        if kind == "stored":
            others = [other for (same, _), other in zip(kinds, measured, strict=True) if same == model and other["kv"] != row["kv"]]
            build.add(Path(row["path"]), evaluation={**common, "reference": rows[0], "model": row, "other_caches": others})
    return {**common, "reference": rows[0], "models": measured}


def needle(
    models: Sequence[str | Path],
    against: str | Path,
    text: str = "heldout",
    lengths: Sequence[int] = (256, 512, 1024),
    depths: int = 5,
    facts: int = 8,
    seed: int = 0,
    kv: Sequence[str] = ("stored",),
    progress: Progress = silent,
) -> dict[str, Any]:
    """How well `against` and `models` read back a fact that is planted in texts of these lengths, at `depths` places from beginning to end.

    For each length and depth: `gain`, how much likelier its having been told makes the answer, in nats per token; `found`, the share of
    answers that greedy decoding gives. `kv` is as in `evaluate`. The result is also written into each model's report.json.
    """
    from halfbyte.evaluation.needle import measure
    from halfbyte.kv_cache import with_cache

    kinds = [(model, kind) for model in models for kind in kv]
    reference, *checkpoints = [Checkpoint.open(against), *(with_cache(model, kind, progress) for model, kind in kinds)]
    require_one_vocabulary(reference, checkpoints)
    rows = measure([reference, *checkpoints], str(demo.HELDOUT) if text == "heldout" else text, lengths, depths, facts, seed, progress)
    common = {
        "text": text,
        "lengths": list(lengths),
        "depths": depths,
        "facts": facts,
        "seed": seed,
        "reference_path": str(reference.path),
        "reference": rows[0],
    }
    require_finite(rows, "needle")
    measured = [{"path": str(c.path), "kv": str(c.kv.grid) if c.kv else None, "rows": own} for c, own in zip(checkpoints, rows[1:], strict=True)]
    for (_, kind), row in zip(kinds, measured, strict=True):
        if kind == "stored":
            build.add(Path(row["path"]), needle={**common, "model": row})
    return {**common, "models": measured}


def require_one_vocabulary(reference: Checkpoint, others: Sequence[Checkpoint]) -> None:
    """Raise BadRequest for models whose predictions cannot be compared."""
    for checkpoint in others:
        if checkpoint.text_config.get("vocab_size") != reference.text_config.get("vocab_size"):
            raise BadRequest(f"{checkpoint.path} and {reference.path} have different vocabularies; their predictions cannot be compared")


def kv(
    model: str | Path,
    out: str | Path,
    grid: str = "fp8-e4m3",
    calibration: str = "default",
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    input_range: str = "max",
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a checkpoint, quantized or not, into `out` with the scales of a quantized KV cache; returns the report of it."""
    from halfbyte.kv_cache import attach
    from halfbyte.recipe import Calibration

    return attach(model, out, grid, Calibration(source=calibration, samples=samples, length=length, seed=seed), input_range, overwrite, progress)


def imatrix(
    model: str | Path,
    out: str | Path,
    calibration: str = "default",
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure an importance matrix of a model and write it in llama.cpp's format; returns what was measured."""
    from halfbyte.containers.gguf import imatrix as files
    from halfbyte.models import importance

    require_callable(progress)
    out = Path(out).expanduser()
    checkpoint = Checkpoint.open(model)
    with one_file(out, overwrite) as partial:
        windows = calibrate.calibration(checkpoint, calibration, samples, length, seed)
        measured = importance.measure(checkpoint, windows, progress)
        files.write(partial, measured)
    return {"path": str(out), "matrices": len(measured.tensors), **windows.about}


def load(path: str | Path, dtype: "torch.dtype | None" = None, device: str = "cpu") -> "PreTrainedModel":
    """Any checkpoint that halfbyte reads, as a Transformers model that runs; quantized linears stay packed in memory."""
    from halfbyte import nn

    return nn.load(path, dtype, device)


__all__ = ["convert", "dequantize", "evaluate", "imatrix", "inspect", "kv", "load", "needle", "quantize"]
