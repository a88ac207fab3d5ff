"""The command line, a file for each group of commands. Nothing heavy is imported before it is needed."""
