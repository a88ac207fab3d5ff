"""What a stage runs in (workspace, tracking store, Ray), and how a stage is keyed, resumed and reused."""
