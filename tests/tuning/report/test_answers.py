"""How sure the answers on a page are, and how often right."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from minbert.tuning.report.answers import BINS, calibrate


@given(st.integers(2, 5), st.integers(1, 200), st.integers(0, 2**31 - 1))
def test_calibration_is_torchmetrics(classes, examples, seed):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(classes, 0.4), examples)
    labels = random.integers(0, classes, examples)
    correct = probabilities.argmax(1) == labels
    wanted = multiclass_calibration_error(torch.from_numpy(probabilities), torch.from_numpy(labels), classes, BINS)
    found = calibrate(probabilities.max(1), correct)
    assert found.error == pytest.approx(float(wanted), abs=1e-6)
    assert found.counts.sum() == examples
    filled = found.counts > 0
    assert (found.counts[filled] * found.accuracy[filled]).sum() == pytest.approx(correct.sum())
