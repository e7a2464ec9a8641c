"""Tables in 80 columns: neither a number nor a name is cut."""

import io

import pytest
from rich.console import Console

import tiny
from halfbyte import display
from halfbyte.errors import plural
from halfbyte.report import types

LONG = "a-model-whose-name-is-as-long-as-those-of-real-models-are-Instruct-v0.3-Q4_K_M.gguf"


def rendered(parts) -> str:
    console = Console(file=io.StringIO(), width=80)
    for part in parts:
        console.print(part, markup=False, highlight=False)
    return console.file.getvalue()


def model(path, kv=None) -> types.Divergence:
    return types.Divergence(
        path=path,
        kv=kv,
        tokens=123456,
        nll=9.421,
        kl=0.123456,
        kl_error=0.0123456,
        kl_median=0.01234,
        kl_p99=12.3456,
        kl_max=123.456,
        perplexity=12345.678,
        same_top=0.98765,
        probability_change=0.0,
        probability_change_rms=0.12345,
        size_bytes=123_456_700_000,
        kl_minus_first=(0.1, 0.2),
    )


def weight(name) -> types.WeightReport:
    return types.WeightReport(
        name=name, grid="int8-channel/int8-token", shape=(2, 2), bits_per_weight=8.125, error=0.123456
    )


EVALUATION = types.Evaluation(
    compared="predictions",
    text="heldout",
    length=512,
    windows=2,
    tokens_sha256="",
    convention="served",
    reference=types.Perplexity(tokens=123456, nll=9.421, perplexity=12345.678),
    reference_path=f"/home/{LONG}",
    models=[model(f"/models/{LONG}"), model("/models/b", "fp8-e4m3-head")],
)
DEMO = types.DemoRow(
    method="smoothquant+gptq",
    grid="int4-g128-asym",
    container="gptq",
    bits_per_weight=4.157,
    size_bytes=123_456_700_000,
    kl=0.123456,
    kl_error=0.0123456,
    same_top=0.98765,
    perplexity=12345.678,
    seconds=123.4,
)
RECALLED = [types.Recalled(length=131072, depth=i / 9, gain=-12.34, found=1.0) for i in range(10)]
NEEDLE = types.Needle(
    text="heldout",
    lengths=[131072],
    depths=10,
    facts=8,
    seed=0,
    reference_path=LONG,
    reference=RECALLED,
    models=[types.NeedleModel(path=LONG, rows=RECALLED)],
)
CACHE = types.CacheReport(
    grid="fp8-e4m3",
    observer="max",
    calibration=types.CalibrationReport(source="default", windows=(2, 8), tokens_sha256=""),
    rows=[
        types.AttentionReport(
            module=f"model.layers.{i}.self_attn", key_scale=12.34567, value_scale=None, keys_clipped=1.0
        )
        for i in (1, 2)
    ],
    most_clipped=1.0,
    serve="",
    warnings=[],
)
EXPERTS = [weight(f"model.layers.{i}.block_sparse_moe.experts.127.down_projection") for i in (1, 2)]
PARTS = {
    "eval": (
        display.evaluated(EVALUATION),
        ["0.12346 ± 0.01235", "12345.678", "98.77 %", "12.3456", "123.456", "123456.7"],
    ),
    "worst": (display.worst(EXPERTS, "outputs"), ["0.1235", "8.125"]),
    "demo": (display.demonstrated([DEMO]), ["0.12346 ± 0.01235", "12345.68", "123456.70", "123.4"]),
    "needle": (display.needles(NEEDLE), ["-12.34 → -12.34", "131072", "100 % → 100 %"]),
    "cache": (display.cached(CACHE), ["12.34567", "100.0000 %"]),
}


@pytest.mark.parametrize("name", PARTS)
def test_nothing_is_cut(name):
    parts, numbers = PARTS[name]
    text = rendered(parts)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for number in numbers:
        assert number in text


def test_a_long_name_goes_on_in_the_next_line():
    text = rendered([display.table(["model", "MB", "rest"], [[LONG, "123.45", "x" * 40]])])
    assert LONG in "".join(line.split("123.45")[0].strip() for line in text.splitlines()[2:])


def test_what_all_names_share_is_said_once():
    shared, names = display.without_prefix(["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj"])
    assert (shared, names) == ("model.layers.", ["0.mlp.up_proj", "11.mlp.up_proj"])
    assert display.without_prefix(["lm_head"]) == ("", ["lm_head"])
    assert display.without_prefix(["lm_head", "model.layers.0.q"]) == ("", ["lm_head", "model.layers.0.q"])


def test_one_is_no_several(tmp_path):
    assert [plural(n, "window") for n in (0, 1, 2)] == ["0 windows", "1 window", "2 windows"]
    assert plural(1, "matrix", "matrices") == "1 matrix"
    model = tiny.make(tmp_path / "model", num_hidden_layers=1)
    tiny.text(tmp_path / "text.txt")
    words = ["--calibration", tmp_path / "text.txt", "--samples", "1", "--length", "64"]
    assert tiny.halfbyte("quantize", model, "-o", tmp_path / "out", "--method", "gptq", *words).code == 0
    assert "Calibrated on 1 window of 64 tokens" in " ".join((tmp_path / "out" / "README.md").read_text().split())
    measured = ["--against", model, "--text", tmp_path / "text.txt", "--length", "64", "--windows", "1"]
    assert "1 window of 64 tokens" in tiny.halfbyte("eval", tmp_path / "out", *measured).out
    assert "Measured" in (card := (tmp_path / "out" / "README.md").read_text())
    assert "1 windows" not in card
