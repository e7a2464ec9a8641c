"""Products with packed weights on GPUs: what each kernel computes is what the decoded weights give.

Kernels run on a CPU in Triton's interpreter where there is no GPU; there they are compiled for some, too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_panels import FEW, WITHOUT, activations, lattice, matrix, paneled

from halfbyte.formats import KQUANTS, LATTICES, SCALARS
from halfbyte.grids.actorder import ActOrderGrid
from halfbyte.grids.quantized import Quantized
from halfbyte.grids.scalar import SCALAR_GRIDS
from halfbyte.kernels import choose
from halfbyte.kernels.panels import Panels

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 alone")
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """As if it were a GPU, what runs its kernels."""
    from halfbyte.kernels.gpu import panels

    if DEVICE == "cpu":
        monkeypatch.setattr(panels, "has_capability", lambda *_: True)


def product(x: torch.Tensor, packed: Panels, bias: torch.Tensor | None = None) -> torch.Tensor:
    """By the kernels for GPUs, wherever they run."""
    from halfbyte.kernels.gpu.panels import product

    moved = packed.holding({name: value.to(DEVICE) for name, value in packed.tensors.items()})
    y = product(x.to(DEVICE), moved, None if bias is None else bias.to(DEVICE), "exact")
    assert y is not NotImplemented
    return y.cpu()


def off(found: torch.Tensor, x: torch.Tensor, q: Quantized) -> float:
    """The largest error, as a share of the largest number."""
    wanted = x.double() @ q.decode().double().T
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("name", [name for name in (*SCALARS, *KQUANTS) if name not in WITHOUT])
def test_every_grid_is_multiplied_by(name):
    q, packed = paneled(name, 20, 256)
    for tokens in (1, 5):
        x = activations(tokens, 256, torch.float32)
        assert off(product(x, packed), x, q) < 1e-6


@pytest.mark.parametrize("name", LATTICES)
def test_lattices_are_multiplied_by_too(name):
    q = lattice(name)
    packed = q.panels(room=2.2)
    assert packed is not None
    for tokens in (1, 5):
        x = activations(tokens, 512, torch.float32)
        assert off(product(x, packed), x, q) < 1e-6


@pytest.mark.parametrize("tokens", [1, 20, 70])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_in_the_type_of_the_activations(name, dtype, tokens):
    if DEVICE == "cpu" and dtype == torch.bfloat16 and tokens == 20:
        pytest.skip("Triton's interpreter multiplies matrices of the bits of bfloat16, as if these were integers")
    q, packed = paneled(name, 20, 256)
    x, bias = activations(tokens, 256, dtype), torch.linspace(-1, 1, 20).to(dtype)
    found = product(x, packed, bias)
    assert found.dtype == dtype
    # Of 8 and of 11 bits, the nearest is off by half a unit; decoded weights are rounded too, but for one token.
    wanted = x.double() @ q.decode().double().T + bias.double()
    rtol = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=rtol * wanted.abs().max().item() / 4)


@pytest.mark.parametrize(
    ("name", "out", "width"),
    [
        ("int4-channel", 1, 7),
        ("int5-channel", 17, 100),
        ("nvfp4", 33, 80),
        ("int4-g32-asym", 16, 32),
        ("fp8-e4m3-block", 130, 200),
    ],
)
def test_sizes_that_panels_do_not_divide(name, out, width):
    q, packed = paneled(name, out, width)
    for tokens in (1, 5, 65):
        x = activations(tokens, width, torch.float32)
        assert off(product(x, packed), x, q) < 1e-6


@pytest.mark.parametrize(("tokens", "width"), [(0, 512), (1, 2048), (5, 512)])
def test_parts_of_a_row_are_added_up_in_a_fixed_order(tokens, width):
    q, packed = paneled("int4-g32", 16, width)
    x, bias = activations(tokens, width, torch.float16), torch.linspace(-1, 1, 16).half()
    found = product(x, packed, bias)
    assert torch.equal(found, product(x, packed, bias))
    assert found.shape == (tokens, 16)
    wanted = x.float() @ q.decode().T + bias.float()
    torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=0.05)


def test_weights_are_decoded_in_parts(monkeypatch):
    from halfbyte.kernels.gpu import panels

    monkeypatch.setattr(panels, "DECODED_BYTES", 64 * 64 * 4)
    q, packed = paneled("int4-g32", 150, 64)
    x, bias = activations(65, 64, torch.float32), torch.linspace(-1, 1, 150)
    torch.testing.assert_close(product(x, packed, bias), x @ q.decode().T + bias, rtol=1e-5, atol=1e-5)


def test_sorted_columns_are_put_in_order():
    q = matrix("int4-g32", 16, 128)
    group_of = torch.randperm(128, generator=torch.Generator().manual_seed(2)) // 32
    q = Quantized(ActOrderGrid(SCALAR_GRIDS["int4-g32"]), q.codes, q.params | {"g_idx": group_of[None]})
    packed = q.panels()
    assert packed is not None
    for tokens in (1, 5, 65):
        x = activations(tokens, 128, torch.float32)
        assert off(product(x, packed), x, q) < 1e-6


def test_activations_of_64_bits_and_older_gpus_are_left_to_the_reference(monkeypatch):
    from halfbyte.kernels.gpu import panels

    _, packed = paneled("int4-g32", 16, 32)
    assert panels.product(activations(1, 32, torch.float64), packed, None, "exact") is NotImplemented
    monkeypatch.setattr(panels, "has_capability", lambda *_: False)
    assert panels.product(activations(1, 32, torch.float32), packed, None, "exact") is NotImplemented


def test_the_reference_runs_where_triton_has_no_compiler(monkeypatch):
    monkeypatch.setattr(choose, "which", lambda name: None)
    assert not choose._is_there.__wrapped__("gpu")


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """And words are loaded four at a time."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "compiled_for_gpus.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert len(compiled) == 9
    assert all(int(wide) > 0 for _, kernel, _, wide in compiled if kernel == "_multiply_one"), done.stdout
