"""However many words models know and however many models there are: 1 GB beside the weights that are in memory at a
time."""

import subprocess
import sys

import pytest

import halfbyte
import tiny

WORDS, WIDTH, LENGTH = 1 << 18, 64, 512
BUDGET = 1e9
MEASURED = """
import sys
from resource import RUSAGE_SELF, getrusage
from halfbyte import evaluate
from halfbyte.evaluation import divergence
before = getrusage(RUSAGE_SELF).ru_maxrss
home, length, *models = sys.argv[1:]
evaluate(models, f"{home}/model", f"{home}/text.txt", int(length), windows=2)
print(1024 * (getrusage(RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process of its own is asked for its peak, which Linux keeps")
def test_logits_of_many_words_stay_within_the_budget(tmp_path):
    """All logits of one model would be 1.07 GB here, and what is made of them as much again."""
    tiny.make(tmp_path / "model", vocab_size=WORDS, hidden_size=WIDTH)
    tiny.text(tmp_path / "text.txt")
    models = [tmp_path / grid for grid in ("int8-channel", "int4-g64", "int3-g64")]
    for out in models:
        halfbyte.quantize(tmp_path / "model", out, method="nearest", grid=out.name)
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(LENGTH), *map(str, models)]
    said = subprocess.run(command, env=tiny.ALONE, capture_output=True, text=True, check=True)
    two_heads = 2 * WORDS * WIDTH * 4
    assert int(said.stdout) < BUDGET + two_heads
