"""The registered model as code: MLflow runs this file to load it, so nothing is pickled. Needs mmdistill_core, not workflows.

predict(DataFrame with a column `label`, params={"seed": 0, "guidance": 1.5}) -> float32 images [n, c, h, w] in [-1, 1], one per
row. The image of row i depends only on the seed, on i and on its label. So the images of one request differ, and the same request
gives the same images again. A guidance below 0, the default, means the model's own guidance.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import pandas as pd


class DiffusionPyfunc(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    def load_context(self, context: Any) -> None:
        from mmdistill_core.artifact import load_model

        self.model = load_model(context.artifacts["model"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        import torch

        params = {"seed": 0, "guidance": -1.0} | (params or {})
        label = torch.from_numpy(model_input["label"].to_numpy(dtype=np.int64, copy=True))
        images = self.model.sample(
            len(label),
            label=label if self.model.network.num_classes else None,
            seed=int(params["seed"]),
            guidance=params["guidance"] if params["guidance"] >= 0 else None,
        )
        return images.numpy()


mlflow.models.set_model(DiffusionPyfunc())
