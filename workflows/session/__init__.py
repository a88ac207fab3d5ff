"""What a stage runs in: the workspace, the tracking store, Ray; and how a stage is keyed, resumed and reused."""
