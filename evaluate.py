#!/usr/bin/env python
"""Evaluate: `python evaluate.py --ckpt runs/dit_digits/checkpoints/last.ckpt [--classifier.draws 50 …]`."""

from lightning_diffclf.commands import evaluate

if __name__ == "__main__":
    evaluate()
