"""The input pipeline: batches gathered and augmented where the data lies, against a DataLoader with transforms.

    python -m benchmarks.bench_data --json FILE

plain is what a user writes: a Dataset of PIL images, RandomCrop, RandomHorizontalFlip, ToTensor, a DataLoader with
workers and pinned memory, a copy to the device. Both give float32 in [0, 1]. First it is shown that without
augmentation the pixels are the same ones, bit by bit; the augmentations draw from different generators.
"""

import argparse
import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.timing import interleave, paired_ratio
from safer_fast.data import Augment, Split, batches
from safer_fast.profiling import hardware

PAD = 4


class Pictures(Dataset[tuple[Tensor, int]]):
    """A data set in memory as torchvision's CIFAR10 has it: one PIL image at a time, then the transforms."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def plain_transform(size: int, *, augment: bool) -> Callable[[Image.Image], Tensor]:
    """The usual CIFAR transforms."""
    random = [transforms.RandomCrop(size, padding=PAD), transforms.RandomHorizontalFlip()] if augment else []
    return transforms.Compose([*random, transforms.ToTensor()])


def plain(
    split: Split, batch: int, device: torch.device, *, workers: int, augment: bool
) -> Callable[[], Iterator[Any]]:
    """Epochs of a DataLoader; its workers stay alive between them."""
    cpu = split.to(torch.device("cpu"))
    pictures = Pictures(cpu.images, cpu.labels, plain_transform(cpu.images.shape[-1], augment=augment))
    loader = DataLoader(
        pictures, batch, shuffle=augment, num_workers=workers, pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )  # fmt: skip

    def epoch() -> Iterator[Any]:
        for x, y in loader:
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    return epoch


def ours(split: Split, batch: int, *, augment: bool) -> Callable[[], Iterator[Any]]:
    """Epochs of resident batches."""
    how = Augment(pad=PAD) if augment else None
    return lambda: batches(split, batch, seed=0, epoch=0, augment=how)


def agree(split: Split, batch: int, device: torch.device) -> None:
    """Without augmentation every pixel of every image is the same. Raises AssertionError."""
    loaded = torch.cat([x for x, _ in plain(split, batch, device, workers=0, augment=False)()])
    for part in ours(split, batch, augment=False)():
        assert torch.equal(part.x, loaded[part.ids]), "pixels differ without augmentation"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Checks, measures, prints; returns what --json writes."""
    options = _options(arguments)
    device = torch.device(options.device)
    split = random_split(options.images, options.img_size).to(device)
    agree(Split(*(t[: 4 * options.batch + 1] for t in split)), options.batch, device)
    print("without augmentation the pixels agree bit by bit")
    variants = {"ours": ours(split, options.batch, augment=True)} | {
        f"plain, {n} workers": plain(split, options.batch, device, workers=n, augment=True)
        for n in sorted({0, options.workers})
    }
    runs = {name: lambda epoch=epoch: _drain(epoch()) for name, epoch in variants.items()}
    timings = interleave(runs, repeats=options.repeats)
    rows = {
        name: {"images_per_s": options.images / t.median, "spread": t.spread, "n": len(t.seconds)}
        for name, t in timings.items()
    }
    ratio = min(paired_ratio(t, timings["ours"]) for name, t in timings.items() if name != "ours")
    for name, row in rows.items():
        print(f"{name:<24}{row['images_per_s']:>12,.0f} images/s  ±{row['spread']:.1%}")
    print(f"ours is {ratio:.1f}x the better of plain")
    result = {
        "what": "data", "device": hardware(device),
        "variants": rows, "ratios": {"plain": ratio}, "images": options.images, "img_size": options.img_size,
        "batch": options.batch, "torch": torch.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


def random_split(n: int, size: int) -> Split:
    """n random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(10, (n,), generator=generator), torch.arange(n))


def _drain(epoch: Iterator[Any]) -> None:
    for _ in epoch:
        pass


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_data", description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--images", type=int, default=50_000 if cuda else 5_000)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the result here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
