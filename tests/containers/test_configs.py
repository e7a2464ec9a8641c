"""What config.json says, as engines read it; and that a grid's bits are the bytes that containers store."""

import re
from contextlib import suppress

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_named_modules
from safetensors.torch import save_file
from torch import nn

from halfbyte.containers.awq import AWQ
from halfbyte.containers.compressed.container import CompressedTensors
from halfbyte.containers.gptq import GPTQ
from halfbyte.containers.safetensors import read_header
from halfbyte.errors import Unsupported
from halfbyte.grids import GRIDS, parse
from halfbyte.grids.quantized import Quantized
from halfbyte.targets.table import TARGETS
from halfbyte.targets.target import Target

LAYERS = [
    f"model.layers.{i}.{n}"
    for i in range(12)
    for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
EXPERTS = [
    f"model.layers.{i}.mlp.experts.{e}.{n}"
    for i in range(2)
    for e in (0, 7, 10)
    for n in ("gate_proj", "up_proj", "down_proj")
]


def quantized(name, out=64, width=128):
    grid = parse(name)
    w = torch.randn(out, width, generator=torch.Generator().manual_seed(0))
    params = grid.fit(w, None)
    return Quantized(grid, grid.encode(w, params), params)


def held() -> list[tuple[str, Target]]:
    """Every grid with each target that holds it."""
    found = []
    for name in GRIDS:
        for target in TARGETS.values():
            with suppress(Unsupported):
                target.check(target.resolve(parse(name), torch.bfloat16), (128, 256))
                found.append((name, target))
    return found


def test_every_grid_and_every_target_are_among_those_held():
    assert {name for name, _ in held()} >= {*GRIDS} - {"iq1_s", "iq1_m", "mxfp8-e5m2", "mxfp6-e3m2", "fp8-e5m2-channel"}
    assert {target.name for _, target in held()} == {*TARGETS}


@pytest.mark.parametrize(("name", "target"), held(), ids=str)
def test_bits_are_the_bytes_of_codes_scales_and_zero_points(name, target):
    shape, scheme = (128, 256), target.resolve(parse(name), torch.bfloat16)
    # Not counted: shapes, labels, tables, the order of a file without one, and zero points that a container makes a
    # symmetric grid store.
    uncounted = {"weight_shape", "g_idx", "weight_format"} | (
        {"qzeros"} if getattr(scheme, "symmetric", False) else set()
    )
    uncounted |= {
        "weight.quant_map",
        "weight.nested_quant_map",
        *(s for s in target.specs(scheme, shape) if "quant_state" in s),
    }  # tables and labels
    stored = sum(spec.size_bytes for suffix, spec in target.specs(scheme, shape).items() if suffix not in uncounted)
    stored += 4 if "double" in name else 0  # the offset of the scales lies among the labels
    assert scheme.weight.bits(shape) * shape[0] * shape[1] == stored * 8


def test_narrow_rows_have_the_bits_that_are_said(tmp_path):
    """5 to 8 bits of 8 in-features all fill two words."""
    for bits in range(5, 9):
        q = quantized(f"int{bits}-channel", width=8)
        save_file({f"a.{n}": t for n, t in CompressedTensors().pack(q).items()}, tmp_path / "x.safetensors")
        config = CompressedTensors().config({"a": q.grid}, [], torch.float16)
        assert CompressedTensors().find(config, read_header(tmp_path / "x.safetensors")) == {"a": (q.grid, q.shape)}


@pytest.mark.parametrize("name", ["int4-g128", "int4-channel", "int4-g128-asym", "int4-g64"])
@pytest.mark.parametrize("kind", [CompressedTensors, GPTQ, AWQ])
def test_a_row_of_one_group_keeps_its_name(name, kind, tmp_path):
    """int4-g128 on 128 in-features: by shape it might be a channel, and a container of one grid would then hold two."""
    container, q = kind(), quantized(name)
    grid = container.resolve(q.grid, torch.float16)
    q = q._replace(grid=grid, params={**q.params, "scale": q.params["scale"].half()})
    save_file({f"a.{n}": t for n, t in container.pack(q).items()}, tmp_path / "x.safetensors")
    config = container.config({"a": grid}, [], torch.float16)
    found, shape = kind().find(config, read_header(tmp_path / "x.safetensors"))["a"]
    assert (found.with_scale("fp16"), shape) == (grid.with_scale("fp16"), q.shape)


def test_the_head_is_named_where_engines_ask_for_it():
    grids = dict.fromkeys([*LAYERS, "lm_head"], parse("int4-g128"))
    one = CompressedTensors().config(grids, [], torch.bfloat16)["config_groups"]
    assert [g["targets"] for g in one.values()] == [["Linear", "re:.*lm_head$"]]
    mixed = CompressedTensors().config({**grids, "lm_head": parse("int8-channel")}, [], torch.bfloat16)["config_groups"]
    assert [
        any(re.match(t.removeprefix("re:"), "language_model.lm_head") for t in g["targets"]) for g in mixed.values()
    ] == [False, True]
    layers = dict.fromkeys(LAYERS, parse("int4-g128"))
    assert CompressedTensors().config(layers, ["lm_head"], torch.bfloat16)["config_groups"]["group_0"]["targets"] == [
        "Linear"
    ]
    assert AWQ().config(grids, [], torch.bfloat16)["lm_head"] is True
    assert GPTQ().config(grids, [], torch.bfloat16)["lm_head"] is True
    assert "lm_head" not in AWQ().config(layers, ["lm_head"], torch.bfloat16)


def test_targets_reach_exactly_their_modules():
    """As the compressed-tensors package matches them, with numbers of one and two digits."""
    grids = {
        name: parse("int8-channel" if name.endswith("down_proj") or ".1." in name else "int4-g128") for name in LAYERS
    }
    config = QuantizationConfig.model_validate(CompressedTensors().config(grids, ["lm_head"], torch.bfloat16))
    model = nn.Module()
    for name in [*LAYERS, "lm_head"]:
        head, _, last = name.rpartition(".")
        at = model
        for part in head.split(".") if head else []:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, nn.Linear(1, 1))
    for scheme in config.config_groups.values():
        found = {name for name, _ in match_named_modules(model, scheme.targets, config.ignore)}
        assert found == {name for name, grid in grids.items() if grid.levels.bits == scheme.weights.num_bits}


def overrides(dynamic, name):
    """As vLLM's and GPTQModel's get_dynamic_override: the first pattern that matches."""
    for pattern, settings in dynamic.items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else settings
    return {}


def test_gptq_rules_reach_modules_and_what_vllm_makes_of_them():
    grids = {name: parse("int8-channel" if "layers.1." in name else "int4-g128") for name in LAYERS + EXPERTS}
    dynamic = GPTQ().config(grids, ["model.layers.0.mlp.gate", "lm_head"], torch.bfloat16)["dynamic"]
    for name, grid in grids.items():
        assert overrides(dynamic, name).get("bits", 4) == grid.levels.bits
    assert overrides(dynamic, "model.layers.1.self_attn.qkv_proj")["bits"] == 8
    assert overrides(dynamic, "model.layers.2.self_attn.qkv_proj") == {}
    assert overrides(dynamic, "model.layers.0.mlp.gate") is None
    assert overrides(dynamic, "lm_head") == {}


def test_gptq_rules_name_all_experts_as_one():
    grids = {**dict.fromkeys(LAYERS, parse("int4-g128")), **dict.fromkeys(EXPERTS, parse("int8-g128"))}
    dynamic = GPTQ().config(grids, [], torch.bfloat16)["dynamic"]
    assert all(overrides(dynamic, name)["bits"] == 8 for name in [*EXPERTS, "model.layers.0.mlp.experts"])
    assert overrides(dynamic, "model.layers.0.mlp.up_proj") == {}
    kept = GPTQ().config(dict.fromkeys(LAYERS, parse("int4-g128")), EXPERTS, torch.bfloat16)["dynamic"]
    assert overrides(kept, "model.layers.1.mlp.experts") is None
