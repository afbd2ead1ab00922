"""`python -m qwenkit`: the same as the command `qwenkit`."""

from qwenkit.cli.main import main

if __name__ == "__main__":
    main()
