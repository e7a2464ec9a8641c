"""What a loaded model multiplies by."""

import pytest
import torch

from halfbyte.nn import int8_product

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 64, 64), (3, 63, 65), (17, 7, 5), (2, 4099, 3)])
def test_products_of_int8_are_exact_for_one_token_and_for_odd_sizes(rows, width, out, device):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-128, 128, (n, width), dtype=torch.int8, generator=generator) for n in (rows, out))
    assert torch.equal(int8_product(x.to(device), w.to(device)).cpu(), x.int() @ w.int().T)


def test_the_largest_sums_of_int8_are_exact():
    """The largest products, of which pairs do not fit 16 bits, and more of them than fit the 24 bits of a float32."""
    x = torch.tensor([[-128] * 4096, [127] * 4096, [127, -127, -128, 0] * 1024], dtype=torch.int8)
    assert torch.equal(int8_product(x, x), x.int() @ x.int().T)
