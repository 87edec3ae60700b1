"""``python -m lightning_diffclf``: the same as ``diffclf``."""

from lightning_diffclf.commands import main

if __name__ == "__main__":
    main()
