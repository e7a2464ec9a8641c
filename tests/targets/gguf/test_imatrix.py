"""Importance matrices: laid out as llama.cpp's documentation and the gguf package have them, and used by its
quantizer."""

import ctypes
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from halfbyte.errors import BadCheckpoint, BadRequest
from halfbyte.targets.gguf import file as gguf_file
from halfbyte.targets.gguf import imatrix
from halfbyte.targets.gguf.file import GGUFFileWriter
from halfbyte.targets.gguf.head import TYPES, Value
from halfbyte.targets.gguf.imatrix import Importance, Squares


def importance() -> Importance:
    random = torch.Generator().manual_seed(0)
    one = Squares(torch.rand(1, 8, generator=random) * 100, torch.tensor([1024.0]))
    three = Squares(torch.rand(3, 8, generator=random) * 100, torch.tensor([3.0, 0.0, 700.0]))
    return Importance({"blk.0.attn_q.weight": one, "blk.0.ffn_up_exps.weight": three}, ("calibration.txt",), 2, 512)


def test_the_file_is_the_one_that_the_gguf_package_writes(tmp_path):
    made = importance()
    writer = gguf.GGUFWriter(tmp_path / "theirs", "none")
    writer.kv_data[0].clear()  # llama.cpp writes no architecture here
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(made.datasets))
    writer.add_uint32("imatrix.chunk_count", made.chunks)
    writer.add_uint32("imatrix.chunk_size", made.chunk_size)
    for name, squares in made.tensors.items():
        writer.add_tensor(f"{name}.in_sum2", squares.sums.numpy())
        writer.add_tensor(f"{name}.counts", squares.counts[:, None].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    imatrix.write(tmp_path / "ours", made)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_written_reads_as_it_was(tmp_path):
    made = importance()
    imatrix.write(tmp_path / "imatrix.gguf", made)
    read = imatrix.read(tmp_path / "imatrix.gguf")
    assert (read.datasets, read.chunks, read.chunk_size) == (("calibration.txt",), 2, 512)
    for name, squares in made.tensors.items():
        assert torch.equal(read.tensors[name].sums, squares.sums)
        assert torch.equal(read.tensors[name].counts, squares.counts)


def test_an_expert_that_read_no_token_weighs_every_feature_alike():
    mean = importance().tensors["blk.0.ffn_up_exps.weight"].mean
    assert torch.equal(mean[1], torch.ones(8))
    assert torch.equal(mean[2], importance().tensors["blk.0.ffn_up_exps.weight"].sums[2] / 700)


def dat(path: Path) -> Path:
    """The older format, as save_imatrix_legacy of llama.cpp lays it out: means of squares times calls."""
    data = struct.pack("<i", 2)
    for name, calls, values in (
        (b"blk.0.attn_q.weight", 4, [4.0, 8.0, 2.0]),
        (b"blk.0.ffn_up_exps.weight", 2, [2.0, 4.0, 6.0, 8.0]),
    ):
        data += (
            struct.pack("<i", len(name))
            + name
            + struct.pack("<ii", calls, len(values))
            + struct.pack(f"<{len(values)}f", *values)
        )
    path.write_bytes(data + struct.pack("<ii", 4, 8) + b"wiki.txt")
    return path


def test_the_older_format_gives_means(tmp_path):
    read = imatrix.read(dat(tmp_path / "imatrix.dat"))
    assert torch.equal(read.tensors["blk.0.attn_q.weight"].mean, torch.tensor([[1.0, 2.0, 0.5]]))
    assert (read.datasets, read.chunks) == (("wiki.txt",), 4)


def test_the_older_format_without_its_trailer_is_read(tmp_path):
    path = dat(tmp_path / "imatrix.dat")
    path.write_bytes(path.read_bytes()[:-16])
    assert imatrix.read(path).datasets == ()


def test_experts_of_the_older_format_are_told_apart_by_the_weight(tmp_path):
    read = imatrix.read(dat(tmp_path / "imatrix.dat"))
    experts = read.of("blk.0.ffn_up_exps.weight", 2, 2)
    assert experts is not None
    assert torch.equal(experts, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert read.of("blk.1.attn_q.weight", 1, 3) is None


def test_a_matrix_of_another_model_is_refused(tmp_path):
    with pytest.raises(BadRequest, match=r"3 values .* needs 4096"):
        imatrix.read(dat(tmp_path / "imatrix.dat")).of("blk.0.attn_q.weight", 1, 4096)


@pytest.mark.parametrize(
    ("sums", "words"), [([float("nan"), 1.0], "NaN"), ([-1.0, 1.0], "negative"), ([float("inf"), 1.0], "infinite")]
)
def test_values_that_are_no_squares_are_refused(tmp_path, sums, words):
    imatrix.write(tmp_path / "bad.gguf", Importance({"a.weight": Squares(torch.tensor([sums]), torch.ones(1))}))
    with pytest.raises(BadCheckpoint, match=words):
        imatrix.read(tmp_path / "bad.gguf")


def test_a_file_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "text").write_text("Call me Ishmael. Some years ago")
    GGUFFileWriter(tmp_path / "model.gguf", {}, {"a.weight": ("F32", (4,))}).close()
    for name in ("text", "model.gguf", "none"):
        with pytest.raises(BadCheckpoint, match=name):
            imatrix.read(tmp_path / name)


# llama.cpp ----------------------------------------------------------------------------------------------------------

WIDTH, VOCABULARY = 256, 64
MODEL = {
    "general.architecture": Value("string", "llama"),
    "llama.context_length": Value("uint32", 64),
    "llama.embedding_length": Value("uint32", WIDTH),
    "llama.block_count": Value("uint32", 1),
    "llama.feed_forward_length": Value("uint32", WIDTH),
    "llama.attention.head_count": Value("uint32", 4),
    "llama.attention.layer_norm_rms_epsilon": Value("float32", 1e-5),
    "tokenizer.ggml.model": Value("string", "none"),
    "llama.vocab_size": Value("uint32", VOCABULARY),
}
NORMS = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
LINEARS = tuple(
    f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
)


def model(path: Path) -> dict[str, torch.Tensor]:
    """A Llama of one layer, in float32."""
    random = torch.Generator().manual_seed(1)
    shapes = (
        {"token_embd.weight": (VOCABULARY, WIDTH)}
        | dict.fromkeys(NORMS, (WIDTH,))
        | dict.fromkeys(LINEARS, (WIDTH, WIDTH))
    )
    tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    writer = GGUFFileWriter(path, MODEL, {name: ("F32", tuple(t.shape)) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    return tensors


def quantize(llama_cpp, source: Path, target: Path, ftype: int, means: dict[str, np.ndarray]) -> int:
    """llama-quantize, as its main() calls the library."""
    params = llama_cpp.llama_model_quantize_default_params()
    rows = [(name.encode(), np.ascontiguousarray(mean, np.float32)) for name, mean in means.items()]
    data = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
    for place, (name, mean) in zip(data, rows, strict=False):
        place.name, place.data, place.size = name, mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), mean.size
    params.nthread, params.ftype, params.imatrix = 1, ftype, data
    return llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))


@pytest.mark.slow
def test_the_quantizer_of_llama_cpp_takes_the_means_of_our_file(tmp_path):
    """IQ2_XXS is not made without an importance matrix, and its bytes are those that ggml makes with these means."""
    llama_cpp = pytest.importorskip("llama_cpp.llama_cpp", reason="llama.cpp (llama-cpp-python) is not installed")
    tensors = model(tmp_path / "f32.gguf")
    random = torch.Generator().manual_seed(2)
    squares = {
        name: Squares(torch.rand(1, WIDTH, generator=random) * 99, torch.tensor([37.0]))
        for name in (*LINEARS, "token_embd.weight")
    }
    imatrix.write(tmp_path / "imatrix.gguf", Importance(squares, ("text",), 1, 37))
    means = {name: s.mean.numpy() for name, s in imatrix.read(tmp_path / "imatrix.gguf").tensors.items()}
    assert quantize(llama_cpp, tmp_path / "f32.gguf", tmp_path / "out.gguf", 19, means) == 0
    made = gguf_file.read(tmp_path / "out.gguf")
    assert {made.tensors[name].type for name in LINEARS} > {"IQ2_XXS"}
    base = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so"))))
    base.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    for name in LINEARS:
        stored = made.tensors[name]
        mean = (squares[name].sums / squares[name].counts).contiguous()
        expected = torch.empty(stored.entry.shape, dtype=torch.uint8)
        kind = TYPES[stored.type].number
        base.ggml_quantize_chunk(kind, tensors[name].data_ptr(), expected.data_ptr(), 0, WIDTH, WIDTH, mean.data_ptr())
        assert torch.equal(stored.entry.read(), expected), name
