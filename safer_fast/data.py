"""Data sets as uint8 tensors with ids; pixels become floats in [0, 1] when a batch is gathered.

Legend: N images; images [N, C, H, W] uint8, labels and ids [N] int64. An id is the place in the official order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .seeds import mix

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HOLDOUT_SHARE = 8  # at most one training image in eight is held out for choosing the best epoch


class Split(NamedTuple):
    """Images [N, C, H, W] uint8, labels [N] and ids [N] int64."""

    images: Tensor
    labels: Tensor
    ids: Tensor

    def take(self, rows: Tensor) -> "Split":
        """The images at these places."""
        return Split(self.images[rows], self.labels[rows], self.ids[rows])

    def to(self, device: torch.device) -> "Split":
        """The same on a device."""
        return Split(*(t.to(device) for t in self))

    def pixels(self) -> Tensor:
        """All images as float32 in [0, 1]."""
        return self.images.float() / 255


class Dataset(NamedTuple):
    """`train` is trained on, `held_out` (training images too) chooses the best epoch, `test` scores."""

    name: str
    classes: tuple[str, ...]
    train: Split
    held_out: Split
    test: Split


class Batch(NamedTuple):
    """x [B, C, H, W] float32 in [0, 1], y [B], ids [B]."""

    x: Tensor
    y: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding by `pad`, and horizontal flip; drawn by (seed, epoch, id)."""

    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"pad={self.pad}: the crop's padding is 0 or more pixels; 0 turns it off")


def load_data(name: str, folder: str | Path | None = None, *, limit: int | None = None, holdout: int = 1000) -> Dataset:
    """A data set by name: "digits" (embedded) or "cifar10" (folder or its parent, official binary layout).

    limit: a class-balanced part of so many training and so many test images. holdout: how many training images are
    held out, at most an eighth. Both are fixed choices of ids, the same in every run.
    Raises ValueError for an unknown name or damaged files, FileNotFoundError with the places looked at.
    """
    if name not in LOADERS:
        raise ValueError(f"no data set {name!r}: choose one of {', '.join(LOADERS)}")
    if limit is not None and limit < 16:
        raise ValueError(f"limit={limit}: at least 16 images are needed to train on and to hold some out")
    classes, train, test = LOADERS[name](Path(folder).expanduser() if folder else None)
    train, test = (balanced(split, limit) if limit else split for split in (train, test))
    size = min(holdout, len(train.labels) // HOLDOUT_SHARE)
    chosen = _balanced_rows(train.labels, size)
    kept = torch.ones(len(train.labels), dtype=torch.bool)
    kept[chosen] = False
    return Dataset(name, tuple(classes), train.take(kept.nonzero().squeeze(1)), train.take(chosen), test)


def balanced(split: Split, size: int) -> Split:
    """A class-balanced part (equal to one image), in the order of the ids."""
    return split if size >= len(split.labels) else split.take(_balanced_rows(split.labels, size))


def batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, augment: Augment | None, skip: int = 0
) -> Iterator[Batch]:
    """One epoch in an order keyed by (seed, epoch), its first `skip` batches left out at no cost."""
    generator = torch.Generator().manual_seed(mix(seed, "order", epoch))
    order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
    draw = torch.tensor(mix(seed, "augment", epoch), device=order.device)
    pad, flip = (augment.pad, augment.flip) if augment else (0, False)
    for rows in order.split(batch_size)[skip:]:
        ids = split.ids[rows]
        x = ops.gather_augment(split.images, rows, ids, draw, pad, flip)
        yield Batch(x, split.labels[rows], ids)


def plain_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """All images in order, not augmented."""
    for rows in torch.arange(len(split.labels), device=split.labels.device).split(batch_size):
        part = split.take(rows)
        yield Batch(part.pixels(), part.labels, part.ids)


def _balanced_rows(labels: Tensor, size: int) -> Tensor:
    """The first images of each class, classes in turn, until `size`; sorted."""
    rank = torch.empty_like(labels)
    for c in labels.unique():
        places = (labels == c).nonzero().squeeze(1)
        rank[places] = torch.arange(len(places))
    order = torch.argsort(rank * (int(labels.max()) + 1) + labels, stable=True)
    return order[:size].sort().values


Loaded = tuple[list[str], Split, Split]


def _digits(folder: Path | None) -> Loaded:
    """8×8 handwritten digits (UCI, through scikit-learn), grey levels 0–16 scaled to 0–255; every fifth is test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(np.rint(raw.images * (255 / 16)).astype(np.uint8))[:, None]
    ids = torch.arange(len(images))
    split = Split(images, torch.from_numpy(raw.target).long(), ids)
    return [str(d) for d in range(10)], split.take(ids[ids % 5 != 4]), split.take(ids[ids % 5 == 4])


def _cifar10(folder: Path | None) -> Loaded:
    """The official binary layout: records of 1 label and 3,072 pixel bytes."""
    home = _find(folder, "cifar-10-batches-bin", "data_batch_1.bin", "cifar10")
    train = [_cifar_records(home / f"data_batch_{i}.bin", 10) for i in range(1, 6)]
    test = _cifar_records(home / "test_batch.bin", 10)
    return CIFAR10_CLASSES, _split(*map(torch.cat, zip(*train, strict=True))), _split(*test)


def _cifar_records(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: the binary layout has data_batch_1.bin … data_batch_5.bin and test_batch.bin"
        )
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % 3073:
        raise ValueError(
            f"{path} has {len(raw)} bytes, not a multiple of a record's 3,073: it is cut off; fetch it again"
        )
    records = torch.from_numpy(raw.reshape(-1, 3073))
    labels = records[:, 0].long()
    if int(labels.max()) >= classes:
        raise ValueError(f"{path} has a label {int(labels.max())} and the data set {classes} classes: not a file of it")
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), labels


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(images, labels, torch.arange(len(labels)))


def _find(folder: Path | None, inner: str, marker: str, name: str) -> Path:
    """The folder that holds the marker file: the one given, or a child of it (or of that child's name)."""
    if folder is None:
        raise ValueError(f"data set {name} needs --data-dir: the folder {inner} or its parent")
    places = [folder, folder / inner, folder / name / inner, folder / name]
    for place in places:
        if (place / marker).is_file():
            return place
    looked = ", ".join(str(p) for p in places)
    raise FileNotFoundError(f"no {marker} of {name} in {looked}: give --data-dir the folder {inner} or its parent")


LOADERS: dict[str, Callable[[Path | None], Loaded]] = {"digits": _digits, "cifar10": _cifar10}
