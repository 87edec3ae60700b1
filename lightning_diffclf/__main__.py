"""``python -m lightning_diffclf``: the same as ``diffclf``."""

from lightning_diffclf.cli import main

if __name__ == "__main__":
    main()
