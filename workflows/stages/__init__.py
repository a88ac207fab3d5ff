"""The stages, one file each: a stage is `key(...)`, what it depends on, and `run(...)`, what it makes."""
