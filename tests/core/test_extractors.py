"""Extractors: loading restores what was saved, and each computes its kind of features."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from mmdistill_core.artifact import EXTRACTORS, NotAModel, load_extractor, save_extractor
from mmdistill_core.metrics.frechet import frechet_distance, moments
from mmdistill_core.networks.classifier import Classifier, ClassifierConfig
from mmdistill_core.networks.exact import ring_of_gaussians
from mmdistill_core.networks.extractor import Examples, Making
from mmdistill_core.networks.inception import (
    BlockE,
    Inception,
    NotInception,
    load_inception,
    max_pool,
    mean_pool,
    resized,
)
from mmdistill_core.networks.mixture import Mixture
from mmdistill_core.networks.pixels import Pixels
from mmdistill_core.networks.random_features import RandomFeatures, RandomFeaturesConfig


@pytest.fixture(scope="module")
def inception():
    """Random weights and statistics, so that an exchange of two layers would show."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return network.requires_grad_(False).eval()


def ring(modes=4):
    exact = ring_of_gaussians(modes=modes, radius=0.5, variance=0.01, schedule=None)
    return Mixture.of(weights=exact.weights, means=exact.means, variances=exact.variances), exact


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_round_trip(tmp_path, kind, inception):
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig(8, 1, 10)).eval()
    classifier.fit_scale(torch.randn(40, 1, 8, 8))
    random = RandomFeatures(RandomFeaturesConfig(8, 1))
    random.fit_scale(torch.rand(40, 1, 8, 8))
    before = {
        "classifier": classifier, "inception": inception, "mixture": ring()[0], "pixels": Pixels(), "random": random
    }[kind]  # fmt: skip
    assert before.kind == kind
    images = torch.rand(3, 2, 1, 1) if kind == "mixture" else torch.rand(3, 1, 8, 8) * 2 - 1
    save_extractor(tmp_path / "e", before, provenance={"from": "a test"})
    after = load_extractor(tmp_path / "e")
    assert after.fingerprint() == before.fingerprint()
    for a, b in zip(after.features_and_logits(images), before.features_and_logits(images), strict=True):
        assert (a is None) == (b is None) == (a is None and kind in ("pixels", "random"))
        assert a is None or (torch.equal(a, b) and a.isfinite().all() and len(a) == 3)
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"weights.safetensors", "model.json"}
    assert json.loads((tmp_path / "e" / "model.json").read_text())["provenance"] == {"from": "a test"}


def test_a_folder_of_another_kind_is_refused(tmp_path):
    save_extractor(tmp_path / "e", Pixels(), provenance={})
    (tmp_path / "e" / "model.json").write_text(json.dumps({"format": 1, "kind": "denoiser"}))
    with pytest.raises(NotAModel, match="classifier or inception or mixture or pixels or random"):
        load_extractor(tmp_path / "e")


def test_features_do_not_depend_on_the_batch():
    extractor, images = Pixels(), torch.rand(2500, 1, 2, 2)
    assert torch.equal(extractor.extract(images), images.flatten(1))


def test_inception_has_the_published_sizes(inception):
    """Torchvision states 27,161,264 parameters with 1,000 classes and an auxiliary head of 3,326,696."""
    count = sum(p.numel() for p in inception.parameters())
    assert count == 27_161_264 - 3_326_696 + 8 * 2049
    seen = {}
    for name, module in inception.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: tuple(out.shape[1:])}))
    features, logits = inception.features_and_logits(torch.zeros(1, 3, 32, 32))
    assert seen == {
        "Conv2d_1a_3x3": (32, 149, 149),
        "Conv2d_2a_3x3": (32, 147, 147),
        "Conv2d_2b_3x3": (64, 147, 147),
        "Conv2d_3b_1x1": (80, 73, 73),
        "Conv2d_4a_3x3": (192, 71, 71),
        "Mixed_5b": (256, 35, 35),
        "Mixed_5c": (288, 35, 35),
        "Mixed_5d": (288, 35, 35),
        **dict.fromkeys(("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), (768, 17, 17)),
        "Mixed_7a": (1280, 8, 8),
        "Mixed_7b": (2048, 8, 8),
        "Mixed_7c": (2048, 8, 8),
    }
    assert features.shape == (1, 2048)
    assert logits.shape == (1, 1008)
    torch.testing.assert_close(logits, inception.fc(features) - inception.fc.bias, atol=1e-5, rtol=1e-5)


def test_inceptions_pools():
    """The mean leaves out padding, so constant images stay constant up to the edge. Only the last block takes the maximum."""
    ones = torch.ones(1, 2, 5, 5)
    assert torch.equal(mean_pool(ones), ones)
    corner = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert mean_pool(corner)[0, 0, 0, 0] == (0 + 1 + 5 + 6) / 4
    assert max_pool(corner)[0, 0, 0, 0] == 6
    assert (BlockE(8, last=False).pool, BlockE(8, last=True).pool) == (mean_pool, max_pool)


def test_inceptions_input():
    """8 bits as in a file; half-pixel bilinear resizing; grey becomes three equal channels."""
    bytes_ = torch.randint(0, 256, (2, 1, 5, 7), generator=torch.Generator().manual_seed(0))
    images = bytes_ / 127.5 - 1
    out = resized(images)
    assert out.shape == (2, 3, 299, 299)
    assert torch.equal(out[:, 0], out[:, 2])
    assert torch.equal(out, resized(images + 0.9 / 255)), "less than half a grey level is rounded away"
    # Pixel i lies at (i + 1/2) 5/299 - 1/2 of the source: rows 100 and 101 of it between source rows 1 and 2.
    for i in (100, 101, 150):
        place = (i + 0.5) * 5 / 299 - 0.5
        low, share = int(place), place - int(place)
        column = F.interpolate(images, size=(5, 299), mode="bilinear", align_corners=False)[:, 0]
        torch.testing.assert_close(
            out[:, 0, i], (1 - share) * column[:, low] + share * column[:, low + 1], atol=1e-5, rtol=0
        )
    torch.testing.assert_close(resized(torch.full((1, 3, 4, 4), 7.0)), torch.ones(1, 3, 299, 299))  # clipped


def test_inceptions_weights_from_files(tmp_path, inception):
    weights = {k: w for k, w in inception.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(weights | {"AuxLogits.fc.bias": torch.zeros(1008)}, tmp_path / "new.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("new.pth", "old.pth", "w.safetensors"):
        assert load_inception(tmp_path / name).fingerprint() == inception.fingerprint()


def test_other_weights_are_refused_in_a_line(tmp_path, inception):
    weights = {k: w for k, w in inception.state_dict().items() if not k.endswith("num_batches_tracked")}
    stem = weights["Conv2d_1a_3x3.conv.weight"]
    less = {k: w for k, w in weights.items() if k != "fc.weight"}
    bad = {
        "no such file": None,
        r"fc.weight is not in it; 471 of 472": less,
        r"fc.weight is \[1000, 2048\], \[1008, 2048\] is expected": less | {"fc.weight": torch.zeros(1000, 2048)},
        r"conv0 is not of this network": weights | {"conv0": stem},
        "something else than named tensors": {"state_dict": weights},
        "not a state dict": b"not a file of torch",
    }
    for said, content in bad.items():
        path = tmp_path / "w.pth"
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(NotInception, match=said) as caught:
            load_inception(path)
        assert "\n" not in str(caught.value)


class Runs:
    """A file from a stranger might hold this."""

    def __reduce__(self):
        return (print, ("run",))


def test_weights_that_would_run_code_are_refused(tmp_path, capsys):
    torch.save({"a": Runs()}, tmp_path / "w.pth")
    with pytest.raises(NotInception, match="not a state dict"):
        load_inception(tmp_path / "w.pth")
    assert capsys.readouterr().out == ""


def test_the_fingerprint_is_of_the_weights(inception):
    other = Inception()
    other.load_state_dict(inception.state_dict())
    assert other.fingerprint() == inception.fingerprint()
    with torch.no_grad():
        other.fc.bias[0] += 1
    assert other.fingerprint() != inception.fingerprint()


def test_mixture_logits_are_the_posterior():
    extractor, exact = ring()
    x, _ = exact.sample(50, rng=torch.Generator().manual_seed(0))
    x = 3 * x  # off the modes too
    features, logits = extractor.features_and_logits(x[:, :, None, None])
    modes = torch.distributions.MultivariateNormal(exact.means, 0.01 * torch.eye(2))
    joint = exact.weights.log() + modes.log_prob(x[:, None])
    torch.testing.assert_close(logits, joint - joint.logsumexp(1, keepdim=True), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(features[:, :4], logits.exp())
    offsets = logits.exp()[..., None] * (x[:, None] - exact.means) / 0.1
    torch.testing.assert_close(features[:, 4:], offsets.flatten(1), atol=1e-4, rtol=1e-4)


def test_mixture_features_see_masses_means_and_variances():
    extractor, exact = ring()
    rng = torch.Generator().manual_seed(0)

    def distance(x):
        real, _ = exact.sample(4000, rng=rng)
        a, b = (moments(extractor.extract(points[:, :, None, None])) for points in (x, real))
        return frechet_distance(a, b)

    x, label = exact.sample(4000, rng=rng)
    assert distance(x) < 0.03
    assert distance(x[label != 2]) > 0.1, "a mode that is missing"
    assert distance(x + torch.tensor([0.05, 0.0])) > 0.1, "half a standard deviation aside"
    assert distance(exact.means[label] + 0.3 * (x - exact.means[label])) > 0.3, "narrow modes"


def test_a_mixture_is_fitted_to_labels():
    _, exact = ring()
    x, label = exact.sample(20_000, rng=torch.Generator().manual_seed(0))
    fitted = Mixture.fitted(x[:, :, None, None], label, modes=4)
    torch.testing.assert_close(fitted.weights, exact.weights, atol=0.015, rtol=0)
    torch.testing.assert_close(fitted.means, exact.means, atol=0.006, rtol=0)
    torch.testing.assert_close(fitted.variances, exact.variances, atol=0, rtol=0.06)
    with pytest.raises(ValueError, match="mode 4 has 0 samples"):
        Mixture.fitted(x[:, :, None, None], label, modes=5)


A = "branch1x1 | branch5x5_1 branch5x5_2:2 | branch3x3dbl_1 branch3x3dbl_2:1 branch3x3dbl_3:1 | mean branch_pool"
B = "branch3x3/2 | branch3x3dbl_1 branch3x3dbl_2:1 branch3x3dbl_3/2 | halve"
C = (
    "branch1x1 | branch7x7_1 branch7x7_2:0,3 branch7x7_3:3,0 | "
    "branch7x7dbl_1 branch7x7dbl_2:3,0 branch7x7dbl_3:0,3 branch7x7dbl_4:3,0 branch7x7dbl_5:0,3 | mean branch_pool"
)
D = "branch3x3_1 branch3x3_2/2 | branch7x7x3_1 branch7x7x3_2:0,3 branch7x7x3_3:3,0 branch7x7x3_4/2 | halve"
E = (
    "branch1x1 | branch3x3_1 branch3x3_2a:0,1 | branch3x3_1 branch3x3_2b:1,0 | "
    "branch3x3dbl_1 branch3x3dbl_2:1 branch3x3dbl_3a:0,1 | branch3x3dbl_1 branch3x3dbl_2:1 branch3x3dbl_3b:1,0 | {} branch_pool"
)
BLOCKS = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D, "7b": E.format("mean"),
          "7c": E.format("max")}  # fmt: skip
"""The network of 1512.00567 as it was ported for FID: name:padding/stride, branches in their order."""


def test_inception_is_the_network_of_the_table(inception):
    """Runs the weights in an interpreter of the table, so that a wrong kernel, padding, pool or order of branches shows."""
    state = inception.state_dict()

    def conv(name, x):
        name, _, stride = name.partition("/")
        name, _, padding = name.partition(":")
        bn = {key: state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        pads = [int(p) for p in padding.split(",")] if padding else [0]
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=int(stride or 1), padding=pads * (2 // len(pads)))
        return F.relu(F.batch_norm(x, **bn, eps=1e-3))

    pools = {
        "mean": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        "max": lambda x: F.max_pool2d(x, 3, 1, 1),
        "halve": lambda x: F.max_pool2d(x, 3, 2),
    }

    def block(name, table, x):
        branches = []
        for branch in table.split(" | "):
            y = x
            for part in branch.split():
                y = pools[part](y) if part in pools else conv(f"Mixed_{name}.{part}", y)
            branches.append(y)
        return torch.cat(branches, 1)

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = resized(images)
    for part in [
        "Conv2d_1a_3x3/2",
        "Conv2d_2a_3x3",
        "Conv2d_2b_3x3:1",
        "halve",
        "Conv2d_3b_1x1",
        "Conv2d_4a_3x3",
        "halve",
    ]:
        x = pools[part](x) if part in pools else conv(part, x)
    for name, table in BLOCKS.items():
        x = block(name, table, x)
    features, logits = inception.features_and_logits(images)
    torch.testing.assert_close(features, x.mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, features @ state["fc.weight"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "patch"), [(8, 1), (32, 1), (37, 1), (48, 1), (64, 2), (100, 2), (128, 4)])
def test_a_classifier_reads_large_images_in_patches(size, patch):
    """All pixels are read, and the layers are no larger than for an image of LARGEST to 2 LARGEST pixels a side."""
    config = ClassifierConfig(image_size=size, channels=3, num_classes=2)
    assert config.patch == patch
    images = torch.zeros(1, 3, size, size, requires_grad=True)
    Classifier(config)(images).sum().backward()
    assert (images.grad != 0).all()


def test_a_classifier_sees_bytes_as_it_sees_floats_and_knows_when_it_can_not_be_tested():
    values = torch.randint(0, 256, (120, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    label, held = torch.arange(120) % 3, torch.arange(120) < 30

    def fit(images, held):
        return Classifier.made(Making(lambda: Examples(images, label, ~held, held), num_classes=3, epochs=1))

    assert fit(values, held)[0].fingerprint() == fit(values / 127.5 - 1, held)[0].fingerprint()
    assert fit(values, held & False)[1] is None
    with pytest.raises(ValueError, match="no labelled image to train it on"):
        fit(values, held | True)


def test_random_features_are_of_no_data_but_for_their_scale_and_see_what_is_wrong():
    """Blurred, shifted or noisy images are far from the others, images of the same kind are not."""
    rng = torch.Generator().manual_seed(0)
    centre = torch.randint(2, 6, (2, 800), generator=rng)
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    squares = ((y - centre[0][:, None, None]).abs() < 2) & ((x - centre[1][:, None, None]).abs() < 2)
    images = squares[:, None].float() * 2 - 1
    network, accuracy = RandomFeatures.made(Making(lambda: Examples(images, None, None, None)))
    again, _ = RandomFeatures.made(Making(lambda: Examples(images.flip(0) / 2, None, None, None)))
    assert accuracy is None
    assert torch.equal(network.projection, again.projection)
    assert not torch.equal(network.scale, again.scale)

    def distance(these):
        return frechet_distance(moments(network.extract(these)), moments(network.extract(images[:400])))

    same = distance(images[400:])
    spoilt = [F.avg_pool2d(images, 3, 1, 1), images.roll(1, 2), images + 0.3 * torch.randn(images.shape, generator=rng)]
    assert all(distance(one[400:]) > 3 * same for one in spoilt)
