"""MLflow's model registry: versions with their lineage, gates and aliases, exports."""
