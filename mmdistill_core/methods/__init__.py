"""Every method, by the name that recipes and the command line use."""

from mmdistill_core.methods.base import Method
from mmdistill_core.methods.denoising import Denoising
from mmdistill_core.methods.moment_matching import MomentMatching
from mmdistill_core.plugins import named

METHODS: dict[str, type[Method]] = {
    "denoising": Denoising,
    "moment_matching": MomentMatching,
}
"""The methods of this package. Others are named by entry point, or as "module:Class"."""


def method_class(name: str) -> type[Method]:
    """Raises ValueError for an unknown name."""
    found: type[Method] = named(name, table=METHODS, group="methods")
    return found
