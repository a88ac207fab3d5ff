"""The mathematics of few-step distillation: torch alone, no Ray, no MLflow, no command line."""
