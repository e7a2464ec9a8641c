"""How modules of decoders are called: what engines fuse, and which expert a linear is of."""

import re
from collections.abc import Collection
from typing import NamedTuple


class Fused(NamedTuple):
    """Linears that engines make one matrix of."""

    parts: tuple[str, ...]
    module: str | None = None
    """What vLLM calls that matrix where rules of a config are matched against it; None: rules name the parts."""


# packed_modules_mapping of vllm model_executor/models/{llama,mixtral,qwen3_5}.py.
FUSED = (
    Fused(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    Fused(("gate_proj", "up_proj"), "gate_up_proj"),
    Fused(("w1", "w3")),
    Fused(("in_proj_qkv", "in_proj_z")),
    Fused(("in_proj_b", "in_proj_a")),
)
FUSED_OF = {part: fused for fused in FUSED for part in fused.parts}
SHARED = re.compile(r"(?P<before>(?:.*\.)?)shared_experts?\.[^.]+", re.DOTALL)
EXPERT = re.compile(r"(?P<before>(?:.*\.)?experts)\.(?P<number>\d+)\.(?P<after>.+)", re.DOTALL)


class Expert(NamedTuple):
    """A name of one expert's: `mlp.experts.3.up_proj` is the `up_proj` of number 3 in `mlp.experts`."""

    home: str
    number: int
    part: str

    @classmethod
    def of(cls, name: str) -> "Expert | None":
        """None for a name of no numbered expert."""
        match = EXPERT.fullmatch(name)
        return cls(match["before"], int(match["number"]), match["after"]) if match else None


def fused_set(module: str) -> tuple[str, Fused] | None:
    """What the module is fused in: where that lies, and of which parts it is; None for one that stays alone."""
    home, _, part = module.rpartition(".")
    return (home, FUSED_OF[part]) if part in FUSED_OF else None


def fused_names(modules: Collection[str]) -> list[str]:
    """What engines call the matrices that they make of these, where all parts are among them."""
    sets = {key for module in modules if (key := fused_set(module)) and key[1].module}
    present = set(modules)
    return sorted(f"{home}.{f.module}" for home, f in sets if all(f"{home}.{part}" in present for part in f.parts))


def with_experts(module: str) -> str | None:
    """The list of experts that the module is one of, or is beside of as a shared one; None for others."""
    if expert := Expert.of(module):
        return expert.home
    shared = SHARED.fullmatch(module)
    return f"{shared['before']}experts" if shared else None
