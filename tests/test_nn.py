"""What a loaded model multiplies by."""

import pytest
import torch

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.errors import HalfbyteError
from halfbyte.nn import PackedModule, QuantEmbedding, int8_product
from halfbyte.targets import open_checkpoint

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


PACKED = [
    *(("int4-g128", to) for to in ("compressed-tensors", "gptq", "awq")),
    ("nf4", "bitsandbytes"),
    ("nvfp4", "compressed-tensors"),
    *((type, "gguf") for type in ("Q4_K_M", "IQ4_XS", "IQ3_S")),
]


@pytest.mark.parametrize(("grid", "to"), PACKED)
def test_a_loaded_model_takes_no_more_memory_than_its_file(grid, to, tmp_path):
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    halfbyte.quantize(demo.MODEL, out, method="nearest", grid=grid, to=to)
    model = halfbyte.load(out)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    files = [out] if out.is_file() else list(out.glob("*.safetensors"))
    assert sum(held.values()) < 1.1 * sum(file.stat().st_size for file in files)
    unpacked = [
        checkpoint.read_quantized(module)
        for checkpoint in [open_checkpoint(out)]
        for module in list(checkpoint.quantized)[:3]
    ]
    linears = [module.matrix.quantized for module in model.modules() if isinstance(module, PackedModule)]
    assert all(any(q.equal(other) for other in linears) for q in unpacked)


def test_rows_of_an_embedding_are_those_of_the_whole(tmp_path):
    halfbyte.quantize(demo.MODEL, tmp_path / "out.gguf", method="nearest", grid="Q4_K_M")
    model, tokens = halfbyte.load(tmp_path / "out.gguf"), torch.tensor([[5, 3, 5], [250, 0, 3]])
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert torch.equal(embedding(tokens), embedding.weight[tokens])


@pytest.mark.parametrize("device", ["meta", GPU])
def test_where_nothing_unpacks_bits_a_model_takes_its_codes_along(device, tmp_path):
    halfbyte.quantize(demo.MODEL, tmp_path / "out", method="nearest", grid="int4-g128")
    model = halfbyte.load(tmp_path / "out").to(device)
    linear = next(module for module in model.modules() if isinstance(module, PackedModule))
    assert linear.matrix.quantized.codes.device.type == device
    assert linear(torch.zeros(1, linear.weight.shape[1], dtype=linear.dtype, device=device)).device.type == device


def test_a_device_or_precision_that_is_none_is_refused_in_a_line(tmp_path):
    tiny.make(tmp_path / "model")
    with pytest.raises(HalfbyteError, match="'nonsense' is no device"):
        halfbyte.load(tmp_path / "model", device="nonsense")
    with pytest.raises(HalfbyteError, match="unknown dtype 'int3'"):
        halfbyte.load(tmp_path / "model", "int3")
    assert halfbyte.load(tmp_path / "model", "bfloat16", torch.device("cpu")).dtype == torch.bfloat16
