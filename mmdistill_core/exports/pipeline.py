"""Samples a few-step student of mmdistill with labels. Travels with the model: it needs diffusers alone.

from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
images = pipeline(labels=[3, 5]).images
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class FewStepPipeline(DiffusionPipeline):
    """`steps`: the number that the student was trained for. `classes`: its labels are 0 to classes - 1."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any, scheduler: Any, steps: int = 1, classes: int = 1) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(steps=steps, classes=classes)

    @torch.no_grad()
    def __call__(
        self,
        labels: list[int],
        generator: Any = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        if wrong := [one for one in labels if not 0 <= one < self.config.classes]:
            raise ValueError(f"labels: {wrong[0]} is not one of 0 to {self.config.classes - 1}")
        label, size = torch.tensor(labels, device=self.device), self.unet.config.sample_size
        shape = (len(labels), self.unet.config.in_channels, size, size)
        image = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps or self.config.steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            out = self.unet(image, t, class_labels=label).sample[:, : shape[1]]
            image = self.scheduler.step(out, t, image, generator=generator).prev_sample
        image = (image / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            image = self.numpy_to_pil(image)
        return ImagePipelineOutput(images=image) if return_dict else (image,)
