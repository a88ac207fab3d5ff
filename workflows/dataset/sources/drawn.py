"""Synthetic data: points of a Gaussian mixture with a known density, and square images of coloured blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RING: dict[str, Any] = {"modes": 8, "radius": 0.7, "variance": 0.0025}
"""The mixture `gmm` in [-1, 1]^2. The edge is 6 standard deviations from the nearest mean, so no drawn point lies beyond it."""


def gmm(*, count: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """Draws points of RING as images of two channels and one pixel. The label is the Gaussian that the point was drawn from."""
    from mmdistill_core.diffusion.schedules import Cosine
    from mmdistill_core.rng import generator

    x, label = ring(schedule=Cosine()).sample(count, rng=generator(0))
    return (x.numpy()[:, :, None, None] + 1) / 2, label.numpy()


def ring(*, schedule: Any) -> Any:
    """Returns the optimal denoiser of RING for this noise schedule."""
    from mmdistill_core.networks.exact import ring_of_gaussians

    return ring_of_gaussians(**RING, schedule=schedule)


def made(*, shape: tuple[int, int, int], num_classes: int, count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Makes images of sixteen colour blocks around one hue per class, to try a recipe without its data."""
    import numpy as np

    channels, size, _ = shape
    rng, labels = np.random.default_rng(0), np.arange(count) % max(1, num_classes)
    hue = rng.random((max(1, num_classes), channels, 1, 1))
    blocks = (hue[labels] + rng.random((count, channels, 4, 4))) / 2
    block = np.arange(size) * 4 // size
    return blocks[:, :, block][..., block], labels
