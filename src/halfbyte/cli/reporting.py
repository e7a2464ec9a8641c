"""Commands that say what is known of outputs, and hand it on."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte import display
from halfbyte.arguments import Comparing, Publishing, sentence
from halfbyte.cli.options import Json, Overwrite, Quiet, option, require_located
from halfbyte.cli.output import out, print_json, show
from halfbyte.errors import plural
from halfbyte.report.summary import size
from halfbyte.sizing.question import of_words, question


def compare(
    a: Annotated[str, typer.Argument(help="A checkpoint.")],
    b: Annotated[str, typer.Argument(help="Another version of the same model.")],
    values: Annotated[bool, option(Comparing, "values")] = True,
    worst: Annotated[int, typer.Option(min=0, help="How many tensors to list.")] = 10,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Two runs or checkpoints side by side: tensors, bytes, errors, losses.

    halfbyte compare model-int4 model-Q4_K_M.gguf
    """
    require_located(a, b)
    from halfbyte.api import compare as run

    comparison = run(a, b, values, progress=not (quiet or as_json))
    if as_json:
        print_json(comparison)
        return
    show(display.compared(comparison, worst))


def inspect(
    path: Annotated[str, typer.Argument(help="Any checkpoint.")],
    worst: Annotated[int, typer.Option(min=0, help="How many weights to list.")] = 10,
    as_json: Json = False,
) -> None:
    """Tensors, grids, bits per weight, sizes, and which weights lost most.

    halfbyte inspect model-Q4_K_M.gguf
    """
    require_located(path)
    from halfbyte.report.inspect import inspect as run  # of itself, as the head of a GGUF needs no torch

    inspection = run(path)
    if as_json:
        print_json(inspection)
        return
    show(display.inspected(inspection, worst))
    if inspection.evaluation:
        model, was = inspection.evaluation.model, inspection.evaluation.reference.perplexity
        kl = display.with_error(model.kl, model.kl_error, 5)
        out.print(f"KL to the original {kl}, perplexity {model.perplexity:.3f} (was {was:.3f})")


def report(
    runs: Annotated[list[str], typer.Argument(help="Outputs of quantize: folders, or .gguf files.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    meant_for: Annotated[
        str | None,
        typer.Option("--for", help="ENGINE or ENGINE@DEVICE that the page's plan is for.", show_default="what is here"),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Show any number of runs on one page, which needs no network: size against loss, and where each lost it.

    halfbyte report model-int4 model-Q4_K_M.gguf -o report.html
    """
    engine, device = of_words(meant_for) if meant_for else (None, None)
    question(engine, device)  # wrong words need not wait for torch
    from halfbyte.api import page as run
    from halfbyte.report.types import Page

    run(runs, output, overwrite, device, engine)
    written = output.expanduser().stat().st_size
    if as_json:
        print_json(Page(path=str(output), runs=runs, size_bytes=written))
    elif not quiet:
        out.print(f"{output}: {plural(len(runs), 'run')} on one page, {size(written)}")


def push(
    path: Annotated[str, typer.Argument(help="An output of quantize: a folder, or a .gguf file.")],
    repository: Annotated[str, typer.Argument(help=sentence("repository", Publishing))],
    private: Annotated[bool, option(Publishing, "private", "--private")] = False,
    as_json: Json = False,
) -> None:
    """Upload an output to the hub: its files, and a card whose commands name the repository.

    halfbyte push model-int4 me/model-int4
    """
    from halfbyte.api import push as run
    from halfbyte.report.types import Upload

    place = run(path, repository, private)
    if as_json:
        print_json(Upload(path=path, repository=repository, url=place))
    else:
        out.print(f"{path}: uploaded to {place}", soft_wrap=True)
