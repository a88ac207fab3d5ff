"""Latents and embeddings, by tiny models of random weights that are saved to a folder and read from there."""

import json
import shutil

import numpy as np
import pytest
import torch
from pictures import array
from tiny_models import save_models

from workflows.errors import UserError
from workflows.ingest.encoders import Latents, TextEmbeddings

IMAGES = np.stack([array(i, 16, 16).transpose(2, 0, 1) for i in range(6)])
KEYS = [f"{i}.png" for i in range(6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def vae_of(models):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(models / "vae").eval().requires_grad_(False)


def test_latents_are_the_vaes_own_scaled(models):
    encode, vae = Latents(str(models / "vae")), vae_of(models)
    latents = encode(IMAGES, KEYS)
    assert latents.dtype == np.float32
    assert latents.shape == (6, *encode.shape(16)) == (6, 4, 8, 8)
    x = torch.from_numpy(IMAGES).float() / 127.5 - 1
    expected = (vae.encode(x).latent_dist.mean - 0.3) * 0.7
    assert latents == pytest.approx(expected.numpy(), abs=1e-5)
    parts = np.concatenate([encode(IMAGES[:1], KEYS[:1]), encode(IMAGES[1:], KEYS[1:])])
    assert parts == pytest.approx(latents, abs=1e-5)


def test_a_sample_has_the_codes_spread_and_is_the_keys(models):
    encode, vae = Latents(str(models / "vae"), how="sample"), vae_of(models)
    n = 400
    images, keys = np.repeat(IMAGES[:1], n, axis=0), [f"{i}.png" for i in range(n)]
    latents = encode(images, keys)
    code = vae.encode(torch.from_numpy(IMAGES[:1]).float() / 127.5 - 1).latent_dist
    z = (latents / 0.7 + 0.3 - code.mean.numpy()) / code.std.numpy()  # standard normal
    assert z.mean() == pytest.approx(0, abs=5 / np.sqrt(z.size))
    assert z.var() == pytest.approx(1, abs=5 * np.sqrt(2 / z.size))
    again = encode(images[:3], [keys[7], keys[0], keys[7]])
    assert again == pytest.approx(latents[[7, 0, 7]], abs=1e-5)
    assert abs(latents[0] - latents[1]).max() > 0.1
    mean = Latents(str(models / "vae"))
    assert mean.fingerprint != encode.fingerprint
    assert abs(mean(images[:1], keys[:1]) - latents[:1]).max() > 0.1


@pytest.mark.parametrize("folder", ["pipeline", "t5"])
def test_embeddings_are_the_models_own(models, folder):
    from transformers import CLIPTextModel, T5EncoderModel

    embed = TextEmbeddings(str(models / folder))
    captions = ["a red cat", None, "a blue dog a red cat a blue dog", "zebra"]
    out = embed(captions)
    assert out["embedding"].shape == (4, 6, embed.width) == (4, 6, 16 if folder == "pipeline" else 12)
    assert out["mask"].sum(1).tolist() == [4, 1, 6, 2]
    kind, place = (CLIPTextModel, "pipeline/text_encoder") if folder == "pipeline" else (T5EncoderModel, "t5")
    model = kind.from_pretrained(models / place).eval()
    ids = torch.tensor([[3, 4, 6, 1]])  # the caption alone, without padding
    with torch.inference_mode():
        own = model(input_ids=ids).last_hidden_state.numpy()
    assert out["embedding"][:1, :4] == pytest.approx(own, abs=1e-5)
    again = embed(captions[::-1])
    assert again["embedding"][::-1] == pytest.approx(out["embedding"], abs=1e-5)
    assert TextEmbeddings(str(models / folder), length=4)(["a"])["embedding"].shape[1] == 4


def test_a_fingerprint_is_the_contents(models, tmp_path):
    shutil.copytree(models / "vae", tmp_path / "copy")
    before = Latents(str(models / "vae")).fingerprint
    assert Latents(str(tmp_path / "copy")).fingerprint == before
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert Latents(str(tmp_path / "copy")).fingerprint != before
    assert TextEmbeddings(str(models / "t5")).fingerprint != TextEmbeddings(str(models / "t5"), length=3).fingerprint


def test_folders_that_will_not_do_are_a_line(models, tmp_path):
    def said(make):
        with pytest.raises(UserError) as caught:
            make()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nowhere is not a folder" in said(lambda: Latents(str(tmp_path / "nowhere")))
    assert "holds no model" in said(lambda: Latents(str(tmp_path)))
    assert "an AutoencoderKL is expected, not None".removeprefix("an ") in said(lambda: Latents(str(models / "t5")))
    assert "a text model of CLIP or T5 is expected, not None" in said(lambda: TextEmbeddings(str(models / "vae")))
    shutil.copytree(models / "vae", tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "vae can't be loaded: " in said(lambda: Latents(str(tmp_path / "vae")))
    weights.rename(weights.with_suffix(".bin"))
    assert "diffusion_pytorch_model.bin is a pickle, which may run programs" in said(
        lambda: Latents(str(tmp_path / "vae"))
    )
    weights.with_suffix(".bin").unlink()
    assert "there are no weights" in said(lambda: Latents(str(tmp_path / "vae")))
    shutil.copytree(models / "t5", tmp_path / "t5")
    (tmp_path / "t5" / "tokenizer_config.json").unlink()
    assert "t5 holds no tokenizer" in said(lambda: TextEmbeddings(str(tmp_path / "t5")))
    assert "image size 15: the VAE needs a multiple of 2" in said(lambda: Latents(str(models / "vae")).shape(15))


def test_a_package_that_is_missing_is_a_line(models, monkeypatch):
    import workflows.ingest.encoders as encoders

    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    for make, extra in ((Latents, "diffusers"), (TextEmbeddings, "text")):
        with pytest.raises(UserError, match="is not installed") as caught:
            make(str(models / "vae"))
        assert f"mmdistill[{extra}]" in caught.value.hint
