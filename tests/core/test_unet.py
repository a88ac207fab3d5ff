"""The U-Net: what it is told reaches its output, and what is added to it changes nothing at first."""

from dataclasses import replace

import pytest
import torch

from mmdistill_core.diffusion.guidance import NULL_LABEL
from mmdistill_core.networks.config import network_config
from mmdistill_core.networks.unet import UNetConfig

SMALL = UNetConfig(image_size=8, channels=3, num_classes=4, width=8, levels=(1, 2), attention=4)


def trained(config, *more):
    """As after a training: no weight is 0."""
    torch.manual_seed(0)
    network = config.build()
    network = network.conditioned_on(*more) if more else network
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def test_a_new_network_says_nothing_and_its_config_is_plain_values():
    torch.manual_seed(0)
    network = SMALL.build()
    out = network(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3]))
    assert out.shape == (2, 3, 8, 8)
    assert not out.any()
    assert network_config({"kind": "unet", **vars(SMALL), "levels": [1, 2]}) == SMALL


def test_time_label_and_conditions_matter_and_no_label_is_the_null_label():
    network, z, t = trained(SMALL, "guidance"), torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    label, more = torch.tensor([1, 2]), {"guidance": torch.tensor([0.1, 0.9])}
    out = network(z, t, label, more)
    for other in ((z, t + 0.1, label, more), (z, t, label - 1, more), (z, t, label, {"guidance": torch.zeros(2)})):
        changed = (network(*other) - out).abs().flatten(1).amax(1)
        assert (changed > 1e-4).all()
    null = torch.full((2,), NULL_LABEL)
    assert torch.equal(network(z, t, None, more), network(z, t, null, more))
    with pytest.raises(ValueError, match="conditions: \\[\\] given"):
        network(z, t, label)


def test_an_added_condition_changes_nothing_at_first():
    network, z, t = trained(SMALL), torch.randn(2, 3, 8, 8), torch.rand(2)
    more = network.conditioned_on("t").conditioned_on("t")
    assert more.config.conditions == ("t",)
    assert torch.equal(network(z, t), more.eval()(z, t, None, {"t": t}))


def test_patches_are_channels_and_each_pixel_stays_where_it_is():
    """The network sees a patch as a pixel, and its output goes back to the same place."""
    network = trained(replace(SMALL, patch=2))
    unet = network.unet
    assert unet.conv_in.in_channels == unet.conv_out.out_channels == 3 * 2**2
    z, t = torch.randn(1, 3, 8, 8), torch.rand(1)
    assert network(z, t).shape == z.shape
    seen = []
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(z, t)
    assert torch.equal(seen[0][0, :, 1, 2].reshape(3, 2, 2), z[0, :, 2:4, 4:6])
    unet.forward = lambda patches, *_, **__: (patches,)
    assert torch.equal(network(z, t), z)


def test_only_small_levels_attend():
    def attentions(network):
        return sum("to_q.weight" in name for name, _ in network.named_parameters())

    counts = [attentions(UNetConfig(8, 1, width=8, levels=(1, 2), attention=side).build()) for side in (0, 4, 8)]
    assert counts[0] == 0
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 12}, "network.width: 12 is not a multiple of 8"),
        ({"levels": (1, 2, 4, 4, 4)}, "5 levels and patch 1 divide the image size 8 to no whole number"),
        ({"levels": (1, 2), "patch": 8}, "2 levels and patch 8 divide"),
        ({"levels": ()}, "network.levels"),
    ],
)
def test_what_does_not_fit_is_a_line(fields, said):
    with pytest.raises(ValueError, match=said):
        UNetConfig(**{"image_size": 8, "channels": 3, "width": 8} | fields)
