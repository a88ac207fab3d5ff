"""Features of a Gaussian mixture. A Frechet distance in them sees the masses, means and variances of the modes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdistill_core.images import centred
from mmdistill_core.networks.extractor import Extractor, Making


@dataclass(frozen=True)
class MixtureConfig:
    modes: int
    dims: int


class Mixture(Extractor):
    """features r_j and r_j (x - m_j) / sqrt(S_j) for each mode j, [b, modes (1 + dims)]; logits log r_j.

    r_j(x) is the posterior weight of mode j under the density sum_j p_j N(m_j, S_j I). Images are treated as vectors of `dims`.
    """

    kind, classes, Config, needs_labels = "mixture", "labels", MixtureConfig, True
    title = (
        "a Gaussian mixture: the posterior weights of its modes, and the offsets from their means times these weights"
    )
    weights: Tensor
    means: Tensor
    variances: Tensor

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weights", torch.full((config.modes,), 1 / config.modes))
        self.register_buffer("means", torch.zeros(config.modes, config.dims))
        self.register_buffer("variances", torch.ones(config.modes))

    @classmethod
    def made(cls, making: Making) -> tuple[Extractor, float | None]:
        if (exact := making.exact) is not None:
            return cls.of(weights=exact.weights, means=exact.means, variances=exact.variances), None
        images, label, _, _ = making.examples()
        known = label >= 0
        return cls.fitted(centred(images[known]), label[known], modes=making.num_classes), None

    @staticmethod
    def of(*, weights: Tensor, means: Tensor, variances: Tensor) -> Mixture:
        """weights [j], means [j, d], variances [j] > 0."""
        mixture = Mixture(MixtureConfig(*means.shape))
        values = {"weights": weights, "means": means, "variances": variances}
        mixture.load_state_dict({name: value.float() for name, value in values.items()})
        return mixture

    @staticmethod
    def fitted(images: Tensor, labels: Tensor, *, modes: int) -> Mixture:
        """The mixture whose mode j has the mass, mean and variance of the images with label j."""
        x, counts = images.flatten(1).double(), torch.bincount(labels, minlength=modes)
        if int(counts.min()) < 2:
            raise ValueError(f"labels: mode {int(counts.argmin())} has {int(counts.min())} samples, 2 are needed")
        parts = [x[labels == j] for j in range(modes)]
        means = torch.stack([part.mean(0) for part in parts])
        variances = torch.stack([part.var(0).mean() for part in parts]).clamp_min(1e-6)
        return Mixture.of(weights=counts / counts.sum(), means=means, variances=variances)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        offset = (images.flatten(1)[:, None, :] - self.means) / self.variances.sqrt()[:, None]  # [b, j, d]
        density = self.weights.log() - self.config.dims / 2 * self.variances.log() - offset.square().sum(-1) / 2
        log_r = density.log_softmax(dim=1)
        r = log_r.exp()
        return torch.cat([r, (r[..., None] * offset).flatten(1)], dim=1), log_r
