"""Data sets: splits that do not overlap, files that are checked, draws keyed by seed, epoch and id."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from safer_fast.data import Augment, Split, balanced, batches, load_data, plain_batches


def ids(split):
    return set(split.ids.tolist())


def counts(split, classes=10):
    return torch.bincount(split.labels, minlength=classes)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_digits_are_those_of_scikit_learn(digits):
    raw = load_digits()
    for split in (digits.train, digits.held_out, digits.test):
        assert split.images.dtype == torch.uint8
        assert split.images.shape[1:] == (1, 8, 8)
        pixels = split.pixels()
        assert pixels.dtype == torch.float32
        by_hand = torch.from_numpy(raw.images[split.ids.numpy()] / 16).float()[:, None]
        assert (pixels - by_hand).abs().max() <= 0.5 / 255 + 1e-6
        assert torch.equal(split.labels, torch.from_numpy(raw.target)[split.ids])
    assert (float(digits.train.pixels().min()), float(digits.train.pixels().max())) == (0, 1)


def test_digits_splits_are_disjoint_and_whole(digits):
    train, held_out, test = map(ids, (digits.train, digits.held_out, digits.test))
    assert not train & held_out
    assert not train & test
    assert not held_out & test
    assert train | held_out | test == set(range(1797))
    assert len(held_out) == (len(train) + len(held_out)) // 8  # at most an eighth
    assert counts(digits.held_out).max() - counts(digits.held_out).min() <= 1
    assert len(digits.classes) == 10


def test_loading_is_deterministic(digits):
    again = load_data("digits")
    for name in ("train", "held_out", "test"):
        for a, b in zip(getattr(digits, name), getattr(again, name), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("limit", [16, 40, 64, 101])
def test_limit_is_a_balanced_part_of_training_and_test_images(digits, limit):
    small = load_data("digits", limit=limit)
    assert len(small.train.labels) + len(small.held_out.labels) == limit
    assert len(small.test.labels) == limit
    both = counts(small.train) + counts(small.held_out)
    for count in (both, counts(small.test)):
        assert count.max() - count.min() <= 1
    assert ids(small.test) <= ids(digits.test)
    assert ids(small.train) | ids(small.held_out) <= ids(digits.train) | ids(digits.held_out)
    assert not ids(small.train) & ids(small.held_out)
    assert len(small.held_out.labels) == limit // 8


def test_holdout_is_of_the_size_asked_for_up_to_an_eighth():
    assert len(load_data("digits", holdout=20).held_out.labels) == 20
    assert len(load_data("digits", limit=64, holdout=1000).held_out.labels) == 8


def test_a_limit_beyond_the_data_takes_all(digits):
    assert len(load_data("digits", limit=10**6).test.labels) == len(digits.test.labels)
    for wrong in (0, 3, -1):
        with pytest.raises(ValueError, match=f"limit={wrong}"):
            load_data("digits", limit=wrong)


def test_balanced_with_classes_of_unequal_size():
    labels = torch.tensor([0] * 10 + [1] * 2 + [3] * 5)
    split = Split(torch.zeros(17, 1, 2, 2, dtype=torch.uint8), labels, torch.arange(17) + 100)
    part = balanced(split, 9)
    assert torch.bincount(part.labels).tolist() == [4, 2, 0, 3]
    assert part.ids.tolist() == sorted(part.ids.tolist())
    assert balanced(split, 17) is split


# CIFAR-10's binary layout


@pytest.fixture
def cifar(tmp_path):
    """A folder of the official layout with 20 records a file."""
    home = tmp_path / "data" / "cifar-10-batches-bin"
    home.mkdir(parents=True)
    generator = np.random.default_rng(0)
    records = {}
    for i, name in enumerate([f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]):
        raw = generator.integers(0, 256, (20, 3073), dtype=np.uint8)
        raw[:, 0] = (np.arange(20) + i) % 10
        raw.tofile(home / name)
        records[name] = raw
    return home, records


def test_cifar10_is_read_as_the_official_layout_says(cifar):
    """A record: a label, then 1,024 red, 1,024 green, 1,024 blue bytes, each row by row."""
    home, records = cifar
    data = load_data("cifar10", home, holdout=5)
    assert len(data.train.labels) == 95
    assert len(data.held_out.labels) == 5
    train = np.concatenate([records[f"data_batch_{k}.bin"] for k in range(1, 6)])
    for split, raw in ((data.train, train), (data.held_out, train), (data.test, records["test_batch.bin"])):
        for image, label, i in zip(split.images, split.labels, split.ids, strict=True):
            record = raw[int(i)]
            assert label == record[0]
            for channel, row, column in ((0, 0, 0), (1, 3, 7), (2, 31, 30)):
                assert image[channel, row, column] == record[1 + 1024 * channel + 32 * row + column]
    assert data.classes[0] == "airplane"
    assert data.classes[9] == "truck"
    assert ids(data.train) | ids(data.held_out) == set(range(100))
    assert not ids(data.train) & ids(data.held_out)


def test_the_folder_or_its_parent_may_be_given(cifar, tmp_path):
    home, _ = cifar
    expected = load_data("cifar10", home)
    for folder in (home.parent, str(home), str(home.parent)):
        assert torch.equal(load_data("cifar10", folder).train.images, expected.train.images)
    (tmp_path / "all").mkdir()
    home.parent.rename(tmp_path / "all" / "cifar10")
    assert torch.equal(load_data("cifar10", tmp_path / "all").train.images, expected.train.images)


def test_damaged_and_missing_files_are_said(cifar):
    home, records = cifar
    path = home / "data_batch_3.bin"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:1000], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"data_batch_3\.bin has \d+ bytes.*fetch it again"):
            load_data("cifar10", home)
    wrong = records["data_batch_3.bin"].copy()
    wrong[4, 0] = 10
    wrong.tofile(path)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has a label 10 and the data set 10 classes"):
        load_data("cifar10", home)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3\.bin: the binary layout has"):
        load_data("cifar10", home)
    with pytest.raises(FileNotFoundError, match="give --data-dir the folder cifar-10-batches-bin or its parent"):
        load_data("cifar10", home.parent.parent / "elsewhere")
    with pytest.raises(ValueError, match="needs --data-dir"):
        load_data("cifar10")
    with pytest.raises(ValueError, match="choose one of digits, cifar10"):
        load_data("cifar11")


# Batches


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(u, v) for x, y in zip(a, b, strict=True) for u, v in zip(x, y, strict=True)
    )


def epoch(split, size=48, seed=0, epoch=0, augment=Augment(pad=2), skip=0):
    return list(batches(split, size, seed=seed, epoch=epoch, augment=augment, skip=skip))


def test_every_image_comes_once_an_epoch_in_a_keyed_order(digits):
    split = digits.held_out
    first = epoch(split)
    seen = torch.cat([b.ids for b in first])
    assert sorted(seen.tolist()) == sorted(split.ids.tolist())
    assert seen.tolist() != split.ids.tolist()
    assert [len(b.y) for b in first][:-1] == [48] * (len(first) - 1)
    torch.manual_seed(77)  # the global generator has no say
    assert same(epoch(split), first)
    for other in (epoch(split, seed=1), epoch(split, epoch=1)):
        assert torch.cat([b.ids for b in other]).tolist() != seen.tolist()
    label_of = dict(zip(split.ids.tolist(), split.labels.tolist(), strict=True))
    assert all(label_of[i] == y for b in first for i, y in zip(b.ids.tolist(), b.y.tolist(), strict=True))


def test_skip_drops_the_first_batches_and_changes_no_bit(digits):
    whole = epoch(digits.held_out)
    for skip in range(len(whole) + 1):
        assert same(epoch(digits.held_out, skip=skip), whole[skip:])


def test_augmentation_is_keyed_by_seed_epoch_and_id(digits):
    split = digits.held_out

    def by_id(found):
        return {i: x for b in found for i, x in zip(b.ids.tolist(), b.x, strict=True)}

    first = by_id(epoch(split))
    assert all(torch.equal(x, first[i]) for i, x in by_id(epoch(split, size=7)).items())  # not by place or batch
    for other in (by_id(epoch(split, epoch=1)), by_id(epoch(split, seed=1))):
        assert sum(not torch.equal(other[i], x) for i, x in first.items()) > len(first) / 2


def test_augmented_images_are_crops_of_the_padded_one_or_of_its_mirror(digits):
    split, drawn = digits.held_out, set()
    for batch in epoch(split):
        for x, i in zip(batch.x, batch.ids, strict=True):
            image = split.images[(split.ids == i).nonzero().item()].float() / 255
            found = set()
            for flipped in (False, True):
                padded = torch.nn.functional.pad(image.flip(2) if flipped else image, (2, 2, 2, 2))
                crops = padded.unfold(1, 8, 1).unfold(2, 8, 1)[0]
                found |= {(flipped, r, c) for r in range(5) for c in range(5) if torch.equal(crops[r, c], x[0])}
            assert found
            drawn |= found
    assert len(drawn) == 50  # every corner, mirrored or not


def test_without_augmentation_pixels_are_the_bytes_over_255(digits):
    split = digits.held_out
    for batch in epoch(split, augment=None) + epoch(split, augment=Augment(pad=0, flip=False)):
        rows = torch.stack([(split.ids == i).nonzero().squeeze() for i in batch.ids])
        assert torch.equal(batch.x, split.images[rows].float() / 255)


def test_plain_batches_are_all_images_in_order(digits):
    found = list(plain_batches(digits.held_out, 50))
    assert torch.equal(torch.cat([b.x for b in found]), digits.held_out.pixels())
    assert torch.equal(torch.cat([b.ids for b in found]), digits.held_out.ids)
    assert torch.equal(torch.cat([b.y for b in found]), digits.held_out.labels)


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match="pad=-1"):
        Augment(pad=-1)
