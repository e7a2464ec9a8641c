"""Transformers with GPTQModel's kernels loads our gptq and awq folders: every weight is what `decode()` says, and so
are the outputs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte import demo
from halfbyte.models.checkpoint import Checkpoint

CASES = [
    "gptq int4-g128", "gptq int4-g128-asym", "gptq int2-g32-asym", "gptq int3-g64", "gptq int3-g64-asym",
    "gptq int8-g64", "gptq int8-channel",
    "awq int4-g128", "awq int4-g64-asym", "awq int4-channel-asym",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
        reason="gptqmodel is not installed: see tests/requirements-oracles.txt",
    ),
]


def test_weights_and_outputs_are_those_of_decode(tmp_path):
    for case in CASES:
        to, grid = case.split()
        halfbyte.quantize(demo.MODEL, tmp_path / case, method="nearest", grid=grid, to=to)
    theirs = read_by_transformers([tmp_path / case for case in CASES], tmp_path / "theirs.pt")
    for case in CASES:
        checkpoint = Checkpoint.open(tmp_path / case)
        plain = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float16)
        state = plain.state_dict()
        assert theirs[case]["decoded"].keys() == checkpoint.quantized.keys(), case
        for module, w in theirs[case]["decoded"].items():
            ours = checkpoint.read_quantized(module).decode().half()
            assert torch.equal(w, ours), f"{case}: {module}"
            state[f"{module}.weight"].copy_(ours)
        with torch.no_grad():
            expected = plain(torch.arange(5, 69)[None]).logits
        # They multiply in another order; logits reach 18.
        torch.testing.assert_close(
            theirs[case]["logits"], expected, rtol=0, atol=0.05, msg=lambda m, case=case: f"{case}: {m}"
        )


def read_by_transformers(folders: list[Path], out: Path) -> dict:
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).parent / "gptqmodel_reads.py"), str(out), *map(str, folders)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(out)
