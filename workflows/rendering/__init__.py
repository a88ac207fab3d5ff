"""Output for people: the terminal, plots, grids of samples, and the templates of reports."""

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
