"""Names of grids that people write, and what they are told."""

import pytest

from halfbyte.errors import UnknownName
from halfbyte.targets.words import unknown_grid

MEANT = {
    "int4": ("int4-g128", "Q4_K_M"),
    "int8": ("int8-channel", "Q8_0"),
    "4bit": ("int4-g128", "Q4_K_M"),
    "q4": ("int4-g128", "Q4_K_M"),
    "Q4KM": ("Q4_K_M", "Q4_K_M"),
    "q6k": ("q6_k", "Q6_K"),
    "iq4": ("iq4_nl", "IQ4_NL"),
    "int4_g128": ("int4-g128", None),
    "fp8e4m3": ("fp8-e4m3-tensor", None),
}


@pytest.mark.parametrize("name", MEANT)
def test_the_sensible_name_comes_first(name):
    for ggufs, meant in enumerate(MEANT[name]):
        if meant:
            error = unknown_grid(name, ggufs=bool(ggufs))
            assert isinstance(error, UnknownName)
            assert f"did you mean {meant}" in str(error)


@pytest.mark.parametrize("name", ["awq", "GPTQ", "imatrix", "awq+gptq"])
def test_a_method_is_called_one(name):
    assert f"write --method {name.lower()} with a grid" in str(unknown_grid(name))
