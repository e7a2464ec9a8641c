"""What a refusal advises works when it is followed."""

import re

import pytest

import actorder
import halfbyte
import tiny
from halfbyte import demo, grids
from halfbyte.targets import choosing
from halfbyte.targets.table import TARGETS
from models.every import ENCODERS, EVERY

COMMAND = re.compile(r"halfbyte (?:quantize|convert|dequantize) [^;,()]+")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny.make(home / "model")
    halfbyte.quantize(home / "model", home / "int4", method="nearest", grid="int4-g32")
    halfbyte.quantize(home / "model", home / "actorder", method="nearest", grid="int4-g32", to="gptq")
    actorder.shuffle(home / "actorder")
    halfbyte.quantize(home / "model", home / "nf4", method="nearest", grid="nf4")
    halfbyte.quantize(demo.MODEL, home / "q4.gguf", method="nearest", grid="Q4_K_M")
    return home


REFUSED = {
    "a quantized folder": ["quantize", "int4", "-o", "out", "--method", "nearest", "--grid", "int8-channel"],
    "a quantized folder of another tool's grid": [
        "quantize",
        "nf4",
        "-o",
        "out",
        "--method",
        "nearest",
        "--grid",
        "int4-g32",
    ],
    "a quantized GGUF": ["quantize", "q4.gguf", "-o", "out.gguf", "--method", "nearest", "--grid", "Q8_0"],
    "a quantized GGUF into a folder": ["quantize", "q4.gguf", "-o", "out", "--method", "nearest", "--grid", "int4-g32"],
    "convert of what is not quantized": ["convert", "model", "-o", "out", "--to", "gptq"],
    "convert of a GGUF to a GGUF": ["convert", "q4.gguf", "-o", "out.gguf", "--to", "gguf", "--grid", "Q8_0"],
    "convert of a GGUF without a grid": ["convert", "q4.gguf", "-o", "out", "--to", "compressed-tensors"],
    "convert to another tool's grid": ["convert", "nf4", "-o", "out", "--to", "gptq"],
    "convert of activation order": ["convert", "actorder", "-o", "out", "--to", "gptq"],
    "quantize of activation order": [
        "quantize",
        "actorder",
        "-o",
        "out",
        "--method",
        "nearest",
        "--grid",
        "int4-g32",
        "--to",
        "gptq",
    ],
    "convert to bitsandbytes": ["convert", "int4", "-o", "out", "--to", "bitsandbytes"],
    "convert to fp8": ["convert", "int4", "-o", "out", "--to", "fp8"],
    "a file's name for a folder": [
        "quantize",
        "model",
        "-o",
        "out.gguf",
        "--to",
        "gptq",
        "--method",
        "nearest",
        "--grid",
        "int4-g32",
    ],
    "a preset for a folder": [
        "quantize",
        "model",
        "-o",
        "out",
        "--to",
        "gptq",
        "--method",
        "nearest",
        "--grid",
        "Q4_K_M",
    ],
}


def advised(words: list[str], message: str) -> list[list[str]]:
    """The commands that a message names, or the one that was given with the options that it names."""
    found = [command.strip().split()[1:] for command in COMMAND.findall(message)]
    options = re.findall(r"--(?:requantize|to|grid|method)(?: [\w-]+)?", COMMAND.sub("", message))
    for option in options:
        name, *value = option.split()
        kept = [w for i, w in enumerate(words) if name == "--requantize" or (w != name and words[i - 1] != name)]
        found.append([*kept, name, *value])
    return found


@pytest.mark.parametrize(("name", "is_measured"), [("t5", False), ("modernbert", False), ("gpt2", True)])
def test_what_cannot_be_measured_is_not_said_to_be(name, is_measured, tmp_path):
    folder, out = {**EVERY, **ENCODERS}[name].save(tmp_path / "model"), tmp_path / "out"
    words = ("--method", "nearest", "--grid", "int8-channel", "--engine", "none")
    made = tiny.halfbyte("quantize", folder, "-o", out, *words)
    assert made.code == 0, made.err
    assert ("halfbyte eval" in made.out + made.err) == is_measured
    card = (out / "README.md").read_text()
    assert ("this measures it" in card, "`halfbyte eval` runs decoders on text" in card) == (
        is_measured,
        not is_measured,
    )
    if not is_measured:
        text = tiny.text(tmp_path / "text.txt", 60)
        refusal = tiny.halfbyte("eval", out, "--against", folder, "--text", text, "--windows", 1, "--length", 16)
        assert refusal.code == 2


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_advice_can_be_followed(home, tmp_path, monkeypatch, words):
    monkeypatch.chdir(home)
    words = [str(tmp_path / w) if w.startswith("out") else w for w in words]
    result = tiny.halfbyte(*words)
    tiny.refused(result)
    commands = advised(words, result.err)
    assert commands, result.err
    for number, command in enumerate(commands):
        out = str(tmp_path / f"advised-{number}") + (".gguf" if any(w.endswith(".gguf") for w in command[2:]) else "")
        places = [out if w.startswith(("OUT", str(tmp_path))) else w for w in command]
        quick = [] if "--method" in places or places[0] != "quantize" else ["--method", "nearest"]
        followed = tiny.halfbyte(*places, *quick)
        assert followed.code == 0, (result.err, places, followed.err)


@pytest.mark.parametrize("length", ["64", "4096"])
def test_needles_advice_can_be_followed(home, length):
    words = ["needle", home / "int4", "--against", home / "model", "--depths", "1", "--facts", "1"]
    said = tiny.halfbyte(*words, "--length", length)
    tiny.refused(said, f"give a {'larger' if length == '64' else 'smaller'} --length")
    assert tiny.halfbyte(*words, "--length", "256").code == 0


@pytest.mark.parametrize(
    ("own", "to", "width", "like"),
    [
        ("q4_1", "compressed-tensors", 256, "int4-g128"),
        ("q5_k", "compressed-tensors", 256, "int5-g128"),
        ("q6_k", "gptq", 576, "int8-g64"),
        ("q4_k", "bitsandbytes", 256, "nf4-g64-double"),
        ("int8-channel", "fp8", 256, "fp8-e4m3-block"),
        ("nvfp4", "gptq", 48, "int4-channel"),
    ],
)
def test_a_grid_that_is_advised_is_as_wide_and_has_the_usual_groups(own, to, width, like):
    assert choosing._like(grids.parse(own), TARGETS[to], {(256, width), (width, width)}) == like
