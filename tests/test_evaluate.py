"""Robust accuracies do not depend on how they are measured, and NaN is never robust."""

import hashlib
import math

import pytest
import torch
from torch import nn

from safer_fast.attacks import L2, PGD, Linf
from safer_fast.evaluate import CHUNK, attack_named, evaluate, wilson

AT = Linf(0.1)


@pytest.fixture
def task(vit, images):
    """A model that classifies some images rightly, some robustly: labels are its own for two thirds of them."""
    model = vit()
    x, y = images(150)
    with torch.no_grad():
        own = model(x).argmax(1)
    y = torch.where(torch.arange(150) % 3 > 0, own, y)
    return model, x, y


def decisions(report_of):
    """What became of each image: its id and the worst image found, in the order of the ids."""
    found = {}
    report = report_of(lambda ids, x_adv: found.update(zip(ids.tolist(), x_adv, strict=True)))
    return report, torch.stack([found[i] for i in sorted(found)])


@pytest.mark.parametrize("attacks", ["pgd-3", "pgd-2,cw-2"])
def test_results_do_not_depend_on_batch_size_or_order(task, attacks):
    model, x, y = task
    ids = torch.arange(1000, 1150)
    at = {"threat": AT, "attacks": attacks}
    whole, worst = decisions(lambda save: evaluate(model, x, y, ids=ids, save=save, **at))
    assert 0.1 < whole.robust < whole.clean < 1
    for size in (7, 64, 65):
        other, images = decisions(lambda save, n=size: evaluate(model, x, y, ids=ids, batch_size=n, save=save, **at))
        assert other == whole
        assert torch.equal(images, worst)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    other, images = decisions(lambda save: evaluate(model, x[order], y[order], ids=ids[order], save=save, **at))
    assert torch.equal(images, worst)
    assert (other.clean, other.robust, other.by_attack) == (whole.clean, whole.robust, whole.by_attack)


def test_a_part_of_the_images_gets_the_same_decisions(task):
    model, x, y = task
    ids = torch.arange(150)
    _, worst = decisions(lambda save: evaluate(model, x, y, threat=AT, attacks="pgd-3", save=save))
    rows = ids[20:90:3]
    _, part = decisions(lambda save: evaluate(model, x[rows], y[rows], ids=rows, threat=AT, attacks="pgd-3", save=save))
    assert torch.equal(part, worst[rows])


def test_against_an_evaluation_by_hand(task):
    """Image by image; the second attack sees what the first left, the worst case is reported."""
    model, x, y = task
    report = evaluate(model, x, y, threat=AT, attacks="pgd-2,cw-3", seed=4)
    with torch.no_grad():
        clean = model(x).argmax(1) == y
    pgd, cw = (
        model(PGD(eps=0.1, steps=steps, objective=objective)(model, x, y, seed=4)).argmax(1) == y
        for steps, objective in ((2, "ce"), (3, "margin"))
    )
    assert report.clean == clean.sum().item() / 150
    assert report.by_attack == {
        "pgd-2": (clean & pgd).sum().item() / 150,
        "cw-3": (clean & pgd & cw).sum().item() / 150,
    }
    assert report.robust == report.by_attack["cw-3"] < report.by_attack["pgd-2"]


def test_the_seed_keys_the_draws(task):
    model, x, y = task
    a, b, c = (
        decisions(lambda save, s=s: evaluate(model, x, y, threat=AT, attacks="pgd-1", seed=s, save=save))[1]
        for s in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_saved_images_are_the_ones_that_fool(task):
    model, x, y = task
    report, worst = decisions(lambda save: evaluate(model, x, y, threat=AT, attacks="pgd-3", save=save))
    assert AT.excess(worst, x) <= 1e-7
    with torch.no_grad():
        right = model(worst).argmax(1) == y
    assert right.sum().item() / 150 == report.robust
    assert torch.equal(worst[right], x[right])  # and the clean ones where none was found


def test_the_model_sees_one_shape_only(task):
    model, x, y = task
    shapes = set()
    handle = model.register_forward_hook(lambda module, args, out: shapes.add(tuple(args[0].shape)))
    evaluate(model, x[:70], y[:70], threat=AT, attacks="pgd-1", batch_size=33)
    handle.remove()
    assert shapes == {(CHUNK, 1, 8, 8)}


class Broken(nn.Module):
    """Right for every image, with some logits that are not finite where `when` says so."""

    def __init__(self, value, when):
        super().__init__()
        self.value, self.when = value, when

    def forward(self, x):
        logits = torch.zeros(len(x), 3)
        logits[:, 0] = 5 + x.mean((1, 2, 3))
        logits[self.when(x), 2] = self.value
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_invalid_never_right(value):
    """With label 0, which argmax of NaNs might give; −inf leaves argmax right, and still is not a number."""
    x = torch.full((10, 1, 8, 8), 0.2)
    x[6:] = 0.8
    y = torch.zeros(10, dtype=torch.long)
    report = evaluate(Broken(value, lambda x: x.mean((1, 2, 3)) > 0.5), x, y, threat=Linf(0.01), attacks="pgd-2")
    assert (report.clean, report.robust, report.invalid, report.verdict) == (0.6, 0.6, 4, "invalid")
    assert report.checks == {"finite_logits": False}


def test_logits_that_break_under_attack_alone_are_invalid():
    x = torch.full((5, 1, 8, 8), 0.5)
    y = torch.zeros(5, dtype=torch.long)
    moved = Broken(float("nan"), lambda x: (x - 0.5).abs().amax((1, 2, 3)) > 0)
    report = evaluate(moved, x, y, threat=Linf(0.1), attacks="pgd-2")
    assert (report.clean, report.robust, report.invalid, report.verdict) == (1.0, 0.0, 5, "invalid")


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 1 - 0.1170, 1.0000),
    ],
)
def test_wilson_against_published_values(hits, n, low, high):
    found = wilson(hits, n)
    assert found == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
    # Its ends are where the score test just does not reject.
    for p in found:
        if 0 < p < 1:
            assert abs(hits / n - p) / math.sqrt(p * (1 - p) / n) == pytest.approx(1.959964, rel=1e-6)


def test_the_report_says_on_what(task):
    model, x, y = task
    ids = torch.arange(150) + 7
    report = evaluate(model, x, y, ids=ids, threat=L2(0.5), attacks="clean,pgd-1", seed=9)
    assert (report.n, report.eps, report.norm, report.seed, report.attack) == (150, 0.5, "L2", 9, "clean,pgd-1")
    assert report.ids_sha256 == hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    assert report.interval == wilson(round(report.robust * 150), 150)
    assert report.by_attack["clean"] == report.clean
    assert (report.invalid, report.precision) == (0, "fp32")
    plain = report.as_dict()
    assert plain["interval"] == list(report.interval)
    names = [
        "clean",
        "robust",
        "by_attack",
        "n",
        "interval",
        "invalid",
        "verdict",
        "checks",
        "attack",
        "eps",
        "norm",
        "seed",
        "precision",
        "ids_sha256",
    ]
    assert set(names) <= set(plain)


def test_the_model_is_left_as_it_was(task, bits, differing):
    model, x, y = task
    model.train()
    model.blocks[0].eval()
    before = bits(model)
    evaluate(model, x[:10], y[:10], threat=AT, attacks="pgd-1")
    assert differing(before, bits(model)) == []


def test_attack_objects(task):
    model, x, y = task
    by_name = evaluate(model, x, y, threat=AT, attacks="pgd-3")
    by_object = evaluate(model, x, y, threat=AT, attacks=PGD(eps=0.1, steps=3))
    assert by_name.robust == by_object.robust
    two = [PGD(eps=0.1, steps=3), PGD(eps=0.1, steps=3, restarts=3)]
    both = evaluate(model, x, y, threat=AT, attacks=two)
    assert len(both.by_attack) == 2  # neither takes the other's place
    assert both.robust <= by_object.robust
    with pytest.raises(ValueError, match="give both the same norm and eps"):
        evaluate(model, x, y, threat=AT, attacks=PGD(eps=0.2))


def test_names_of_attacks():
    assert attack_named("pgd-20", AT) == PGD(eps=0.1, steps=20)
    assert attack_named("cw-7", L2(0.5)) == PGD(eps=0.5, norm="L2", steps=7, objective="margin")
    assert attack_named("clean", AT) is None
    for wrong in ("pgd", "pgd-", "pgd-ten", "fgsm", "PGD-20", "pgd-20x", ""):
        with pytest.raises(ValueError, match="choose clean, pgd-<steps> or cw-<steps>"):
            attack_named(wrong, AT)


def bad_inputs():
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    yield "normalised pixels", x * 4 - 2, y, {}, r"pixels lie in \[-"
    yield "bytes", (x * 255).byte(), y, {}, "give floats of shape"
    yield "pixels to 255", x * 255, y, {}, "pixels lie in"
    yield "NaN pixels", torch.where(x > 0.9, torch.nan, x), y, {}, "pixels lie in"
    yield "one image without a batch", x[0], y, {}, r"\[N, C, H, W\]"
    yield "no images", x[:0], y[:0], {}, "the set is empty"
    yield "labels missing", x, y[:3], {}, "4 images, 3 labels"
    yield "ids missing", x, y, {"ids": torch.arange(3)}, "3 ids"
    yield "label too large", x, y + 2, {}, "5 classes"
    yield "negative label", x, y - 1, {}, "5 classes"
    yield "labels as a column", x, y[:, None], {}, "labels"
    yield "labels as floats", x, y.float(), {}, "labels"
    yield "labels one-hot", x, torch.eye(5)[y], {}, "labels"
    yield "batch size 0", x, y, {"batch_size": 0}, "batch_size=0"
    yield "no attacks", x, y, {"attacks": []}, "no attacks given"
    yield "unknown attack", x, y, {"attacks": "pgd-2,autopilot"}, "'autopilot'"


@pytest.mark.parametrize(
    ("x", "y", "options", "sentence"), [pytest.param(*case, id=name) for name, *case in bad_inputs()]
)
def test_input_that_makes_no_sense_is_refused(vit, x, y, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(vit(), x, y, threat=AT, **{"attacks": "pgd-1", **options})


def test_a_model_that_returns_no_logits_is_refused(images):
    x, y = images(4)
    with pytest.raises(ValueError, match="logits of shape"):
        evaluate(nn.Identity(), x, y, threat=AT, attacks="pgd-1")


def test_an_attack_that_leaves_the_threat_model_is_a_bug(task, monkeypatch):
    model, x, y = task
    monkeypatch.setattr(PGD, "__call__", lambda self, model, x, y, ids, seed: (x + 0.2).clamp(0, 1))
    with pytest.raises(AssertionError, match="left the threat model"):
        evaluate(model, x, y, threat=AT, attacks="pgd-1")


def test_nothing_left_to_attack(task):
    """No image right at all, and all fooled before the last attack."""
    model, x, y = task
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 5
    report = evaluate(model, x, wrong, threat=AT, attacks="pgd-1,cw-1")
    assert (report.clean, report.robust) == (0, 0)
    assert report.interval == (pytest.approx(0, abs=1e-15), pytest.approx(0.02497, abs=1e-5))
    at = Linf(1.0)
    report = evaluate(model, x, y, threat=at, attacks="pgd-5,pgd-9,cw-2", batch_size=10)
    assert report.robust < 0.1
