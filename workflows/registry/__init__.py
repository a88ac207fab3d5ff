"""The MLflow model registry: registered versions with their lineage, gates, aliases and exports."""
