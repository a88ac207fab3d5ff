"""Names that a recipe may leave out. Nothing is imported here, so that the command line starts fast."""

METHOD = "moment_matching"
TEACHER = "denoising"
NETWORK = "dit"
TEACHER_SAMPLERS = ("ancestral", "ddim")
"""Teachers are measured with each of these. Students are compared with the teacher under the first."""
