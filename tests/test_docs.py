"""Each command that README, docs and help show is run, and prints what the page says it prints; each method, grid and
container has its page, each command its schema; and the site is built without a warning."""

import re
import subprocess
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature

import pytest
from pydantic import TypeAdapter

import documented
from documented import Command
from halfbyte import api, registry, words
from halfbyte.recipe import PARTS

pytest.importorskip("mkdocs", reason="pip install 'halfbyte[docs]'")
spec = spec_from_file_location("hooks", documented.ROOT / "docs" / "hooks.py")
assert spec
assert spec.loader
hooks = module_from_spec(spec)
spec.loader.exec_module(hooks)

RUN = [(page.relative_to(documented.ROOT).as_posix(), documented.commands(page)) for page in documented.PAGES]
RUN = [(name, found) for name, found in RUN if found]


done: set[str] = set()


@pytest.mark.slow
@pytest.mark.parametrize(("page", "found"), RUN, ids=[name for name, _ in RUN])
def test_commands_of_a_page(page: str, found: list[Command], tmp_path):
    with documented.stage(tmp_path, found):
        for command in found:
            if command.words[0] == "halfbyte" and command.words[1:] and not command.words[1].startswith("-"):
                documented.require_known(command.words[1:])
            if command.why_not_run or (command.line in done and not command.shown):
                continue
            assert command.words[0] == "halfbyte", f"whether to run {command.line} is not said"
            code, printed = documented.play(command)
            assert code == 0, f"{command.line}\n{printed}"
            wrong = documented.differs(command.shown, printed) if command.shown else ""
            assert not wrong, f"{command.line}\n{wrong}\nif it is right, python tests/documented.py --write {page}"
            done.add(command.line)


@pytest.mark.slow
def test_examples_of_the_help_print_what_their_schema_says(tmp_path):
    print_json = {name for name, command in documented.COMMANDS.items() if "as_json" in signature(command).parameters}
    assert hooks.TYPES_OF_JSON.keys() == print_json
    found = documented.examples()
    with documented.stage(tmp_path, found):
        for command in found:
            documented.require_known(command.words[1:])
            if command.why_not_run is None:
                code, printed = documented.play(command, "--json")
                assert code == 0, f"{command.line}\n{printed}"
                TypeAdapter(hooks.type_of(command.words[1])).validate_json(printed)


def test_commands_within_sentences_are_known():
    found = [command for page in documented.PAGES for command in documented.spans(page)]
    assert len(found) > 10
    for command in found:
        name, *rest = command.words[1:]
        if name != "COMMAND" and not name.startswith("-"):
            assert name in documented.COMMANDS, command
            if rest and not rest[0].startswith("-"):  # else it is named, not shown
                documented.require_known([name, *rest])


def test_reasons_are_of_commands_that_are_there():
    shown = [c for page in documented.PAGES for c in documented.commands(page)] + documented.examples()
    assert {*documented.NOT_RUN} <= {name for command in shown for name in command.names}


def test_what_is_shown_is_compared():
    printed = "a 1.00 s\n─────\n0.0123 name\nlast 7\n"
    assert not documented.differs("a 9.5 s\n───\n0.0124 name\nlast 7", printed)
    assert not documented.differs("a 9.5 s\n...\nlast 7", printed)
    assert not documented.differs("a 9.5 s\n...", printed)
    for wrong in ("a 1 s", "a 1 s ─ 0.0190 name last 7", "a 1 s ─ 0.0123 names last 7", "a 1 s\n...\nlast 8 9"):
        assert documented.differs(wrong, printed)


def pages(folder: str) -> dict[str, str]:
    found = (documented.ROOT / "docs" / folder).glob("*.md")
    return {path.stem: path.read_text() for path in found if path.stem not in ("index", "tried")}


@pytest.mark.parametrize(
    ("folder", "names"),
    [("methods", {*PARTS}), ("containers", {*words.CONTAINERS, *registry.READ_ONLY, *words.PLAIN})],
)
def test_each_has_a_page(folder, names):
    found = pages(folder)
    assert found.keys() == names
    for text in found.values():
        assert all(part in text for part in ("**What.**", "**When.**", "**Source.**"))


def test_each_grid_is_on_one_page():
    families = {name: re.search(r"^grids: (\[.*\])$", text, re.MULTILINE) for name, text in pages("grids").items()}
    told = [grid for found in families.values() if found for grid in hooks.names_of(hooks.yaml.safe_load(found[1]))]
    assert Counter(told) == Counter(words.GRIDS)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=documented.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html"))
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=.?https?:", site)
    for name in (*PARTS, *words.GRIDS, *words.SCHEMES, *words.PRESETS, *words.CONTAINERS, *documented.COMMANDS):
        assert f"{name}</code>" in site, name
    reference = (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
    assert [name for name in api.__all__ if f'id="halfbyte.api.{name}"' not in reference] == []
    assert (tmp_path / "reference" / "schemas" / "quantize.json").exists()
