"""Every method, by the name that recipes and the command line use."""

from mmdistill_core.methods.base import Batch, Losses, Method, Networks, Phase, Role
from mmdistill_core.methods.denoising import Denoising
from mmdistill_core.methods.moment_matching import MomentMatching

METHODS: dict[str, type[Method]] = {
    "denoising": Denoising,
    "moment_matching": MomentMatching,
}

__all__ = ["METHODS", "Batch", "Denoising", "Losses", "Method", "MomentMatching", "Networks", "Phase", "Role"]
