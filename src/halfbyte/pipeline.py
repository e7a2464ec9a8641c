"""quantize(): plan, walk, transform, solve, write, verify, report."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import xxhash

from halfbyte.arguments import Converting, Dequantizing, Running, documented
from halfbyte.budget.budget import Budget
from halfbyte.containers.folder import OutputFolder, Shard, check_output_path, kept_on_interrupt
from halfbyte.containers.place import is_file
from halfbyte.devices import release, title
from halfbyte.errors import BadRequest, BrokenOutput, plural
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.models import calibrate
from halfbyte.models.calibrate import Samples
from halfbyte.models.placement import CPU, Placement
from halfbyte.models.stamp import digest as digest_of
from halfbyte.models.stamp import stamp
from halfbyte.models.weight import Weight
from halfbyte.plan import decoding, resolve, transcoding
from halfbyte.progress import TAKING, Progress, shown, silent
from halfbyte.recipe import OTHER_COMMANDS, Recipe
from halfbyte.registry import IMPORTANCE
from halfbyte.report import build
from halfbyte.report.card import card
from halfbyte.report.summary import in_words
from halfbyte.report.types import BudgetReport, CacheReport, Devices, Planned, Report, Resources
from halfbyte.report.types import Plan as PlanReport
from halfbyte.report.written import as_json, report_of
from halfbyte.run import Run, digest
from halfbyte.sizing import run as sizing
from halfbyte.sizing.run import Meter
from halfbyte.solvers import SOLVERS
from halfbyte.solvers.statistics import Diagonal
from halfbyte.streaming import size_of, stream, workers
from halfbyte.targets.plan import Plan
from halfbyte.targets.table import UNQUANTIZED, file_target, output_path
from halfbyte.targets.target import CheckpointWriter
from halfbyte.words import dtype_in_name, grid_in_name

if TYPE_CHECKING:
    from halfbyte.budget.mix import Mixed

Some = TypeVar("Some", bound=Planned)


def quantize(
    recipe: Recipe,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = silent,
    device: torch.device = CPU,
    samples: Samples | None = None,
    budget: BudgetReport | None = None,
) -> Report:
    """Quantize a checkpoint into the folder `out` and return the report that is also written there. `samples` are those
    of the recipe's calibration, where they are drawn already; `budget` is what chose the recipe's grids.

    Raises HalfbyteError, with nothing half-written left behind. A run that is killed is taken up again by the same
    call.
    """
    meter = Meter(device)
    out = Path(out).expanduser()
    plan = _planned(recipe, out)
    output = _Output.of(plan, out, overwrite, meter, progress)
    importance = _importance(plan, device)
    if not plan.calibrated:
        samples = None
    elif samples is None:
        samples = calibrate.calibration(plan.checkpoint, plan.recipe.calibration)

    def solve(run: Run) -> None:
        if rotation := plan.checkpoint.rotation:
            run.progress("finding and proving the rotation of hidden states", 0, 1)
            rotation.prove()
        if samples is None:
            solver = SOLVERS[plan.method.solver]
            stream(
                run,
                plan.fused_groups,
                plan.unquantized,
                lambda weight: plan.checkpoint.read_weight(weight).to(device),
                lambda weight, w, scheme: solver(w, scheme.weight, importance.get(weight)),
            )
        else:
            from halfbyte import blockwise  # Transformers takes seconds to import, and only calibration needs the model

            blockwise.quantize(run, samples)

    return output.written(solve, progress, samples, budget)


def _planned(recipe: Recipe, out: Path) -> Plan:
    """What a recipe means for an output that is called so: a file's name may say what it is, and what it holds."""
    recipe, named_grid = _named(recipe, out), grid_in_name(out)
    if named_grid and "grid" not in recipe.model_fields_set:
        recipe = recipe.model_copy(update={"grid": named_grid})
    plan = resolve(recipe)
    if named_grid and named_grid not in (plan.label, plan.recipe.grid.upper()):
        return replace(
            plan, warnings=(*plan.warnings, f"{out.name} is called {named_grid}, and most of it is {plan.label}")
        )
    return plan


def _named(recipe: Recipe, out: Path) -> Recipe:
    """With the form of output that a name says."""
    named = file_target(out)
    if named and not recipe.to and recipe.engine in (None, "none"):
        return recipe.model_copy(update={"to": named.name})
    return recipe


def within(
    budget: Budget,
    recipe: Recipe,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = silent,
    device: torch.device = CPU,
) -> "Mixed":
    """The recipe with the grids that suit a budget best, for an output that is called so, and the file in which what
    each weight costs is kept. Raises HalfbyteError."""
    from halfbyte.budget import mix  # needs the model's code
    from halfbyte.budget.units import based

    out = Path(out).expanduser()
    recipe = _named(recipe, out)
    plan(based(recipe, budget.candidates), out, overwrite)  # what is in the way is seen before hours of work
    scratch = out.parent if out.parent.is_dir() else None
    return mix.mixed(recipe, budget, out, Placement.on(device, scratch), progress)


def plan(
    recipe: Recipe,
    out: str | Path,
    overwrite: bool = False,
    budget: BudgetReport | None = None,
    device: torch.device = CPU,
) -> PlanReport:
    """What `quantize` would do; nothing is written and no weight is read. Raises what `quantize` would."""
    if recipe.method in OTHER_COMMANDS:
        raise BadRequest(f"a recipe of {recipe.method} has no plan before the values are read; plan those of quantize")
    out = Path(out).expanduser()
    plan = _planned(recipe, out)
    _claim(out, plan, overwrite)
    writer = plan.target.writer(plan)
    shards = writer.shards(_stem_of(out))
    size_bytes = sum(shard.size_bytes for shard in shards.values())
    takes = sizing.resources(plan, shards, device, output_path(out).final.parent)
    planned = build.planned(plan, size_bytes, writer.entry_file(_stem_of(out)), list(shards), takes)
    return _with_budget(planned, budget)


@documented(Converting, Recipe, Running)
def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    grid: str | None = None,
    engine: str | None = None,
    overwrite: bool = False,
    progress: Progress | bool = False,
) -> Report:
    """Move `source`, a quantized checkpoint, into `out` in another container: bit for bit where that holds the same
    grid, else by rounding again; returns the report.

    The report's errors are those against the quantized source: 0 where nothing was rounded.

    Args:
        {arguments}

    Raises:
        HalfbyteError: with nothing half-written left behind.
    """
    meter = Meter(CPU)
    plan = transcoding(str(source), to, grid, engine)
    out = Path(out).expanduser()

    def transcode(_: Weight, q: Quantized, scheme: Scheme) -> Quantized:
        for near in plan.target.casts(q):
            if near.scheme == scheme:
                return near
        return SOLVERS["nearest"](q.decode(), scheme.weight, None)._replace(
            activations=q.activations if q.scheme.activations == scheme.activations else None
        )

    def solve(run: Run) -> None:
        read = plan.checkpoint.read_quantized
        stream(
            run, [[weight] for weight in plan.schemes], plan.unquantized, lambda weight: read(weight.name), transcode
        )

    with shown(progress) as show:
        return _Output.of(plan, out, overwrite, meter, show).written(solve, show)


@documented(
    Dequantizing,
    Recipe,
    Running,
    dtype="By default what the name of a GGUF ends with, such as F16, or what the checkpoint says.",
)
def dequantize(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    dtype: str | None = None,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | bool = False,
) -> Report:
    """Write `source`, a quantized checkpoint, in 16 bits, with its tokenizer, template and config: a folder of
    safetensors, or a GGUF if `out` is called so; returns the report.

    Args:
        {arguments}

    Raises:
        HalfbyteError: with nothing half-written left behind.
    """
    meter = Meter(CPU)
    out = Path(out).expanduser()
    named = file_target(out)
    to = to or (named.name if named else next(iter(UNQUANTIZED)))
    named_grid = grid_in_name(out)
    plan = decoding(str(source), to, dtype or dtype_in_name(out), str(adapter) if adapter else None)
    if named_grid and named_grid != plan.label:
        raise BadRequest(
            f"{out} is called {named_grid}, and would be {plan.label}; call it so, or give the --dtype that is meant"
        )

    def solve(run: Run) -> None:
        nearest = SOLVERS["nearest"]
        stream(
            run,
            [],
            plan.unquantized,
            plan.checkpoint.read_weight,
            lambda weight, w, scheme: nearest(w, scheme.weight, None),
        )

    with shown(progress) as show:
        return _Output.of(plan, out, overwrite, meter, show).written(solve, show)


class _Output(NamedTuple):
    """A plan's output, before a weight is read: nothing is in its way, and what its run takes is there."""

    plan: Plan
    path: Path
    overwrite: bool
    writer: CheckpointWriter
    shards: dict[str, Shard]
    takes: Resources
    meter: Meter

    @classmethod
    def of(cls, plan: Plan, path: Path, overwrite: bool, meter: Meter, progress: Progress) -> "_Output":
        """Raises HalfbyteError."""
        _claim(path, plan, overwrite)
        writer = plan.target.writer(plan)
        shards = writer.shards(_stem_of(path))
        return cls(plan, path, overwrite, writer, shards, _required(plan, shards, path, meter, progress), meter)

    def written(
        self,
        solve: Callable[[Run], None],
        progress: Progress,
        samples: Samples | None = None,
        budget: BudgetReport | None = None,
    ) -> Report:
        """Whole or not there: `solve` gives a run all its weights. One that was written before, alike, stays."""
        same = identity(self.plan, samples, self.meter.device)
        folder = OutputFolder(output_path(self.path), self.shards, same, self.overwrite)
        if folder.is_published:
            return report_of(self.path)
        with kept_on_interrupt(folder):
            run = Run(
                self.plan,
                self.writer,
                folder,
                progress,
                samples=samples,
                device=self.meter.device,
                planned=self.takes,
                meter=self.meter,
            )
            solve(run)
            report = _finish(run, budget)
            folder.publish()
        return report


def _required(plan: Plan, shards: Mapping[str, Shard], out: Path, meter: Meter, progress: Progress) -> Resources:
    """What the run will take, said. Raises BadRequest where that is not there."""
    place = output_path(out)
    takes = sizing.resources(plan, shards, meter.device, place.final.parent, meter.peak_bytes or 0, meter.started)
    sizing.require(takes, plan, meter.device, place)
    progress(f"{TAKING} {in_words(takes)}", 0, 1)
    return takes


def _claim(out: Path, plan: Plan, overwrite: bool) -> None:
    """Refuse an output that is in the way, or is called like a file and is none."""
    named, target = file_target(out), plan.target
    if named and named.file_suffix != target.file_suffix:
        raise BadRequest(
            f"{target.name} needs a folder, and {out} is called like a file; name it without {out.suffix}, or write "
            f"one file with --to {named.name}"
        )
    if named and plan.recipe.shard_gb:
        raise BadRequest(
            f"parts of a {target.title} need a folder, and {out} is called like a file; name it without "
            f"{out.suffix}, or leave out --shard-gb"
        )
    check_output_path(
        output_path(out), plan.checkpoint.path, overwrite, {entry.path for entry in plan.checkpoint.entries.values()}
    )


def _importance(plan: Plan, device: torch.device) -> dict[Weight, Diagonal]:
    """What an importance matrix says of each weight, where one was given."""
    if plan.recipe.imatrix is None:
        return {}
    importance = import_module(IMPORTANCE)  # needs the model's code, as calibration does
    means = importance.read(Path(plan.recipe.imatrix).expanduser(), plan.checkpoint, plan.schemes)
    return {weight: Diagonal(mean.to(device)) for weight, mean in means.items()}


def _stem_of(out: Path) -> str:
    """The output's own name, after which files in it are called."""
    return out.resolve().stem if is_file(out) else out.resolve().name


def identity(plan: Plan, samples: Samples | None, device: torch.device = CPU) -> str:
    """Two runs with the same identity write the same bytes, as far as a file whose size and time are the same has not
    changed.

    They depend on the device too and, with calibration, on the number of threads: factors of Hessians and sums over
    many values differ in their last bits.
    """
    imatrix = plan.recipe.imatrix and digest_of(Path(plan.recipe.imatrix).expanduser())
    adapter = plan.checkpoint.adapter and plan.checkpoint.adapter.digest
    calibration = samples and (samples.digest, torch.get_num_threads())
    return xxhash.xxh3_128_hexdigest(
        repr((plan.recipe.digest, stamp(plan.checkpoint), adapter, imatrix, calibration, title(device))).encode()
    )


def _finish(run: Run, budget: BudgetReport | None = None) -> Report:
    """Small files, the check of what was written, and the report."""
    release(CPU)  # what reads again needs room of its own
    folder = run.folder.partial
    for part in run.checkpoint_writer.extra():
        run.folder.write(*part)
    cache = _cache(run)
    with ThreadPoolExecutor(1) as disk:  # until it has every byte, what was written can be read already
        sealed = disk.submit(run.folder.seal)
        run.checkpoint_writer.write_sidecars(folder)
        verify(run)
        sealed.result()
    size_bytes = sum(shard.size_bytes for shard in run.folder.shards.values())
    file, seconds = run.checkpoint_writer.entry_file(_stem_of(run.folder.target)), run.meter.seconds
    device = title(run.device)
    devices = Devices(solve=device, calibration=device if run.samples or cache else None)
    resources = run.planned, run.meter.read(folder, run.spilled_bytes)
    report = _with_budget(
        build.report(run.plan, run.rows, run.folds, run.samples, cache, size_bytes, file, seconds, devices, resources),
        budget,
    )
    report = report.model_copy(update={"polish": run.polished}) if run.polished else report
    texts = {
        "recipe.yaml": run.plan.recipe.dump(),
        "report.json": as_json(report),
        "README.md": card(report, run.folder.target),
    }
    for name, text in texts.items():
        run.folder.companion(name).write_text(text, encoding="utf-8", newline="\n")
    return report


def _with_budget(report: Some, budget: BudgetReport | None) -> Some:
    return report.model_copy(update={"budget": budget}) if budget else report


def _cache(run: Run) -> CacheReport | None:
    """Scales of the KV cache, where there are some."""
    if not run.plan.scales:
        return None
    from halfbyte import kv_cache  # needs the model's code

    return kv_cache.complete(run)


def verify(run: Run) -> None:
    """Open what was written as any reader would, decode it, and compare it with what the solver returned."""
    entries = run.checkpoint_writer.reopen(run.folder.partial)
    schemes = {w.name: (w, s) for w, s in run.plan.schemes.items()}
    if lost := [n for n in (*run.plan.unquantized, *schemes) if n not in run.digests]:
        raise BrokenOutput(
            f"{plural(len(lost), 'tensor of the source is', 'tensors of the source are')} in no part of the output, "
            f"the first '{lost[0]}'"
        )

    def read_again(name: str) -> list[str]:
        if name not in schemes:
            return [digest(run.checkpoint_writer.read_unquantized(entries, name))]
        weight, scheme = schemes[name]
        chunks = run.row_chunks(weight) if len(run.digests[name]) > 1 else [weight]
        return [digest(run.checkpoint_writer.unpack(entries, chunk, scheme)) for chunk in chunks]

    with workers(max(map(size_of, run.plan.fused_groups), default=1)) as pool:
        for number, (name, again) in enumerate(zip(run.digests, pool.map(read_again, run.digests), strict=True)):
            run.progress("checking what was written", number, len(run.digests))
            if again != run.digests[name]:
                raise BrokenOutput(
                    f"'{name}' reads back as something else than was written; the disk or {run.plan.target.name}'s "
                    "reader is broken"
                )
