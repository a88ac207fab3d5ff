"""The Inception-v3 of the usual FID: the TensorFlow graph of 2015-12-05, with the names of its port to torch.

It differs from the Inception-v3 of model zoos: average pools leave out padding, the last block uses a maximum pool, and there are
1008 classes. The user names a file of weights; mmdistill includes none. docs/evaluation.md says where to find one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmdistill_core.networks.extractor import Extractor, Making

SIZE = 299


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, n: int, out: int, kernel: int | tuple[int, int], *, stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def wide(n: int, out: int, size: int) -> Conv:
    """A kernel of one row."""
    return Conv(n, out, (1, size), padding=(0, size // 2))


def tall(n: int, out: int, size: int) -> Conv:
    """A kernel of one column."""
    return Conv(n, out, (size, 1), padding=(size // 2, 0))


def mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(nn.Module):
    def __init__(self, n: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(n, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(n, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(n, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(n, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(mean_pool(x))], 1)


class BlockB(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(n, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(n, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    def __init__(self, n: int, c: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(n, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Conv(n, c, 1), wide(c, c, 7), tall(c, 192, 7)
        self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3 = Conv(n, c, 1), tall(c, c, 7), wide(c, c, 7)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = tall(c, c, 7), wide(c, 192, 7)
        self.branch_pool = Conv(n, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(mean_pool(x))], 1)


class BlockD(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(n, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(n, 192, 1), wide(192, 192, 7)
        self.branch7x7x3_3, self.branch7x7x3_4 = tall(192, 192, 7), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """`last`: pools by maximum."""

    def __init__(self, n: int, *, last: bool) -> None:
        super().__init__()
        self.pool = max_pool if last else mean_pool
        self.branch1x1 = Conv(n, 320, 1)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = Conv(n, 384, 1), wide(384, 384, 3), tall(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(n, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = wide(384, 384, 3), tall(384, 384, 3)
        self.branch_pool = Conv(n, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(self.pool(x)),
            ],
            1,
        )


@dataclass(frozen=True)
class InceptionConfig:
    classes: int = 1008


class Inception(Extractor):
    """features: the 2048 means of the last block. logits: without the bias, as in the reference's Inception score.

    Images are rounded to 8 bits, as in a file. Grey images are repeated over three channels.
    """

    kind, classes, Config, needs_weights = "inception", "own", InceptionConfig, True
    title = "the Inception-v3 of the FID, 2,048 of them"
    preprocessing = "8 bits, bilinear to 299x299 without antialiasing"
    batch = 50

    def __init__(self, config: InceptionConfig = InceptionConfig()) -> None:
        super().__init__()
        self.config = config
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, last=False), BlockE(2048, last=True)
        self.fc = nn.Linear(2048, config.classes)

    @classmethod
    def check(cls, *, shape: tuple[int, int, int], num_classes: int, weights: str | None = None) -> None:
        if shape[0] not in (1, 3):
            raise ValueError(f"inception takes 1 or 3 channels, and the images have {shape[0]}")
        if weights is not None:
            load_inception(weights)

    @classmethod
    def made(cls, making: Making) -> tuple[Extractor, float | None]:
        return load_inception(str(making.weights)), None

    def forward(self, x: Tensor) -> Tensor:
        """x [b, 3, 299, 299] in [-1, 1] -> the last block [b, 2048, 8, 8]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self(resized(images)).mean((2, 3))
        return features, features @ self.fc.weight.T


def resized(images: Tensor) -> Tensor:
    """[b, 1 or 3, h, w] in [-1, 1] -> [b, 3, 299, 299], rounded to 8 bits first."""
    x = ((images.expand(-1, 3, -1, -1) + 1) * 127.5).round().clamp(0, 255) / 255
    return 2 * F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=False) - 1


class NotInception(ValueError):
    """The file does not hold weights of this network; the message is one line."""


def load_inception(path: str | Path) -> Inception:
    """Loads a .safetensors file, or a .pth or .pt state dict (weights only). Raises NotInception."""
    values = _tensors(Path(path))
    inception = Inception()
    # Counters of training steps and the auxiliary head are not used.
    expected = {name: w.shape for name, w in inception.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = {
        name: w
        for name, w in values.items()
        if not name.startswith("AuxLogits.") and name.split(".")[-1] != "num_batches_tracked"
    }
    for name, shape in expected.items():
        if name not in found:
            raise NotInception(
                f"{path}: {name} is not in it; {len(found.keys() & expected.keys())} of {len(expected)} names are"
            )
        if found[name].shape != shape:
            raise NotInception(f"{path}: {name} is {list(found[name].shape)}, {list(shape)} is expected")
    if unknown := sorted(found.keys() - expected.keys()):
        raise NotInception(f"{path}: {unknown[0]} is not of this network")
    inception.load_state_dict({name: w.float() for name, w in found.items()})
    frozen: nn.Module = inception.requires_grad_(False).eval()
    assert isinstance(frozen, Inception)
    return frozen


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NotInception(f"{path}: no such file")
    try:
        values = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a file that is not a state dict may raise anything
        what = "a safetensors file" if path.suffix == ".safetensors" else "a state dict of torch.save"
        raise NotInception(f"{path}: not {what} ({str(error).splitlines()[0][:80]})") from error
    if not isinstance(values, Mapping) or not all(isinstance(w, Tensor) for w in values.values()):
        raise NotInception(f"{path}: holds something else than named tensors")
    return dict(values)
