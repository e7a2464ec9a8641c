"""What a report says of a matrix without calibration."""

import pytest
import torch

from halfbyte.grids import GRIDS, parse
from halfbyte.run import SAMPLED, weight_error
from halfbyte.solvers import SOLVERS

WRITTEN = [name for name in GRIDS if not name.startswith("iq1")]


@pytest.mark.parametrize("name", WRITTEN)
def test_the_error_over_some_rows_is_near_that_over_all(name):
    w = torch.randn(4 * SAMPLED // 256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    q = SOLVERS["minmax"](w, parse(name), None)
    assert weight_error(w, q) == pytest.approx(float((q.decode() - w).norm() / w.norm()), rel=0.02)
