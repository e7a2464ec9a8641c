"""Tasks of lm-eval, which are its own to define: prompts, shots, filters and scores. What is ours is the model, any
checkpoint that we can read, and the comparison item by item."""

import io
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch

from halfbyte.errors import BadRequest, UnknownName
from halfbyte.evaluation.paired import paired
from halfbyte.evaluation.whole import dtype_for, model_of
from halfbyte.models import calibrate, chats
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.progress import Progress, silent

BATCH = 16
LONGEST = 4096
"""Tokens of a prompt and its answer, where the model could read more: what lm-eval makes room for."""
Scores = dict[tuple[str, str], dict[tuple[str, int], float]]
"""By metric and filter, and by the task (of a group, its parts) and the number of the item."""


@dataclass(frozen=True)
class Asked:
    """What is asked of lm-eval."""

    names: Sequence[str]
    folder: Path | None = None
    """With tasks of the user's own, as YAML."""
    limit: int | None = None
    """Items of each task."""
    shots: int | None = None
    """Examples before each item; None: as the task says."""
    as_chat: bool = False
    """Whether items are put as chats, through the model's template."""
    runs_code: bool = False
    """Whether code that a model writes may be executed on this machine."""


def require_installed() -> None:
    """Raises BadRequest where there is no lm-eval."""
    if find_spec("lm_eval") is None:
        raise BadRequest("tasks are those of lm-eval, which is not installed: pip install 'halfbyte[tasks]'")


def measure(
    checkpoints: Sequence[Checkpoint],
    asked: Asked,
    device: torch.device,
    progress: Progress = silent,
    shows: bool = False,
) -> tuple[list[list[dict[str, Any]]], torch.dtype, str]:
    """A row for each task and score, of each model but the first, which is the original; the dtype that they computed
    in, and lm-eval's version. `shows`: whether lm-eval draws its own bars."""
    require_installed()
    import lm_eval  # pyright: ignore[reportMissingImports] (an extra)

    dtype, scores = dtype_for(checkpoints[0], device), []
    tokenizer = calibrate.tokenizer_of(checkpoints[0])
    if asked.as_chat and chats.template_of(tokenizer) is None:
        raise BadRequest(f"the tokenizer of {checkpoints[0].path} has no chat template to put tasks as chats with")
    with _talking(shows):
        tasks = _tasks(asked)
        for number, checkpoint in enumerate(checkpoints):
            progress(f"lm-eval: {checkpoint.path.name}", number, len(checkpoints))
            scores.append(_scores(checkpoint, tokenizer, asked, tasks, dtype, device))
    return [_rows(scores[0], candidate) for candidate in scores[1:]], dtype, lm_eval.__version__


@contextmanager
def _talking(shows: bool) -> Iterator[None]:
    """What lm-eval says on its way is no result."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            redirect_stdout(io.StringIO()),
            nullcontext() if shows and sys.stderr.isatty() else redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _tasks(asked: Asked) -> Any:
    """lm-eval's table of tasks, with the user's own. Raises BadRequest for names that are not in it."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] (an extra)

    if asked.folder is not None and not asked.folder.is_dir():
        raise BadRequest(f"{asked.folder} is no folder of tasks (YAML files of lm-eval)")
    with _refusing("the tasks"):
        if asked.folder is not None:
            user_tasks = TaskManager(include_path=str(asked.folder), include_defaults=False)
            if set(asked.names) <= set(user_tasks.all_tasks):  # lm-eval's own are 10,000 files to look through
                return user_tasks
        manager = TaskManager(include_path=str(asked.folder) if asked.folder else None)
    for name in asked.names:
        if name not in manager.all_tasks:
            raise UnknownName("task of lm-eval", name, manager.all_tasks)
    return manager


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """What lm-eval and datasets raise for tasks whose data cannot be had becomes one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, ImportError, AssertionError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRequest(f"lm-eval cannot run {what}: {reason[:300]}") from None


def _scores(
    checkpoint: Checkpoint, tokenizer: Any, asked: Asked, tasks: Any, dtype: torch.dtype, device: torch.device
) -> dict[str, Scores]:
    """Of one model, by task."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports] (an extra)
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    evaluate, kind = cast(Any, simple_evaluate), cast(Any, HFLM)  # decorators hide what they take
    model = model_of(checkpoint, dtype, device)
    model.tie_weights = lambda *_, **__: None  # which parameters are one, the checkpoint has said already
    lm = kind(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=BATCH,
        max_length=min(LONGEST, calibrate.longest(checkpoint, LONGEST)),
    )
    scores = {}
    for name in asked.names:
        with _refusing(f"the task {name}"):
            _require_allowed(name, tasks, asked)
            result = evaluate(
                lm,
                tasks=[name],
                task_manager=tasks,
                num_fewshot=asked.shots,
                limit=asked.limit,
                apply_chat_template=asked.as_chat,
                confirm_run_unsafe_code=asked.runs_code,
                bootstrap_iters=0,
            )
        scores[name] = _by_metric(result["samples"])
        if not scores[name]:
            raise BadRequest(f"lm-eval scores no single items of the task {name}, so it cannot be compared")
    return scores


def _require_allowed(name: str, tasks: Any, asked: Asked) -> None:
    """Raises BadRequest for a task that executes what a model writes, if nobody asked for that."""
    unsafe = [task for task in tasks.load([name])["tasks"].values() if getattr(task.config, "unsafe_code", False)]
    if unsafe and not asked.runs_code:
        raise BadRequest(
            f"the task {name} executes code that the models write, on this machine and without a sandbox; to allow it, "
            "in a container, add --run-code (runs_code=True)"
        )


def _by_metric(samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> Scores:
    scores: Scores = {}
    for task, items in samples.items():
        for item in items:
            for metric in item["metrics"]:
                score = _score(item.get(metric))
                if score is not None:
                    scores.setdefault((metric, item["filter"]), {})[task, item["doc_id"]] = score
    return scores


def _score(value: Any) -> float | None:
    """Of an item: a number, or the mean of several (instructions of one prompt)."""
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(one, Real) for one in value):
        return fmean(map(float, value))
    return None


def _rows(original: dict[str, Scores], model: dict[str, Scores]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "metric": metric,
            "filter": None if chosen == "none" else chosen,
            **paired(list(before.values()), [model[name][metric, chosen][item] for item in before]),
        }
        for name, scores in original.items()
        for (metric, chosen), before in scores.items()
    ]
