"""The names that a recipe need not give. Nothing is imported here, so that the command line starts fast."""

METHOD = "moment_matching"
TEACHER = "denoising"
NETWORK = "dit"
TEACHER_SAMPLERS = ("ancestral", "ddim")
"""By which teachers are measured; the first is the one that students are compared with."""
