"""Patterns of names: what they match, and that very many of them are matched against very many weights in no time."""

import fnmatch
import time

import pytest

from halfbyte.errors import BadRequest
from halfbyte.models.weight import Weight
from halfbyte.targets.patterns import first_match


def weight(name: str, tensor: str = "") -> Weight:
    return Weight(name, tensor or f"{name}.weight", "model.layers.0", (64, 64))


WEIGHTS = [
    weight(f"model.layers.{block}.{name}")
    for block in (0, 1, 10)
    for name in ("self_attn.q_proj", "mlp.experts.3.up_proj", "mlp.experts.13.up_proj", "mlp.a[b].x")
] + [weight("model.layers.2.experts.0.gate", "model.layers.2.experts.gate_up")]
PATTERNS = [
    *(
        "*",
        "layers.0.*",
        "*.0.*",
        "model.layers.1.mlp.experts.3.up_proj",
        "up_proj",
        "experts.?.up_proj",
        "layers.[01].*",
    ),
    *(
        "layers.[!0]*.q_proj",
        "*proj",
        "q_proj.weight",
        "experts.gate_up",
        "*.a[[]b].x",
        "experts.*",
        "layers.1*.self_attn.*",
    ),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_fnmatch_says_from_any_dot_on(pattern):
    matched = {
        w
        for w in WEIGHTS
        if any(fnmatch.fnmatchcase(name, p) for name in (w.name, w.tensor) for p in (pattern, f"*.{pattern}"))
    }
    assert matched
    assert first_match(WEIGHTS, {pattern: True}).keys() == matched


@pytest.mark.parametrize("pattern", ["layers.3.*", "LAYERS.0.*", "proj", "a[b].x", ""])
def test_a_pattern_that_matches_nothing_is_refused(pattern):
    with pytest.raises(BadRequest, match=r"matches no weight; they are called like model\.layers\.0"):
        first_match(WEIGHTS, {"*": 1, pattern: 2})


def test_the_first_that_matches_counts():
    found = first_match(WEIGHTS, {"layers.0.*": "first", "q_proj": "second", "*": "third"})
    assert [found[w] for w in WEIGHTS[:2]] == ["first", "first"]
    assert found[WEIGHTS[4]] == "second"
    assert found[WEIGHTS[5]] == "third"


def test_a_hundred_patterns_meet_58_thousand_experts_within_a_second():
    names = ("gate_proj", "up_proj", "down_proj")
    weights = [weight(f"model.layers.{b}.mlp.experts.{e}.{n}") for b in range(76) for e in range(256) for n in names]
    patterns = [
        *(f"layers.{b}.mlp.experts.*.down_proj" for b in range(60)),
        *(f"model.layers.{b}.mlp.experts.7.up_proj" for b in range(37)),
        *("*.up_proj", "layers.[67]?.*", "*"),
    ]
    assert (len(weights), len(patterns)) == (58368, 100)
    started = time.process_time()
    found = first_match(weights, {pattern: pattern for pattern in patterns})
    seconds = time.process_time() - started
    assert len(found) == len(weights)
    assert seconds < 1, f"{seconds:.2f} s"
