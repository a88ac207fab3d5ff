"""Encoders for training data: a VAE turns images into latents, a text encoder turns captions into embeddings.

Both load safetensors weights from a local folder. Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workflows.errors import UserError, expanded

if TYPE_CHECKING:
    import numpy as np
    import torch

HASHED = ("*.json", "*.safetensors", "*.txt", "*.model")
"""The files of a model that its fingerprint covers."""

ENCODED = 16
"""Batch size of the encoders, in images or captions."""


class Latents:
    """Latents (z - shift) * scale of a diffusers AutoencoderKL, where z is the `mean` of the encoding or a `sample` of it.

    scale and shift are scaling_factor and shift_factor of the model's configuration. Raises UserError if the folder holds no
    AutoencoderKL in safetensors.
    """

    def __init__(self, folder: str, *, device: str = "cpu", how: Literal["mean", "sample"] = "mean") -> None:
        _require("diffusers", "diffusers")
        root = _root(folder, "vae")
        kind = _config(root).get("_class_name")
        if kind != "AutoencoderKL":
            raise UserError(f"{folder}: a diffusers AutoencoderKL is expected, not {kind}")
        _check_weights(root)
        from diffusers import AutoencoderKL

        self.vae = _load(root, AutoencoderKL).to(device)
        self.device, self.how = device, how
        config = self.vae.config
        self.scale, self.shift = float(config.scaling_factor), float(config.shift_factor or 0)
        self.channels, self.factor = int(config.latent_channels), 2 ** (len(config.block_out_channels) - 1)
        self.fingerprint = _fingerprint([root], how)

    def shape(self, size: int) -> tuple[int, int, int]:
        """The shape (c, h, w) of the latents of square images. Raises UserError if `size` is not a multiple of the VAE's factor."""
        if size % self.factor:
            raise UserError(f"image size {size}: the VAE needs a multiple of {self.factor}")
        return self.channels, size // self.factor, size // self.factor

    def __call__(self, images: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """uint8 images [n, 3, h, w] -> float32 latents [n, c, h / factor, w / factor].

        The noise of a `sample` depends only on the image's key, not on the batch.
        """
        import torch

        self.shape(images.shape[2])
        self.shape(images.shape[3])
        with torch.inference_mode():
            x = torch.from_numpy(images).to(self.device, torch.float32) / 127.5 - 1
            code = self.vae.encode(x).latent_dist
            z = code.mean
            if self.how == "sample":
                z = z + code.std * torch.stack([_noise(key, z.shape[1:]) for key in keys]).to(self.device)
            out: np.ndarray = ((z - self.shift) * self.scale).cpu().numpy()
        return out


class TextEmbeddings:
    """The last hidden states of a transformers CLIP text model or T5 encoder, for captions padded to `length` tokens.

    length: by default the tokenizer's maximum (77 for CLIP). Raises UserError if the folder holds no such model or tokenizer.
    """

    def __init__(self, folder: str, *, length: int | None = None, device: str = "cpu") -> None:
        _require("transformers", "text")
        root = _root(folder, "text_encoder")
        class_names = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
        kind = str(_config(root).get("model_type"))
        if kind not in class_names:
            raise UserError(f"{folder}: a text model of CLIP or T5 is expected, not {kind}")
        _check_weights(root)
        import transformers

        tokenizer_root = _tokenizer_root(root)
        self.tokenizer = _load(tokenizer_root, transformers.AutoTokenizer)
        self.model = _load(root, getattr(transformers, class_names[kind])).to(device)
        self.device = device
        self.length = length or self._max_length(folder)
        self.width = int(getattr(self.model.config, "d_model", 0) or self.model.config.hidden_size)
        self.fingerprint = _fingerprint([root, tokenizer_root], str(self.length))

    def _max_length(self, folder: str) -> int:
        longest = int(self.tokenizer.model_max_length)
        if longest > 10_000:  # transformers sets a huge number if the tokenizer states no maximum
            raise UserError(f"{folder}: the tokenizer states no maximum length", hint="give a length, such as 128")
        return longest

    def __call__(self, captions: Sequence[str | None]) -> dict[str, np.ndarray]:
        """Returns `embedding`, float32 [n, length, width], and `mask`, bool [n, length], True for tokens of the caption.

        Longer captions are truncated. None is encoded as the empty caption.
        """
        import torch

        texts = [caption or "" for caption in captions]
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            states = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return {
            "embedding": states.last_hidden_state.float().cpu().numpy(),
            "mask": tokens["attention_mask"].cpu().numpy().astype(bool),
        }


def _noise(key: str, shape: Any) -> torch.Tensor:
    import torch

    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Encoders:
    """A VAE, a text encoder, or both, loaded from local folders. `size`: side of the images in pixels."""

    def __init__(self, latents: str | None, text: str | None, *, size: int, device: str = "cpu") -> None:
        self.size = size
        self.latents = Latents(latents, device=device) if latents else None
        self.text = TextEmbeddings(text, device=device) if text else None

    def columns(self) -> dict[str, dict[str, Any]]:
        """The manifest's description of the encoded columns. Raises UserError if the VAE does not take this image size."""
        out: dict[str, dict[str, Any]] = {}
        if self.latents:
            out["latent"] = {
                "shape": list(self.latents.shape(self.size)),
                "dtype": "float16",
                "of": self.latents.fingerprint,
            }
        if self.text:
            one = self.text([""])
            for name, part, dtype in (("text", "embedding", "float16"), ("text_mask", "mask", "bool")):
                out[name] = {"shape": list(one[part].shape[1:]), "dtype": dtype, "of": self.text.fingerprint}
        return out

    def __call__(
        self, images: np.ndarray, keys: Sequence[str], captions: Sequence[str | None]
    ) -> dict[str, np.ndarray]:
        import numpy as np

        out: dict[str, list[np.ndarray]] = {}
        for first in range(0, len(keys), ENCODED):
            part = slice(first, first + ENCODED)
            if self.latents:
                out.setdefault("latent", []).append(self.latents(images[part], keys[part]).astype(np.float16))
            if self.text:
                text = self.text(captions[part])
                out.setdefault("text", []).append(text["embedding"].astype(np.float16))
                out.setdefault("text_mask", []).append(text["mask"])
        return {name: np.concatenate(parts) for name, parts in out.items()}


def _require(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"{package} is not installed", hint=f"pip install 'mmdistill[{extra}]'")


def _root(folder: str, part: str) -> Path:
    """The model's folder: `folder`, or its subfolder `part` if `folder` is a diffusers pipeline."""
    root = expanded(folder)
    if not root.is_dir():
        raise UserError(f"{folder} is not a folder", hint="weights are not downloaded: name a folder on this machine")
    return root / part if (root / part / "config.json").is_file() else root


def _config(root: Path) -> dict[str, Any]:
    try:
        config = json.loads((root / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{root} holds no model: no config.json that can be read") from error
    if not isinstance(config, dict):
        raise UserError(f"{root} holds no model: config.json is not an object")
    return config


def _check_weights(root: Path) -> None:
    if not any(root.glob("*.safetensors")):
        others = [file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in sorted(root.glob(suffix))]
        problem = f"{others[0]} is a pickle, which may run programs" if others else "there are no weights"
        raise UserError(f"{root}: {problem}; *.safetensors is expected")


def _tokenizer_root(root: Path) -> Path:
    """The tokenizer's folder: the model's, else the one of a pipeline (text_encoder_2 -> tokenizer_2)."""
    for place in (root, root.parent / root.name.replace("text_encoder", "tokenizer")):
        if (place / "tokenizer_config.json").is_file():
            return place
    raise UserError(f"{root} holds no tokenizer: no tokenizer_config.json")


def _load(root: Path, kind: Any) -> Any:
    """Loads a frozen model in eval mode, or a tokenizer, from this folder only."""
    try:
        weights = {} if kind.__name__ == "AutoTokenizer" else {"use_safetensors": True}
        loaded = kind.from_pretrained(str(root), local_files_only=True, **weights)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise UserError(f"{root} can't be loaded: {' '.join(str(error).split())[:200]}") from error
    return loaded.eval().requires_grad_(False) if weights else loaded


def _fingerprint(folders: Sequence[Path], *options: str) -> str:
    """A hash of the files' contents and of the options. The folders' names don't matter."""
    out = hashlib.sha256(" ".join(options).encode())
    for folder in folders:
        for path in sorted({path for pattern in HASHED for path in folder.glob(pattern)}):
            out.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(2**22):
                    out.update(block)
    return out.hexdigest()[:16]
