"""The same cut of a step gives the same bits. Another cut the same gradient, within a stated tolerance."""

from __future__ import annotations

import pytest
from test_kills import script


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_same_bits_for_the_same_split_and_the_stated_tolerance_for_any_other(dtype, tolerance):
    """CHECKLIST 17: relative to the gradient's norm."""
    results = script("splits.py", "--dtype", dtype)[dtype]
    assert results["same bits"]
    assert len(results["splits"]) >= 5
    assert 0 < max(results["splits"].values()) < tolerance
