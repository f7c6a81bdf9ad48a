"""Plots are whole PNG files, the same bytes for the same numbers."""

import struct

import torch

from safer_fast.plots import _boundary, plot_curves, plot_sharpness
from safer_fast.sharpness import Scores, Sharpness

NAMES = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "head")
HISTORY = [
    {"stage": "pgd-at", "epoch": 0},
    {"stage": "pgd-at", "epoch": 1, "held_out_clean": 0.5, "held_out_robust": 0.3},
    {"stage": "finetune", "epoch": 2, "held_out_clean": 0.6, "held_out_robust": 0.4},
]


def size(png):
    """Width and height; the signature and the end mark are there."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", png[16:24])


def test_sharpness():
    scores = Scores(NAMES, torch.tensor([[0.1, 0.3, 0.2], [0.2, 0.2, 0.1]], dtype=torch.float64), Sharpness())
    png = plot_sharpness(scores, ["head"])
    assert min(size(png)) > 400
    assert png == plot_sharpness(scores, ["head"])
    assert png != plot_sharpness(scores, ["blocks.0.mlp.fc1"])


def test_curves():
    png = plot_curves({"safer": HISTORY, "pgd-at": HISTORY[:2]}, chance=0.1)
    assert min(size(png)) > 400
    assert png == plot_curves({"safer": HISTORY, "pgd-at": HISTORY[:2]}, chance=0.1)
    assert png != plot_curves({"safer": HISTORY, "pgd-at": HISTORY[:2]}, chance=0.2)
    assert _boundary({"safer": HISTORY}) == 2
