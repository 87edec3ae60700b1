#!/usr/bin/env python
"""Train: `python train.py --config dit_digits.yaml [--trainer.max_steps 50 …]`."""

from lightning_diffclf.cli import train

if __name__ == "__main__":
    train()
