"""Models as files of other libraries, which load and sample them without any code of ours."""
