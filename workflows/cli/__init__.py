"""The command line, one file for each group of commands. Heavy libraries are imported only when a command needs them."""
