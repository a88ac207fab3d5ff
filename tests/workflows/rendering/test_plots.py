"""Plots of the report: what there is no place for on their scales."""

import warnings

import pytest

from mmdistill_core.methods.base import Curve
from workflows.rendering.plots import curve_in_training


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 2.0], [-1.0, 1e-9], [-1.0, -2.0]])
def test_a_curve_of_any_values_is_drawn_without_a_warning(signed, values):
    history = [(n, {"gap": value}) for n, value in enumerate(values, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "<svg" in curve_in_training({"k = 1": history}, Curve("gap", "the gap", "How far.", signed=signed))
