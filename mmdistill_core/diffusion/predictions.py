"""Predictions of a network, x / eps / v / flow, converted through one pivot, x: 2N conversions instead of N^2.

With z = alpha x + sigma eps and n^2 = alpha^2 + sigma^2:
    x     the clean data
    eps   the noise
    v     (alpha eps - sigma x) / n: for variance-preserving schedules the v of 2202.00512, for the others the same
          after z is scaled to z / n, which is EDM's preconditioning at unit data variance
    flow  eps - x: the velocity dz/dt of the linear path, in our direction of time
"""

from __future__ import annotations

from torch import Tensor

from mmdistill_core.diffusion.process import expand

PREDICTIONS = ("x", "eps", "v", "flow")


def _unknown(prediction: str) -> ValueError:
    return ValueError(f"prediction: {prediction!r} is not one of {', '.join(PREDICTIONS)}")


def x_from_prediction(*, prediction: str, value: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x from a network's output at noise level (alpha, sigma), each [b]; value and z are [b, ...]."""
    a, s = expand(alpha, like=z), expand(sigma, like=z)
    if prediction == "x":
        return value
    if prediction == "eps":
        return (z - s * value) / a
    if prediction == "v":
        n2 = a**2 + s**2
        return (a * z - s * n2.sqrt() * value) / n2
    if prediction == "flow":
        return (z - s * value) / (a + s)
    raise _unknown(prediction)


def prediction_from_x(*, prediction: str, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The output for x: the inverse of `x_from_prediction`, and the regression target of the parametrisation."""
    a, s = expand(alpha, like=z), expand(sigma, like=z)
    if prediction == "x":
        return x
    if prediction == "eps":
        return (z - a * x) / s
    if prediction == "v":
        n2 = a**2 + s**2
        return (a * z - n2 * x) / (s * n2.sqrt())
    if prediction == "flow":
        return (z - (a + s) * x) / s
    raise _unknown(prediction)
