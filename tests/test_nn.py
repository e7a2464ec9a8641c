"""What a loaded model multiplies by."""

import copy

import pytest
import torch
from gguf import GGUFReader
from torch import nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import halfbyte
import tiny
from halfbyte import demo
from halfbyte import packed as packed_modules
from halfbyte.devices import multiplies_float8
from halfbyte.errors import HalfbyteError
from halfbyte.grids import parse
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.activations import parse as parse_activations
from halfbyte.grids.quantized import PackedMatrix, Quantized
from halfbyte.kernels.panels import Panels
from halfbyte.kernels.products import float8_product, int8_product
from halfbyte.models import skeleton
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.packed import PackedModule, QuantEmbedding, QuantLinear
from models.families import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


FLOAT8 = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not multiplies_float8(torch.device(DEVICE)), reason="needs a GPU that multiplies FP8"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", FLOAT8])
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 64, 64), (3, 63, 65), (17, 7, 5)])
@pytest.mark.parametrize("kinds", [("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2"), ("e5m2", "e4m3fn")])
def test_products_of_float8_are_added_up_in_more_bits_also_for_odd_sizes(kinds, rows, width, out, device):
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(n, width, generator=generator).to(getattr(torch, f"float8_{kind}"))
        for n, kind in zip((rows, out), kinds, strict=True)
    )
    wanted = x.double() @ w.double().T
    found = float8_product(x.to(device), w.to(device)).cpu().double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("device", ["cpu", FLOAT8])
@pytest.mark.parametrize("weight", ["fp8-e4m3-channel", "fp8-e4m3-tensor", "fp8-e5m2-channel", "fp8-e4m3-block"])
@pytest.mark.parametrize("read", ["fp8-e4m3-token", "fp8-e4m3-tensor", "fp8-e5m2-token", "fp8-e4m3-g128"])
def test_a_linear_of_float8_computes_the_same_where_a_device_multiplies_float8(weight, read, device, monkeypatch):
    """On a CPU, torch's own product of FP8 stands for that of a GPU."""
    grid, activations = parse(weight), parse_activations(read)
    w, x = (torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) for n in (48, 5))
    params = grid.fit(w, None)
    q = Quantized(grid, grid.encode(w, params), params, ActivationQuant(activations, {}))
    linear = QuantLinear(PackedMatrix(q.tensors, lambda _: q), None, torch.float32)
    wanted = linear(x[None])
    monkeypatch.setattr(packed_modules, "multiplies_float8", lambda device: True)
    products = []
    monkeypatch.setattr(packed_modules, "float8_product", lambda x, w: products.append(1) or float8_product(x, w))
    moved = Quantized(grid, q.codes.to(device), {n: p.to(device) for n, p in params.items()}, q.activations)
    linear = QuantLinear(PackedMatrix(moved.tensors, lambda _: moved), None, torch.float32)
    found = linear.to(device)(x[None].to(device)).cpu()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    has_one_scale = "block" not in weight and "g128" not in read
    assert bool(products) == (has_one_scale and not ("e5m2" in weight and "e5m2" in read))


PACKED = [
    *(("int4-g128", to) for to in ("compressed-tensors", "gptq", "awq")),
    ("nf4", "bitsandbytes"),
    ("nvfp4", "compressed-tensors"),
    *((type, "gguf") for type in ("Q4_K_M", "IQ4_XS", "IQ3_S")),
]


def held_bytes(model: nn.Module) -> int:
    """That its parameters and buffers take, each counted once."""
    return sum({t.data_ptr(): t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers())}.values())


@pytest.mark.parametrize("activations", [None, "exact"])
@pytest.mark.parametrize(("grid", "to"), PACKED)
def test_a_loaded_model_takes_no_more_memory_than_its_file(grid, to, activations, tmp_path):
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    halfbyte.quantize(demo.MODEL, out, method="nearest", grid=grid, to=to)
    model = halfbyte.load(out, activations=activations)
    files = [out] if out.is_file() else list(out.glob("*.safetensors"))
    assert held_bytes(model) < 1.1 * sum(file.stat().st_size for file in files)
    unpacked = [
        checkpoint.read_quantized(module)
        for checkpoint in [Checkpoint.open(out)]
        for module in list(checkpoint.quantized)[:3]
    ]
    held = [module.matrix.decode() for module in model.modules() if isinstance(module, PackedModule)]
    assert all(any(_close(q.decode(), values) for values in held) for q in unpacked)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for the order in which scales are multiplied."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def packed_demo(tmp_path_factory):
    """The demo model, whose embedding is packed too."""
    out = tmp_path_factory.mktemp("nn") / "out.gguf"
    halfbyte.quantize(demo.MODEL, out, method="nearest", grid="Q4_K_M")
    return out


def test_rows_of_an_embedding_are_those_of_the_whole(packed_demo):
    model, tokens = halfbyte.load(packed_demo), torch.tensor([[5, 3, 5], [250, 0, 3]])
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert torch.equal(embedding(tokens), embedding.weight[tokens])


def test_an_embedding_that_scales_its_rows_stays_packed_and_so_does_the_head_that_is_tied_to_it(tmp_path):
    """Gemma's."""
    FAMILIES["gemma3"].save(tmp_path / "model")
    halfbyte.quantize(tmp_path / "model", tmp_path / "out.gguf", method="nearest", grid="Q4_0")
    model, tokens = halfbyte.load(tmp_path / "out.gguf"), torch.tensor([[5, 3, 5], [250, 0, 3]])
    stored = sum(t.n_bytes for t in GGUFReader(tmp_path / "out.gguf").tensors)
    assert held_bytes(model) < 1.1 * stored
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    plain = Gemma3TextScaledWordEmbedding(*embedding.weight.shape, 0, embed_scale=embedding.scalar_embed_scale)
    plain.weight.data = embedding.weight.data
    assert torch.equal(embedding(tokens), plain.to(model.dtype)(tokens))


class Mixed(nn.Embedding):
    """Uses its weight in every way that classes in Transformers do."""

    def forward(self, tokens):
        looked_up = super().forward(tokens) + functional.embedding(tokens, self.weight) + self.weight[tokens]
        return looked_up @ self.weight.T.to(self.weight.device, self.weight.dtype)


@pytest.mark.parametrize("kind", [nn.Embedding, Mixed])
def test_an_embedding_of_any_class_gives_what_it_gave_of_the_decoded_weight(kind, packed_demo):
    matrix, tokens = Checkpoint.open(packed_demo).read_packed("model.embed_tokens"), torch.tensor([[5, 0, 5]])
    plain = kind.from_pretrained(matrix.quantized.decode())
    packed = QuantEmbedding.of(plain, matrix, torch.float32)
    assert torch.equal(packed(tokens), plain(tokens))
    assert torch.equal(copy.deepcopy(packed).half()(tokens), plain.half()(tokens))
    assert held_bytes(packed) < matrix.quantized.codes.numel()


def test_a_weight_that_is_only_looked_at_is_not_decoded(packed_demo, monkeypatch):
    embedding = halfbyte.load(packed_demo).get_input_embeddings()
    weight = embedding.weight
    with monkeypatch.context() as patch:
        patch.delattr(PackedMatrix, "decode")
        patch.delattr(Panels, "decode")
        assert (weight.dtype, weight.shape, weight.device.type) == (torch.bfloat16, (4096, 256), "cpu")
    assert (weight * 2).isfinite().all()


PACKED = {
    "compressed-tensors": ("int4-g128-asym", "int3-g128", "fp8-e4m3-block", "nvfp4", "mxfp4", "w8a8"),
    "gptq": ("int4-g128", "int3-g128-asym"),
    "awq": ("int4-g128-asym",),
    "bitsandbytes": ("nf4-g64", "nf4-g64-double", "llm-int8"),
    "gguf": ("q4_0", "q5_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_nl", "iq2_xs", "iq3_s", "tq1_0", "mxfp4"),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("to", "grid"), [(to, grid) for to, grids in PACKED.items() for grid in grids])
def test_weights_stay_packed_on_a_gpu_and_stand_for_the_same_numbers(to, grid, tmp_path):
    tiny.make(tmp_path / "model", hidden_size=256)
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    halfbyte.quantize(
        tmp_path / "model", out, method="nearest", grid=grid, to=to, engine="none", pure=to == "gguf" or None
    )
    model, there = (halfbyte.load(out, torch.float32, device) for device in ("cpu", "cuda"))
    assert held_bytes(there) == held_bytes(model)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    for layer, other in zip(layers, [m for m in there.modules() if isinstance(m, QuantLinear)], strict=True):
        # A GPU may fuse a product and a sum, and adds in another order.
        weight, x = layer.weight, torch.randn(7, layer.weight.shape[1])
        torch.testing.assert_close(other.weight.cpu(), weight, rtol=1e-6, atol=0)
        torch.testing.assert_close(other(x.cuda()).cpu(), layer(x), rtol=1e-4, atol=1e-4 * layer(x).abs().max().item())


def test_a_model_that_moves_takes_its_bits_along(tmp_path):
    halfbyte.quantize(demo.MODEL, tmp_path / "out", method="nearest", grid="int4-g128")
    model = halfbyte.load(tmp_path / "out").to("meta")
    linear = next(module for module in model.modules() if isinstance(module, PackedModule))
    assert all(tensor.device.type == "meta" for tensor in linear.matrix.tensors.values())
    assert linear(torch.zeros(1, linear.weight.shape[1], dtype=linear.dtype, device="meta")).device.type == "meta"


def test_a_device_or_precision_that_is_none_is_refused_in_a_line(tmp_path):
    tiny.make(tmp_path / "model")
    with pytest.raises(HalfbyteError, match="'nonsense' is no device"):
        halfbyte.load(tmp_path / "model", device="nonsense")
    with pytest.raises(HalfbyteError, match="unknown dtype 'int3'"):
        halfbyte.load(tmp_path / "model", "int3")
    assert halfbyte.load(tmp_path / "model", "bfloat16", torch.device("cpu")).dtype == torch.bfloat16


class Doubled(nn.Linear):
    """A linear that does more than multiply, as routers of Llama 4 and Phi-MoE are."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_linear_that_does_more_than_multiply_keeps_doing_it(tmp_path, monkeypatch):
    tiny.make(tmp_path / "model")
    halfbyte.quantize(tmp_path / "model", tmp_path / "out", method="nearest", grid="int4-g64")
    build = skeleton.build

    def built(*args):
        model = build(*args)
        model.model.layers[0].mlp.down_proj.__class__ = Doubled
        return model

    monkeypatch.setattr(skeleton, "build", built)
    found = halfbyte.load(tmp_path / "out", torch.float32).model.layers[0].mlp
    assert isinstance(found.up_proj, QuantLinear)
    w = Checkpoint(tmp_path / "out").read("model.layers.0.mlp.down_proj.weight").float()
    x = torch.randn(3, w.shape[1])
    assert torch.equal(found.down_proj(x), 2 * functional.linear(x, w))


def test_linears_that_read_the_same_multiply_together(tmp_path):
    """Queries, keys and values: of one product, each gets its rows, whoever asks first and whatever else it reads."""
    halfbyte.quantize(demo.MODEL, tmp_path / "out", method="nearest", grid="int4-g32", engine="none")
    model = halfbyte.load(tmp_path / "out", dtype="float32", activations="exact")
    attention = model.model.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    siblings = linears[0].siblings
    assert siblings is not None
    assert all(linear.siblings is siblings for linear in linears)
    x, other = torch.randn(2, 1, 1, linears[0].matrix.shape[1])

    def wanted(linear, read) -> torch.Tensor:
        return read @ linear.matrix.decode().T

    for linear, read in [(linears[0], x), (linears[1], x), (linears[1], other), (linears[2], x), (linears[0], other)]:
        torch.testing.assert_close(linear(read), wanted(linear, read), rtol=1e-5, atol=1e-5)
    copied = copy.deepcopy(attention)
    torch.testing.assert_close(copied.v_proj(x), wanted(linears[2], x), rtol=1e-5, atol=1e-5)
    assert copied.v_proj.siblings is not siblings
    addresses = {linear.matrix.tensors["codes"].untyped_storage().data_ptr() for linear in linears}
    assert len(addresses) == 1  # there is one matrix, and no second form of it


def test_linears_of_other_grids_multiply_alone(tmp_path):
    halfbyte.quantize(
        demo.MODEL,
        tmp_path / "out",
        method="nearest",
        grid="int4-g32",
        engine="none",
        override={"*.v_proj": "int8-g32"},
    )
    model = halfbyte.load(tmp_path / "out", dtype="float32", activations="exact")
    attention = model.model.layers[0].self_attn
    assert attention.v_proj.siblings is None
    assert attention.q_proj.siblings is attention.k_proj.siblings is not None
