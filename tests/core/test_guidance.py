"""Guidance, null labels, conditions: the formula, the inputs of each role, and what a model refuses."""

import pytest
import torch
from oracles import COSINE
from states import START
from torch import nn

from mmdistill_core.artifact import DiffusionModel, load_model, save_model
from mmdistill_core.diffusion.guidance import NULL_LABEL, drop_labels, guided, squeezed
from mmdistill_core.methods.base import Batch, Sampler
from mmdistill_core.methods.denoising import Denoising
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.dit import DiT, DiTConfig
from mmdistill_core.networks.exact import ring_of_gaussians
from mmdistill_core.rng import generator
from mmdistill_core.samplers.samplers import clipped_denoiser, guided_denoiser


def network(**options):
    torch.manual_seed(0)
    denoiser = Denoiser(backbone=DiT(DiTConfig(4, 1, 3, width=16, depth=1, heads=2, **options)), schedule=COSINE)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.3)
    return denoiser.requires_grad_(False).eval()


def inputs(b=6):
    rng = generator(1)
    return torch.randn(b, 1, 4, 4, generator=rng), torch.rand(b, generator=rng), torch.arange(b) % 3


def test_guidance_of_a_mixture_in_closed_form():
    """(1 + w) E[x | z, label] - w E[x | z]; 0 is off."""
    ring = ring_of_gaussians(modes=4, radius=1.0, variance=0.1, schedule=COSINE)
    z, t, label = torch.randn(16, 2, generator=generator(0)), torch.rand(16), torch.arange(16) % 4
    w = torch.linspace(0, 3, 16)
    got = guided(conditional=ring(z, t, label), unconditional=ring(z, t), w=w)
    torch.testing.assert_close(got, (1 + w)[:, None] * ring(z, t, label) - w[:, None] * ring(z, t))
    torch.testing.assert_close(got[0], ring(z, t, label)[0])
    half = guided_denoiser(ring, w=0.5)(z, t, label)
    torch.testing.assert_close(half, 1.5 * ring(z, t, label) - 0.5 * ring(z, t))
    assert clipped_denoiser(guided_denoiser(ring, w=9.0))(z, t, label).abs().max() <= 1


def test_labels_are_hidden_in_their_share():
    label = torch.arange(40_000) % 3
    hidden = drop_labels(label=label, share=0.1, rng=generator(0)) == NULL_LABEL
    assert hidden.double().mean().item() == pytest.approx(0.1, abs=0.006)
    assert torch.equal(drop_labels(label=label, share=0.0, rng=generator(0)), label)


def test_a_teacher_learns_the_null_label():
    seen = []

    def spy(z, t, label):
        seen.append(label)
        return z

    (phase,) = Denoising(schedule=COSINE, label_dropout=0.25).phases(START)
    phase.loss({"teacher": spy}, Batch(torch.randn(4000, 1), torch.ones(4000, dtype=torch.long)), generator(0), START)
    assert (seen[0] == NULL_LABEL).double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_null_label_and_no_label_are_one():
    denoiser, (z, t, label) = network(), inputs()
    torch.testing.assert_close(denoiser(z, t, torch.full_like(label, NULL_LABEL)), denoiser(z, t))
    assert not torch.allclose(denoiser(z, t, label), denoiser(z, t))


class TestConditions:
    def test_a_new_one_changes_nothing_until_it_is_trained(self):
        plain, (z, t, label) = network(), inputs()
        told = plain.conditioned_on("t", "guidance").conditioned_on("t").requires_grad_(True)
        assert told.backbone.config.conditions == ("t", "guidance")
        given = {"t": t, "guidance": squeezed(torch.full_like(t, 2.0))}
        torch.testing.assert_close(told(z, t, label, given), plain(z, t, label))
        told(z, t, label, given).square().mean().backward()
        assert told.backbone.conditions["guidance"].narrow.weight.grad.abs().max() > 0

    def test_the_wrong_ones_are_refused(self):
        z, t, label = inputs()
        with pytest.raises(ValueError, match=r"\['guidance'\] given; the network takes \[\]"):
            network()(z, t, label, {"guidance": t})
        with pytest.raises(ValueError, match=r"\[\] given; the network takes \['t'\]"):
            network().conditioned_on("t")(z, t, label)


class TestModel:
    def test_guidance_by_the_null_label(self):
        model = DiffusionModel(network(), k=2, null_label=True)
        assert torch.equal(model.sample(3, guidance=0.0), model.sample(3))
        assert not torch.allclose(model.sample(3, guidance=2.0), model.sample(3))
        none = torch.full((3,), NULL_LABEL)
        torch.testing.assert_close(model.sample(3, label=none, guidance=2.0), model.sample(3, label=none))

    def test_guidance_that_was_told(self):
        model = DiffusionModel(
            network().conditioned_on("guidance"), k=2, samplers={2: Sampler(ranges={"guidance": (1.0, 3.0)})}
        )
        nn.init.normal_(model.denoiser.backbone.conditions["guidance"].narrow.weight)
        assert torch.equal(model.sample(3), model.sample(3, guidance=1.0))
        assert not torch.allclose(model.sample(3, guidance=2.0), model.sample(3))
        with pytest.raises(ValueError, match="guidance: 4 is not within 1 to 3"):
            model.sample(3, guidance=4.0)

    def test_what_is_refused(self):
        with pytest.raises(ValueError, match="never learnt the null label"):
            DiffusionModel(network(), k=2).sample(3, guidance=1.0)
        unconditional = Denoiser(backbone=DiT(DiTConfig(4, 1, width=16, depth=1, heads=2)), schedule=COSINE)
        with pytest.raises(ValueError, match="guidance: 1 for an unconditional model"):
            DiffusionModel(unconditional, k=2).sample(3, guidance=1.0)
        with pytest.raises(ValueError, match="0 to 2"):
            DiffusionModel(network(), k=2).sample(3, label=torch.full((3,), NULL_LABEL))

    def test_all_of_it_is_kept(self, tmp_path):
        told = DiffusionModel(
            network().conditioned_on("guidance"),
            k=2,
            samplers={2: Sampler(options={"eta": 0.5}, ranges={"guidance": (1.0, 3.0)})},
            null_label=True,
        )
        save_model(tmp_path / "m", told)
        again = load_model(tmp_path / "m")
        assert (again.samplers, again.null_label) == (told.samplers, True)
        assert torch.equal(again.sample(3, guidance=2.5), told.sample(3, guidance=2.5))
        assert not torch.equal(again.sample(3), again.sample(3, eta=1.0))

    def test_an_exact_mixture_is_a_model_too(self, tmp_path):
        ring = DiffusionModel(ring_of_gaussians(modes=5, radius=0.7, variance=0.01, schedule=COSINE), k=64)
        ring.null_label = True
        save_model(tmp_path / "m", ring)
        again = load_model(tmp_path / "m")
        assert (again.network.channels, again.network.num_classes, again.network.image_size) == (2, 5, 1)
        samples = again.sample(10)
        assert samples.shape == (10, 2, 1, 1)
        assert torch.equal(samples, ring.sample(10))
        nearest = torch.cdist(samples.flatten(1), again.denoiser.means).argmin(1)
        assert torch.equal(nearest, torch.arange(10) % 5)
