"""Values that are needed without torch. Nothing is imported here, so that the command line starts fast."""

METHOD = "moment_matching"
TEACHER = "denoising"
NETWORK = "dit"
TEACHER_SAMPLERS = ("ancestral", "ddim")
"""Teachers are measured with each of these. Students are compared with the teacher under the first."""
LEVEL_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""The logsnr edges of the 8 bins by noise level in the logs. Bin 0, below -6, is the noisiest."""
