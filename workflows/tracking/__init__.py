"""MLflow tracking: a journal on disk, and its delivery, however long the server is away."""
