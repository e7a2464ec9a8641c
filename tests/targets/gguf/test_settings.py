"""What config.json leaves out is what Transformers makes of it."""

import subprocess
import sys
from typing import Any

import pytest
import transformers

from halfbyte.errors import BadCheckpoint
from halfbyte.targets.gguf.families import FAMILIES, family_of
from halfbyte.targets.gguf.hyperparameters import metadata
from halfbyte.targets.gguf.settings import DEFAULTS, SIZES, from_table, from_transformers

SMALL = dict.fromkeys(SIZES, 64) | {"num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CHANGES = {
    "nothing": {},
    "as published before": {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float16"},
    "whole base": {"rope_theta": 1000000},
    "llama 3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "as saved now": {"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}},
    "both": {"rope_theta": 3e4, "rope_parameters": {"rope_theta": 2e4, "rope_type": "linear", "factor": 4.0}},
    "no groups": {"num_key_value_heads": None},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 2},
    "even heads": {"head_dim": None},
    "full attention": {"layer_types": ["full_attention", "full_attention"], "sliding_window": 8},
}


def read(config: dict) -> list[dict]:
    """What a GGUF depends on, from our table and from Transformers."""
    found: tuple[Any, Any] = from_table(config), from_transformers(config)
    names = {*DEFAULTS[config["model_type"]], *SIZES, *FAMILIES[config["model_type"]].assumed} - {"rope_theta"}
    return [{name: getattr(s, name, None) for name in names} | {"rope": s.rope_parameters} for s in found]


def is_left_to_transformers(kind: str, changes: dict) -> bool:
    """It knows what None means where there is a number otherwise."""
    return any(value is None and DEFAULTS[kind].get(name) is not None for name, value in changes.items())


KINDS = [(kind, name) for kind in DEFAULTS for name in CHANGES]
LEFT = [(kind, name) for kind, name in KINDS if is_left_to_transformers(kind, CHANGES[name])]


@pytest.mark.parametrize(("kind", "name"), LEFT)
def test_what_only_transformers_knows_is_left_to_it(kind, name):
    assert from_table({"model_type": kind, **SMALL, **CHANGES[name]}) is None


@pytest.mark.parametrize(("kind", "name"), [pair for pair in KINDS if pair not in LEFT])
def test_it_is_read_as_transformers_reads_it(kind, name):
    config = {"model_type": kind, **SMALL, **CHANGES[name]}
    ours, theirs = read(config)
    assert ours | {"head_dim": None} == theirs | {"head_dim": None}
    assert (ours["head_dim"] or 16) == (theirs["head_dim"] or 16)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_default_is_that_of_transformers(kind):
    theirs = transformers.AutoConfig.for_model(kind)
    whole = {name: getattr(theirs, name) for name in SIZES}
    ours = from_table({"model_type": kind, **whole})
    assert ours is not None
    for name in DEFAULTS[kind].keys() - {"rope_theta", "head_dim", "num_key_value_heads"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_parameters == theirs.rope_parameters
    assert (ours.head_dim or ours.hidden_size // ours.num_attention_heads) == (getattr(theirs, "head_dim", None) or 128)
    assert ours.num_key_value_heads == theirs.num_key_value_heads


@pytest.mark.parametrize("kind", DEFAULTS)
def test_the_file_says_the_same_whoever_read_the_config(kind, tmp_path, monkeypatch):
    config = {"model_type": kind, **SMALL, "rope_theta": 5e5}
    ours = metadata(config, family_of(config), tmp_path)
    monkeypatch.setattr("halfbyte.targets.gguf.settings.from_table", lambda _: None)
    assert ours == metadata(config, family_of(config), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"num_key_value_heads": "two"},
        {"rms_norm_eps": "tiny"},
        {"tie_word_embeddings": 1},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}},
        {"rope_parameters": "default"},
        {"rope_theta": None},
        {"head_dim": 15},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"model_type": "gemma3_text"},
    ],
)
def test_what_is_uncommon_is_left_to_transformers(changes):
    assert from_table({"model_type": "llama", **SMALL, **changes}) is None


def test_a_config_that_transformers_refuses_is_refused():
    with pytest.raises(BadCheckpoint, match="cannot read the config of 'llama'"):
        family_of({"model_type": "llama", **SMALL, "hidden_size": "wide"})


def test_a_common_model_needs_no_transformers():
    code = f"""
import sys
from typing import Any
from halfbyte.targets.gguf.families import family_of
family_of({dict(SMALL, model_type="llama")!r})
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
