"""Licence, base model and name of a source go on to what is made of it."""

from pathlib import Path

import pytest

import tiny
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.provenance import Provenance, provenance_of

CARD = """---
license: other
license_name: gemma
license_link: https://ai.google.dev/gemma/terms
base_model: org/base-7B
tags:
- chat
language: [en, de]
---

# A model
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.make(tmp_path / "Made-Model-2M")


def test_the_card_says_it(model):
    (model / "README.md").write_text(CARD)
    assert provenance_of(Checkpoint.open(model), str(model)) == Provenance(
        "Made-Model-2M",
        None,
        "other",
        "gemma",
        "https://ai.google.dev/gemma/terms",
        ("org/base-7B",),
        ("chat",),
        ("en", "de"),
    )


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# no YAML\n",
        "---\nlicense: [\n---\n",
        "---\n- license\n---\n",
        f"---\n{'[' * 60000}\n---\n",
        "---\nlicense: 3\nbase_model: /home/me/model\n---\n",
    ],
    ids=range(6),
)
def test_a_card_that_says_nothing_is_none(card, model):
    (model / "README.md").write_text(card)
    assert provenance_of(Checkpoint.open(model), str(model)) == Provenance("Made-Model-2M")


def test_a_repository_is_known_by_what_was_asked_and_by_the_hubs_cache(model, tmp_path):
    assert provenance_of(Checkpoint.open(model), "org/Model-2M@main").repository == "org/Model-2M"
    cached = tmp_path / "models--org--Model-2M" / "snapshots" / "0123abcd"
    cached.parent.mkdir(parents=True)
    model.rename(cached)
    found = provenance_of(Checkpoint.open(cached), str(cached))
    assert (found.name, found.repository, found.made_of) == ("Model-2M", "org/Model-2M", ("org/Model-2M",))


def test_without_a_repository_what_is_behind_the_source_is_known(model):
    (model / "README.md").write_text(CARD)
    assert provenance_of(Checkpoint.open(model), str(model)).made_of == ("org/base-7B",)
