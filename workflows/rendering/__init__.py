"""What a user looks at: the terminal, plots, grids of samples, templates of reports."""

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
