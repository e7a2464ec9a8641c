"""Names of grids that people write, and what they are told."""

import pytest

from halfbyte import formats, grids, registry, words
from halfbyte.containers.table import READERS
from halfbyte.errors import BadRequest, UnknownName
from halfbyte.grids import activations
from halfbyte.grids.kv import KVGrid
from halfbyte.targets.gguf import names
from halfbyte.targets.gguf.blocks import LAYOUTS
from halfbyte.targets.table import TARGETS, UNQUANTIZED
from halfbyte.words import unknown_grid

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
    for container, meant in zip((None, "gguf"), MEANT[name], strict=True):
        if meant:
            error = unknown_grid(name, container)
            assert isinstance(error, UnknownName)
            assert f"did you mean {meant}" in str(error)


@pytest.mark.parametrize("name", ["awq", "GPTQ", "imatrix", "awq+gptq"])
def test_a_method_is_called_one(name):
    assert f"write --method {name.lower()} with a grid" in str(unknown_grid(name))


def test_what_is_named_before_torch_is_imported_is_what_there_is():
    assert [*words.CONTAINERS] == [*TARGETS]
    assert {target.name for target in TARGETS.values()} == {*TARGETS}
    assert [target.name for target in UNQUANTIZED.values()] == [*words.PLAIN]
    assert [reader.name for reader in READERS.values()] == [*registry.CONTAINERS, *registry.READ_ONLY]
    assert {target.file_suffix: name for name, target in TARGETS.items() if target.file_suffix} == words.FILES
    assert [*words.GRIDS] == [*grids.GRIDS]
    assert [*names.TYPES] == [*LAYOUTS]
    assert {*formats.SCALED_ACTIVATIONS, *formats.BLOCK_ACTIVATIONS} == {*activations.ACTIVATION_GRIDS}
    assert [str(KVGrid.parse(name)) for name in formats.GGML_CACHES] == [*formats.GGML_CACHES]


@pytest.mark.parametrize(
    "name",
    [
        *(*grids.GRIDS, *formats.ALIASES, *formats.SCHEMES, *names.PRESETS, *names.ALIASES, *LAYOUTS),
        *("int4-g128-asym-bf16", "int4-g96", "int4-g64-actorder", "nf4-g4096-double", "fp8-e4m3-channel-bf16"),
        *("INT4-G128", "int8-channel/int8-token", "q4_k_m", "mxfp4/mxfp4"),
    ],
)
def test_every_name_of_a_grid_may_be_written(name):
    words.require_grid(name)


@pytest.mark.parametrize("name", ["int4-h128", "int9-g128", "int4", "nf5-g64", "fp8-e4m4-tensor", "Q4KM", "gptq", ""])
def test_a_name_that_is_none_is_refused_early(name):
    with pytest.raises(BadRequest):
        words.require_grid(name)


def test_a_container_s_own_names_of_grids():
    assert [words.own_name("gguf", grid) for grid in ("int4-g32", "q4_k", "nvfp4")] == ["Q4_0", "Q4_K", "nvfp4"]
    assert words.own_name("compressed-tensors", "int4-g32") == "int4-g32"
