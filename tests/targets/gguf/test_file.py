"""GGUF files against the gguf package: it reads what we write, we read what it writes, and the bytes are the same."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from halfbyte.containers.safetensors import Entry
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.targets.gguf.file import GGUFFileWriter, TensorInfo, dtype_of, read, split_metadata
from halfbyte.targets.gguf.head import MOST_ELEMENTS, NEWER, File, Value, part_name, row_bytes

METADATA = {
    "general.architecture": Value("string", "llama"),
    "llama.block_count": Value("uint32", 2),
    "llama.rope.freq_base": Value("float32", 10000.0),
    "tokenizer.ggml.add_bos_token": Value("bool", True),
    "tokenizer.ggml.tokens": Value("string[]", ["<s>", "né", ""]),
    "tokenizer.ggml.scores": Value("float32[]", [0.5, -1.0, 2.0]),
    "tokenizer.ggml.token_type": Value("int32[]", [1, 2, 3]),
    "small": Value("int8", -3),
    "large": Value("uint64", 1 << 63),
    "exact": Value("float64", 0.1),
}
TENSORS = {
    "f32": ("F32", (3, 5)),
    "bf16": ("BF16", (7,)),
    "experts": ("Q4_K", (3, 4, 512)),
    "small": ("Q8_0", (5, 32)),
    "int": ("I32", (3,)),
}


def contents(seed: int = 0) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(seed)
    made = {}
    for name, (kind, shape) in TENSORS.items():
        size = row_bytes(kind, shape[-1])
        raw = torch.from_numpy(random.integers(0, 100, (*shape[:-1], size), dtype=np.uint8))
        made[name] = raw.view(dtype_of(kind))
    return made


def write(path: Path, metadata: dict[str, Value] = METADATA, tensors: dict = TENSORS) -> Path:
    writer, values = GGUFFileWriter(path, metadata, tensors), contents()
    for name in reversed(tensors):
        writer.write(name, values[name])
    writer.close()
    return path


def write_with_gguf(path: Path) -> Path:
    add = {
        "string": "string",
        "uint32": "uint32",
        "float32": "float32",
        "bool": "bool",
        "int8": "int8",
        "uint64": "uint64",
        "float64": "float64",
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in METADATA.items():
        if value.type.endswith("[]"):
            writer.add_array(key, value.value)
        elif key != "general.architecture":
            getattr(writer, f"add_{add[value.type]}")(key, value.value)
    for name, tensor in contents().items():
        plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        writer.add_tensor(name, plain.numpy(), raw_dtype=gguf.GGMLQuantizationType[TENSORS[name][0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def require_same(file: File[TensorInfo]) -> None:
    assert file.metadata == METADATA
    assert {name: (stored.type, stored.shape) for name, stored in file.tensors.items()} == TENSORS
    for name, tensor in contents().items():
        got = file.tensors[name].entry.read()
        assert got.dtype == tensor.dtype
        assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_file_is_the_one_that_the_gguf_package_writes(tmp_path):
    assert write(tmp_path / "ours.gguf").read_bytes() == write_with_gguf(tmp_path / "theirs.gguf").read_bytes()


def test_we_read_what_the_gguf_package_writes(tmp_path):
    require_same(read(write_with_gguf(tmp_path / "theirs.gguf")))


def test_the_gguf_package_reads_what_we_write(tmp_path):
    reader = gguf.GGUFReader(write(tmp_path / "ours.gguf"))
    assert {key: reader.fields[key].contents() for key in METADATA} == {
        key: value.value for key, value in METADATA.items()
    }
    for tensor in reader.tensors:
        kind, shape = TENSORS[tensor.name]
        assert tensor.tensor_type.name == kind
        assert tuple(tensor.shape)[::-1] == shape
        assert tensor.data.tobytes() == contents()[tensor.name].view(torch.uint8).numpy().tobytes()


def test_newer_types_are_as_large_as_the_gguf_package_says_that_knows_them():
    known = {kind.name: (int(kind), *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    shared = NEWER.keys() & known.keys()
    assert shared
    assert {name: NEWER[name][:3] for name in shared} == {name: known[name] for name in shared}


def test_one_expert_of_a_stack_is_written_alone(tmp_path):
    writer, values = GGUFFileWriter(tmp_path / "a.gguf", METADATA, TENSORS), contents()
    for expert in (2, 0, 1):
        writer.write("experts", values["experts"][expert : expert + 1], at=expert)
    with pytest.raises(ValueError, match="planned"):
        writer.write("experts", values["experts"][:2])
    with pytest.raises(ValueError, match="planned"):
        writer.write("experts", values["experts"][:2], at=2)
    for name in TENSORS.keys() - {"experts"}:
        writer.write(name, values[name])
    writer.close()
    require_same(read(tmp_path / "a.gguf"))


def test_a_writer_that_resumes_keeps_what_was_written(tmp_path):
    writer, values = GGUFFileWriter(tmp_path / "a.gguf", METADATA, TENSORS), contents()
    writer.write("f32", values["f32"])
    writer.abandon()
    writer = GGUFFileWriter(tmp_path / "a.gguf", METADATA, TENSORS, resume=True)
    for name in TENSORS.keys() - {"f32"}:
        writer.write(name, values[name])
    writer.close()
    assert (tmp_path / "a.gguf").read_bytes() == write(tmp_path / "whole.gguf").read_bytes()


def test_alignment_is_as_the_metadata_says(tmp_path):
    file = read(write(tmp_path / "a.gguf", {**METADATA, "general.alignment": Value("uint32", 256)}))
    assert all(stored.entry.offset % 256 == 0 for stored in file.tensors.values())
    for name, tensor in contents().items():
        assert torch.equal(file.tensors[name].entry.read(), tensor)


def test_bytes_of_a_vocabulary_that_are_not_utf8_survive(tmp_path):
    write(tmp_path / "a.gguf", {"tokens": Value("string[]", ["\udcff\udc80", "a"])})
    assert b"\xff\x80" in (tmp_path / "a.gguf").read_bytes()
    assert read(tmp_path / "a.gguf").metadata["tokens"] == Value("string[]", ["\udcff\udc80", "a"])


@pytest.mark.slow
def test_a_vocabulary_of_150_thousand_is_read_within_a_second(tmp_path):
    words = Value("string[]", [f"word {i}" for i in range(150_000)])
    write(tmp_path / "a.gguf", {"tokens": words, "merges": words, "scores": Value("float32[]", [0.0] * 150_000)})
    started = time.process_time()
    file = read(tmp_path / "a.gguf")
    assert time.process_time() - started < 1
    assert file.metadata["merges"] == words


def test_names_that_ggml_cannot_hold_are_refused(tmp_path):
    with pytest.raises(Unsupported, match="63 bytes"):
        GGUFFileWriter(tmp_path / "a.gguf", {}, {"x" * 64: ("F32", (1,))})
    with pytest.raises(Unsupported, match="blocks of 256"):
        GGUFFileWriter(tmp_path / "a.gguf", {}, {"x": ("Q4_K", (4, 128))})


# Split files --------------------------------------------------------------------------------------------------------


def write_parts(folder: Path) -> list[Path]:
    folder.mkdir()
    names, cuts = list(TENSORS), (0, 2, 4, 5)
    paths = [folder / part_name("model", number, 3) for number in range(3)]
    for number, path in enumerate(paths):
        part = {name: TENSORS[name] for name in names[cuts[number] : cuts[number + 1]]}
        write(path, split_metadata(METADATA, number, 3, len(TENSORS)), part)
    return paths


def test_parts_read_as_the_whole_from_any_of_them_and_from_their_folder(tmp_path):
    paths = write_parts(tmp_path / "model")
    assert [p.name for p in paths] == [
        "model-00001-of-00003.gguf",
        "model-00002-of-00003.gguf",
        "model-00003-of-00003.gguf",
    ]
    for source in (*paths, tmp_path / "model"):
        file = read(source)
        require_same(file)
        assert file.paths == tuple(paths)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_part_that_is_missing_is_named(tmp_path, lost):
    paths = write_parts(tmp_path / "model")
    paths[lost].unlink()
    for source in (paths[1 if lost != 1 else 0], tmp_path / "model"):
        with pytest.raises(BadCheckpoint, match=paths[lost].name):
            read(source)


def test_parts_of_different_models_are_told_apart(tmp_path):
    paths = write_parts(tmp_path / "model")
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(BadCheckpoint, match="says that it is part 2"):
        read(paths[0])


def test_a_part_under_another_name_says_what_its_name_should_be(tmp_path):
    paths = write_parts(tmp_path / "model")
    with pytest.raises(BadCheckpoint, match=r"NAME-00001-of-00003\.gguf"):
        read(paths[0].rename(tmp_path / "renamed.gguf"))


def test_a_folder_of_two_models_asks_for_one(tmp_path):
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    with pytest.raises(BadCheckpoint, match=r"2 models, such as a\.gguf and b\.gguf"):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match=r"holds no \.gguf"):
        read(tmp_path / "empty")


# What is wrong with a file is said ------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(tensors: int, keys: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def tensor(name: bytes = b"x", shape=(4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def number(key: bytes, value: int, kind: int = 4) -> bytes:
    return string(key) + struct.pack("<II", kind, value)


BROKEN = {
    "not a GGUF": (b"PK\x03\x04" + bytes(100), "starts with"),
    "empty": (b"", "goes on to byte 4 of 0"),
    "a pointer of Git LFS": (b"version https://git-lfs", "git lfs pull"),
    "version 1": (header(0, 0, version=1), "version 1"),
    "version 4": (header(0, 0, version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless tensors": (header(1 << 63, 0), "counts 9223372036854775808 tensors"),
    "endless keys": (header(0, 1 << 40), "keys"),
    "endless string": (header(0, 1, struct.pack("<Q", 1 << 62) + b"abc"), "goes on to byte"),
    "endless array": (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 4, 1_000_000_000)), "1000000000 elements"),
    "array beyond the file": (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 8, MOST_ELEMENTS)), "goes on to byte"),
    "array of arrays": (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "array of arrays"),
    "unknown value": (header(0, 1, string(b"k") + struct.pack("<II", 13, 1)), "of type 13"),
    "key twice": (header(0, 2, number(b"k", 1) + number(b"k", 1)), "'k' comes twice"),
    "key of bytes": (header(0, 1, number(b"\xff\xfe", 1)), "not UTF-8"),
    "alignment 0": (header(0, 1, number(b"general.alignment", 0)), "general.alignment is 0"),
    "alignment 24": (header(0, 1, number(b"general.alignment", 24)), "general.alignment is 24"),
    "alignment of another type": (header(0, 1, number(b"general.alignment", 32, 5)), "int32"),
    "name of bytes": (header(1, 0, tensor(b"\xff") + bytes(64)), "not UTF-8"),
    "name twice": (header(2, 0, tensor() + tensor(offset=32) + bytes(128)), "'x' comes twice"),
    "name of two lines": (header(1, 0, tensor(b"x\ny", kind=77) + bytes(64)), r"'x\\ny' is of ggml type 77"),
    "unknown type": (header(1, 0, tensor(kind=4) + bytes(64)), "ggml type 4,"),
    "five dimensions": (header(1, 0, tensor(shape=(1,) * 5) + bytes(64)), "5 dimensions"),
    "endless dimension": (header(1, 0, tensor(shape=(1 << 62, 4)) + bytes(64)), "more than any file"),
    "half a block": (header(1, 0, tensor(shape=(100, 4), kind=12) + bytes(640)), "blocks of 256"),
    "past the end": (header(1, 0, tensor(offset=1 << 40) + bytes(64)), "bytes more than there are"),
    "misaligned": (header(1, 0, tensor(offset=4) + bytes(64)), "not a multiple of 32"),
    "overlapping": (header(2, 0, tensor() + tensor(b"y") + bytes(128)), "overlaps"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, what):
    data, words = BROKEN[what]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=words) as refused:
        read(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_is_refused_wherever_it_is_cut(tmp_path):
    data, path = write(tmp_path / "whole.gguf").read_bytes(), tmp_path / "cut.gguf"
    padding = -len(contents()["int"].view(torch.uint8)) % 32
    for size in range(0, len(data) - padding, 13):
        path.write_bytes(data[:size])
        with pytest.raises(BadCheckpoint):
            read(path)


def test_there_is_no_such_file(tmp_path):
    with pytest.raises(BadCheckpoint, match="No such file"):
        read(tmp_path / "none.gguf")


def test_entries_hold_the_place_of_the_bytes(tmp_path):
    path = write(tmp_path / "a.gguf")
    entry = read(path).tensors["experts"].entry
    assert entry == Entry((3, 4, 288), torch.uint8, path, entry.offset)
    assert torch.equal(entry.read(1, 2)[0], contents()["experts"][1])
