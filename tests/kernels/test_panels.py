"""Products with packed weights: what each kernel computes is what the decoded weights give."""

import copy

import pytest
import torch

from halfbyte.formats import KQUANTS, LATTICES, SCALARS, Activations
from halfbyte.grids import parse
from halfbyte.grids.actorder import ActOrderGrid
from halfbyte.grids.lattice import LATTICE_GRIDS
from halfbyte.grids.quantized import Quantized
from halfbyte.grids.scalar import SCALAR_GRIDS
from halfbyte.kernels import choose
from halfbyte.kernels.cpu import native, panels
from halfbyte.kernels.cpu.emit import Target
from halfbyte.kernels.panels import Panels, product

WITHOUT = {"tq1_0"}
"""In panels these take over a tenth more than in their file."""
FEW = (
    "int4-g32",
    "int3-g64-asym",
    "int8-channel",
    "nvfp4",
    "iq4_xs",
    "nf4-g64",
    "fp8-e4m3-block",
    "mxfp6-e3m2",
    "q4_k",
    "q6_k",
)
AVX2, VNNI = Target("avx2", bfloat16=False, permutes=False), Target("vnni256", bfloat16=False, permutes=False)


def matrix(name: str, out: int = 40, width: int = 512) -> Quantized:
    grid = parse(name)
    w = torch.randn(out, width, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, out)[:, None]
    params = grid.fit(w, None, search=False)
    return Quantized(grid, grid.encode(w, params), params)


def lattice(name: str) -> Quantized:
    """Any codes: to find the nearest takes long."""
    grid = LATTICE_GRIDS[name]
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.randint(0, len(grid.magnitudes), (40, 512), generator=generator)
    codes = (magnitudes | torch.randint(0, 2, (40, 512), generator=generator) << 7).to(torch.uint8)
    scale = torch.randint(0, grid.top + 1, (40, 512 // grid.group), generator=generator).to(torch.uint8)
    return Quantized(grid, codes, {"d": torch.rand(40, 2, generator=generator).half(), "scale": scale})


def paneled(name: str, out: int = 40, width: int = 512) -> tuple[Quantized, Panels]:
    q = matrix(name, out, width)
    panels = q.panels()
    assert panels is not None
    return q, panels


def activations(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", [*SCALARS, *KQUANTS])
def test_panels_stand_for_what_their_grid_decodes_in_no_more_bytes(name):
    q = matrix(name)
    found = q.panels()
    if name in WITHOUT:
        assert found is None
        return
    assert found is not None
    torch.testing.assert_close(found.decode(), q.decode(), rtol=1e-6, atol=1e-7)
    rows = torch.tensor([39, 0, 17, 17])
    assert torch.equal(found.rows(rows), found.decode()[rows])


@pytest.mark.parametrize("name", LATTICES)
def test_lattices_are_multiplied_by_in_panels_that_are_larger_than_their_file(name):
    q = lattice(name)
    assert q.panels() is None
    packed = q.panels(room=2.2)
    assert packed is not None
    torch.testing.assert_close(packed.decode(), q.decode(), rtol=1e-6, atol=0)
    ways: tuple[tuple[int, Activations], ...] = ((1, "exact"), (5, "int8"), (50, "exact"))
    for tokens, how in ways:
        x = activations(tokens, 512, torch.float32)
        found, wanted = product(x, packed, None, how), (_rounded(x) if how == "int8" else x) @ q.decode().T
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("tokens", [1, 6, 50])
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in FEW), ("int4-g32", torch.float32), ("q6_k", torch.float16)]
)
def test_products_are_those_of_the_decoded_weight(name, dtype, tokens):
    q, packed = paneled(name)
    x, bias = activations(tokens, 512, dtype), torch.linspace(-1, 1, 40).to(dtype)
    wanted = x.double() @ q.decode().double().T + bias.double()
    found = product(x, packed, bias, "exact")
    assert found.dtype == dtype
    # Of 8 and of 11 bits, the nearest is off by half a unit; a decoded weight is rounded too, from some tokens on.
    rtol = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=rtol * wanted.abs().max().item() / 4)


@pytest.mark.parametrize("here", [None, AVX2, VNNI])
@pytest.mark.parametrize("name", FEW)
def test_every_processor_computes_the_same(name, here, monkeypatch):
    """As far as this one can run what others have."""
    if here == VNNI and "avxvnni" not in native.features() and "avx512vnni" not in native.features():
        pytest.skip("this processor has no VNNI")
    if here:
        monkeypatch.setattr(panels, "target", lambda: here)
    q, packed = paneled(name)
    for tokens in (1, 5, 20):
        x = activations(tokens, 512, torch.float32)
        wanted = x.double() @ q.decode().double().T
        size = wanted.abs().max().item()
        assert (product(x, packed, None, "exact") - wanted).abs().max().item() < 2e-6 * size
        rounded = _rounded(x) if _is_int8(packed, here) and tokens < panels.MANY["int8"] else x
        wanted = rounded.double() @ q.decode().double().T
        assert (product(x, packed, None, "int8") - wanted).abs().max().item() < 2e-6 * size


def _is_int8(packed: Panels, here: Target | None) -> bool:
    target = here or panels.target()
    assert target is not None
    return panels.arithmetic(packed.form.levels, torch.float32, "int8", target) == "int8"


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """To 8 bits in groups of 32, as ggml's q8_0 but for the precision of the scale."""
    groups = x.unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.round(groups / scale) * scale).flatten(1)


@pytest.mark.parametrize(
    ("name", "out", "width"),
    [
        ("int4-channel", 1, 7),
        ("int8-channel", 17, 100),
        ("nvfp4", 33, 80),
        ("int4-g32-asym", 16, 32),
        ("fp8-e4m3-block", 130, 200),
    ],
)
def test_sizes_that_panels_do_not_divide(name, out, width):
    q, packed = paneled(name, out, width)
    for tokens in (1, 5, 20):
        x = activations(tokens, width, torch.float32)
        torch.testing.assert_close(product(x, packed, None, "exact"), x @ q.decode().T, rtol=1e-5, atol=1e-5)


def test_sorted_columns_are_put_in_order():
    q = matrix("int4-g32")
    group_of = torch.randperm(512, generator=torch.Generator().manual_seed(2)) // 32
    grid = ActOrderGrid(SCALAR_GRIDS["int4-g32"])
    q = Quantized(grid, q.codes, q.params | {"g_idx": group_of[None]})
    packed = q.panels()
    assert packed is not None
    torch.testing.assert_close(packed.decode(), q.decode())
    for tokens in (1, 20):
        x = activations(tokens, 512, torch.float32)
        torch.testing.assert_close(product(x, packed, None, "exact"), x @ q.decode().T, rtol=1e-4, atol=1e-4)


def test_the_reference_computes_the_same():
    q, packed = paneled("q4_k")
    x = activations(3, 512, torch.float32)
    with choose.using("reference"):
        torch.testing.assert_close(product(x, packed, None, "exact"), x @ q.decode().T)


def test_weights_that_move_are_found_again():
    _, packed = paneled("int4-g32")
    x = activations(1, 512, torch.float32)
    wanted = product(x, packed, None, "exact")
    other = copy.deepcopy(packed)
    assert not other.kept
    packed.tensors["codes"].zero_()
    assert torch.equal(product(x, other, None, "exact"), wanted)
    other.tensors["codes"].share_memory_()
    assert torch.equal(product(x, other, None, "exact"), wanted)


def test_tensors_of_other_sizes_are_refused_before_their_address_is_passed():
    _, packed = paneled("int4-g32")
    short = packed.holding(packed.tensors | {"scale": packed.tensors["scale"][:-16]})
    with pytest.raises(ValueError, match="scale of"):
        product(activations(1, 512, torch.float32), short, None, "exact")
