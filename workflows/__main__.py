"""`python -m workflows` is `mmdistill`."""

from workflows.cli.main import main

if __name__ == "__main__":
    main()
