"""An output on the hub: its files, and a card whose commands name the repository."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.arguments import Publishing, documented
from halfbyte.containers.place import BESIDE, beside, is_file
from halfbyte.errors import BadRequest, brief
from halfbyte.files import is_within
from halfbyte.recipe import Recipe
from halfbyte.report.card import card, local_paths, without_paths
from halfbyte.report.picture import add_picture
from halfbyte.report.types import Report
from halfbyte.report.written import as_json, report_of


@documented(Publishing)
def push(output: str | Path, repository: str, private: bool = False) -> str:
    """Upload an `output`, a folder or a file with what lies beside it; returns the address of the repository, which is
    made if it is not there.

    Args:
        {arguments}

    Raises:
        HalfbyteError: BadCheckpoint for what has no report of ours, BadRequest where the hub does not take it.
    """
    output = Path(output).expanduser()
    report = public(report_of(output), output, repository)
    picture = add_picture(report, output)
    texts = {
        beside(output, "report.json").name: as_json(report),
        beside(output, "recipe.yaml").name: report.recipe.dump(),
        "README.md": card(report, output, picture),
    }
    files: dict[str, Path | bytes] = {**output_files(output), **{name: text.encode() for name, text in texts.items()}}
    return _upload(files, repository, private, f"{report.output.grid or report.recipe.grid}, made with halfbyte")


def public(report: Report, output: Path, repository: str) -> Report:
    """The report as it is published: in a repository, and without this machine's paths."""
    recipe = Recipe.of(**{**report.recipe.model_dump(exclude_unset=True), "repository": repository})
    named = report.model_copy(update={"recipe": recipe})
    return Report.model_validate(without_paths(named.as_dict(), local_paths(named, output)))


def output_files(output: Path) -> dict[str, Path]:
    """The files of an output, by their names in a repository."""
    if is_file(output):
        near = [path for name in BESIDE if name != "README.md" and (path := beside(output, name)).exists()]
        files, home = {path.name: path for path in (output, *near)}, output.parent
    else:
        files = {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()}
        home = output
    if strange := next((path for path in files.values() if not is_within(path, home)), None):
        raise BadRequest(f"{strange} is a link to something outside of {home}, which is not uploaded; remove it")
    return files


def _upload(files: dict[str, Path | bytes], repository: str, private: bool, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise BadRequest("the hub asks for a token, and there is none; hf auth login keeps one, or set HF_TOKEN")
    added = [CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()]
    with _refused(repository):
        api = HfApi()
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.create_commit(repository, added, commit_message=message)
    return str(address)


@contextmanager
def _refused(repository: str) -> Iterator[None]:
    """What the hub, or the way there, says against it, in a line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise BadRequest(
            f"{repository} was not uploaded: {lines[0] if lines else brief(error)}; look at the network, the token's "
            "rights and the name"
        ) from None
