"""The registered model, as code: MLflow runs this file to load it, so that nothing is pickled. It needs mmdistill_core alone.

predict(DataFrame with a column `label`, params={"seed": 0}) -> float32 images [n, c, h, w] in [-1, 1], one for each row.
"""

from __future__ import annotations

import mlflow
import numpy as np


# MLflow reads type hints as a schema of its own kind; the signature is given when the model is logged.
class DiffusionPyfunc(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    def load_context(self, context):  # type: ignore[no-untyped-def]
        from mmdistill_core.artifact import load_model

        self.model = load_model(context.artifacts["model"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        import torch

        label = torch.as_tensor(np.asarray(model_input["label"], dtype=np.int64))
        images = self.model.sample(
            len(label),
            label=label if self.model.network.num_classes else None,
            seed=int((params or {}).get("seed", 0)),
        )
        return images.numpy()


mlflow.models.set_model(DiffusionPyfunc())
