"""Bytes that a budget leaves for what is chosen."""

from collections.abc import Sequence
from typing import NamedTuple

from halfbyte.budget.budget import Budget
from halfbyte.budget.units import Unit, engine_of, size_of
from halfbyte.errors import BadRequest
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report.build import parameters_of
from halfbyte.report.summary import size
from halfbyte.sizing.accounting import ACCOUNTINGS, accounting_of
from halfbyte.sizing.cache import TYPES, ModelConfig, layers_of
from halfbyte.sizing.devices import unlisted
from halfbyte.sizing.memory import Load, MemoryModel, Weights
from halfbyte.sizing.question import CONTEXT
from halfbyte.targets.plan import Plan


class Sized(NamedTuple):
    """Bytes of an output."""

    tensors: int
    files: int
    """With headers and padding."""

    @property
    def beside(self) -> int:
        """Of headers and padding."""
        return self.files - self.tensors


def sized(plan: Plan) -> Sized:
    """What a plan writes."""
    shards = plan.target.writer(plan).shards("model").values()
    return Sized(sum(shard.size_bytes for shard in shards), sum(shard.file_bytes() for shard in shards))


class Room(NamedTuple):
    """Bytes of files."""

    fixed: int
    """Of what is not chosen for, and of headers."""
    most: int | None
    """Of all; None: as many as it takes."""

    @classmethod
    def of(cls, plan: Plan, budget: Budget, units: Sequence[Unit]) -> "Room":
        """Raises BadRequest for a limit that cannot be kept, and for one that the original keeps."""
        now = sized(plan)
        fixed = now.files - sum(size_of(plan, w, plan.schemes[w]) for unit in units for w in unit.weights)
        most = _most(plan, budget, now)
        least = fixed + sum(min(unit.options.values()) for unit in units)
        was = sum(entry.size_bytes for entry in plan.checkpoint.original.entries.values()) + now.beside
        if most is not None and most < least:
            raise BadRequest(
                f"{budget.description}: at most {size(most)}, and the smallest mix takes {size(least)}; give more, "
                "or name smaller grids with --candidates"
            )
        if most is not None and most >= was:
            raise BadRequest(
                f"{budget.description}: up to {size(most)}, and the original takes {size(was)}: there is nothing to "
                "quantize"
            )
        return cls(fixed, most)


def _most(plan: Plan, budget: Budget, now: Sized) -> int | None:
    if budget.bits is not None:
        return int(budget.bits * parameters_of(plan) / 8) + now.beside
    if budget.fit is not None:
        return _within(plan.checkpoint, budget, engine_of(plan)) + now.beside
    return budget.size


def _within(checkpoint: Checkpoint, budget: Budget, engine: str) -> int:
    """Bytes of tensors that leave room for the rest in memory. Raises BadRequest where nothing is left."""
    if engine not in ACCOUNTINGS:
        raise BadRequest(f"what {engine} takes of memory is not known, for --fit; known: {', '.join(ACCOUNTINGS)}")
    settings = ModelConfig(checkpoint.config)
    longest = settings.number("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len") or CONTEXT
    context = budget.context or min(CONTEXT, longest)
    device = unlisted(budget.fit or 0)
    model = MemoryModel(Weights(0, 0, 0), layers_of(checkpoint.config), settings, accounting_of(engine), device)
    taken, room = model.memory(Load(context, 1, TYPES["16 bits"])).total, model.budget or 0
    if room <= taken:
        raise BadRequest(
            f"of {size(budget.fit or 0)} {engine} may take {size(room)}, and all but the weights takes {size(taken)} "
            f"with a context of {context}; give more, or a smaller --context"
        )
    return room - taken
