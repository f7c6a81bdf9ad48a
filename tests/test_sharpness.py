"""Sharpness against first-order values, a full forward pass, and layers planted to be sharp."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from safer_fast.attacks import PGD
from safer_fast.layers import candidate_layers, resolve_layers
from safer_fast.sharpness import Scores, Sharpness, layer_sharpness

F64 = 1e-12
ATTACK = PGD(eps=0.1, steps=2)


def gradients(model, layers, x_adv, y):
    names = [n for own in layers.values() for n in own]
    grads = torch.autograd.grad(F.cross_entropy(model(x_adv), y), [model.get_parameter(n) for n in names])
    by_name = dict(zip(names, grads, strict=True))
    return {layer: [by_name[n] for n in own] for layer, own in layers.items()}


def length(tensors):
    return math.sqrt(sum(float((t.detach() ** 2).sum()) for t in tensors))


def rise_by_hand(model, names, moves, x_adv, y):
    """The loss of a whole forward pass with the parameters moved, less the loss where they are."""
    params = [model.get_parameter(n) for n in names]
    old = [p.detach().clone() for p in params]
    with torch.no_grad():
        before = F.cross_entropy(model(x_adv), y)
        for p, move in zip(params, moves, strict=True):
            p.add_(move)
        after = F.cross_entropy(model(x_adv), y)
        for p, w in zip(params, old, strict=True):
            p.copy_(w)
    return float(after - before)


@pytest.fixture
def setting(vit, images):
    model = vit(dtype=torch.float64)
    x, y = images(12, dtype=torch.float64)
    return model, x, y, ATTACK(model, x, y, torch.arange(12), seed=0)


@pytest.mark.parametrize("how", [Sharpness("step"), Sharpness("ascent", steps=3), Sharpness("grad")], ids=str)
@pytest.mark.parametrize("scale", ["none", "relative"])
def test_for_small_radii_it_is_the_gradient_norm(setting, how, scale):
    model, x, y, x_adv = setting
    layers = candidate_layers(model)
    rho = 1e-6
    how = Sharpness(how.measure, rho, scale, how.steps)
    scores = layer_sharpness(model, [(x, y)], attack=ATTACK, how=how)
    for layer, g in gradients(model, layers, x_adv, y).items():
        w = length(model.get_parameter(n) for n in layers[layer]) if scale == "relative" else 1.0
        assert scores[layer] / rho == pytest.approx(length(g) * w, rel=1e-4)
        if how.measure == "grad":
            assert scores[layer] == pytest.approx(rho * length(g) * w, rel=F64)


@pytest.mark.parametrize("scale", ["none", "relative"])
def test_step_is_a_whole_forward_pass_with_the_layer_moved(setting, scale):
    """The restart from the layer's block must not lose anything."""
    model, x, y, x_adv = setting
    layers = candidate_layers(model)
    scores = layer_sharpness(model, [(x, y)], attack=ATTACK, how=Sharpness("step", rho=0.3, scale=scale))
    for layer, g in gradients(model, layers, x_adv, y).items():
        radius = 0.3 * (length(model.get_parameter(n) for n in layers[layer]) if scale == "relative" else 1.0)
        moves = [t * radius / length(g) for t in g]
        assert scores[layer] == pytest.approx(rise_by_hand(model, layers[layer], moves, x_adv, y), abs=F64)


@pytest.mark.parametrize("granularity", ["block", "everything", "containers"])
def test_the_restart_is_right_for_groups_of_any_extent(setting, granularity):
    """Blocks; every module with parameters of its own, tokens and positions among them; modules around blocks."""
    model, x, y, x_adv = setting
    layers = {
        "block": lambda: candidate_layers(model, granularity="block"),
        "everything": lambda: resolve_layers(model, "everything"),
        "containers": lambda: resolve_layers(model, ["blocks", "patch_embed", "norm"]),
    }[granularity]()
    scores = layer_sharpness(model, [(x, y)], attack=ATTACK, rho=0.3, layers=layers)
    for layer, g in gradients(model, layers, x_adv, y).items():
        moves = [t * 0.3 / length(g) for t in g]
        assert scores[layer] == pytest.approx(rise_by_hand(model, layers[layer], moves, x_adv, y), abs=F64), layer


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("swin_tiny_patch4_window7_224", {"patch_size": 2, "window_size": 2, "depths": (1, 1), "num_heads": (2, 2)}),
        ("convit_tiny", {"local_up_to_layer": 1}),
    ],
)
def test_the_restart_is_right_for_every_family(images, name, changes):
    from safer_fast.models import create_model

    torch.manual_seed(0)
    sizes = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    options = {**sizes, **changes}
    if name.startswith("swin"):
        options.pop("depth")
    model = create_model(name, **options).double().eval()
    x, y = images(4, dtype=torch.float64)
    layers = candidate_layers(model)
    scores = layer_sharpness(model, [(x, y)], attack=None, rho=0.3)
    for layer, g in gradients_or_zeros(model, layers, x, y).items():
        moves = [t * 0.3 / (length(g) + 1e-12) for t in g]
        assert scores[layer] == pytest.approx(rise_by_hand(model, layers[layer], moves, x, y), abs=F64), layer


def gradients_or_zeros(model, layers, x, y):
    names = [n for own in layers.values() for n in own]
    params = [model.get_parameter(n) for n in names]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params, allow_unused=True)
    by_name = {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, params, grads, strict=True)}
    return {layer: [by_name[n] for n in own] for layer, own in layers.items()}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_ascent_is_projected_ascent_by_hand(setting, steps):
    model, x, y, x_adv = setting
    layers = candidate_layers(model)
    rho = 0.5
    scores = layer_sharpness(model, [(x, y)], attack=ATTACK, how=Sharpness("ascent", rho=rho, steps=steps))
    for layer in ("blocks.0.attn.qkv", "head"):
        params = [model.get_parameter(n) for n in layers[layer]]
        old = [p.detach().clone() for p in params]
        move = [torch.zeros_like(p) for p in params]
        for _ in range(steps):
            with torch.no_grad():
                for p, w, m in zip(params, old, move, strict=True):
                    p.copy_(w + m)
            g = torch.autograd.grad(F.cross_entropy(model(x_adv), y), params)
            move = [m + 2 * rho / steps * t / length(g) for m, t in zip(move, g, strict=True)]
            move = [m * min(1.0, rho / length(move)) for m in move]
            with torch.no_grad():
                for p, w in zip(params, old, strict=True):
                    p.copy_(w)
        assert length(move) <= rho * (1 + F64)
        assert scores[layer] == pytest.approx(rise_by_hand(model, layers[layer], move, x_adv, y), abs=1e-9)


def test_ascent_finds_at_least_what_one_step_finds(setting):
    """On a smooth loss and a moderate radius, more steps come closer to the maximum."""
    model, x, y, _ = setting
    step, ascent = (
        layer_sharpness(model, [(x, y)], attack=ATTACK, how=Sharpness(measure, rho=0.3, steps=10))
        for measure in ("step", "ascent")
    )
    assert all(ascent[layer] >= step[layer] - 1e-6 for layer in step)
    assert any(ascent[layer] > step[layer] + 1e-4 for layer in step)


class Planted(nn.Module):
    """Six equal branches; one of them reaches the logits a hundred times amplified."""

    def __init__(self, sharp):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(64, 5) for _ in range(6))
        self.sharp = sharp

    def forward(self, x):
        h = x.flatten(1)
        return sum((30.0 if i == self.sharp else 0.3) * branch(h) for i, branch in enumerate(self.branches))


@pytest.mark.parametrize("sharp", [0, 3, 5])
@pytest.mark.parametrize("measure", ["step", "grad", "ascent"])
def test_a_planted_sharp_layer_comes_first(images, sharp, measure):
    x, y = images(32)
    scores = layer_sharpness(Planted(sharp), [(x, y)], attack=ATTACK, how=Sharpness(measure))
    assert scores.ranking()[0] == f"branches.{sharp}"
    assert scores[f"branches.{sharp}"] > 10 * sorted(scores.values())[-2]


@pytest.mark.parametrize("measure", ["step", "grad", "ascent"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_ends_bit_for_bit_as_it_was(vit, images, bits, differing, measure, fails):
    model = vit().train()
    model.blocks[0].eval()
    model.norm.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, calls = bits(model), []

    def watch(module, args, output):
        calls.append(1)
        if fails and len(calls) > 12:
            raise RuntimeError("no more")

    handle = model.blocks[1].register_forward_hook(watch)
    x, y = images(6)
    how = Sharpness(measure, rho=0.5, steps=3)
    try:
        for _ in range(4 if fails else 1):
            layer_sharpness(model, [(x, y)], attack=ATTACK, how=how)
    except RuntimeError:
        assert fails
    handle.remove()
    assert len(calls) > 12 or not fails
    assert differing(before, bits(model)) == []


def test_batches_are_averaged_and_their_spread_reported(vit, images):
    model = vit(dtype=torch.float64)
    parts = [(*images(6, seed=s, dtype=torch.float64), torch.arange(6 * s, 6 * s + 6)) for s in range(3)]
    together = layer_sharpness(model, parts, attack=ATTACK)
    alone = [layer_sharpness(model, [part], attack=ATTACK) for part in parts]
    for i, layer in enumerate(together):
        values = torch.tensor([scores[layer] for scores in alone], dtype=torch.float64)
        assert together[layer] == pytest.approx(float(values.mean()), abs=F64)
        assert float(together.std[i]) == pytest.approx(float(values.std()), abs=F64)
    assert alone[0].stability == 1.0
    assert float(alone[0].std.max()) == 0
    # Without ids, images are counted through the batches: the same keys.
    uncounted = layer_sharpness(model, [part[:2] for part in parts], attack=ATTACK)
    assert torch.equal(uncounted.per_batch, together.per_batch)
    others = layer_sharpness(model, [(x, y, ids + 100) for x, y, ids in parts], attack=ATTACK)
    assert not torch.equal(others.per_batch, together.per_batch)


def scores_of(rows):
    rows = torch.tensor(rows, dtype=torch.float64)
    return Scores(tuple("abcdefgh"[: rows.shape[1]]), rows, Sharpness())


def test_stability_is_the_mean_rank_correlation():
    assert scores_of([[1.0, 5.0, 3.0]] * 4).stability == pytest.approx(1.0, abs=F64)
    assert scores_of([[1.0, 2.0, 3.0], [30.0, 20.0, 10.0]]).stability == pytest.approx(-1.0, abs=F64)
    # Ranks (0 1 2 3) and (1 0 2 3): 1 − 6·2/(4·15) = 0.8 (Spearman).
    assert scores_of([[1.0, 2.0, 3.0, 4.0], [2.5, 2.0, 30.0, 31.0]]).stability == pytest.approx(0.8, abs=F64)
    # Ranks (1 2 0 3) and (1 0 3 2): 1 − 6·14/60.
    assert scores_of([[5.0, 6.0, 4.0, 7.0], [0.2, 0.1, 0.4, 0.3]]).stability == pytest.approx(-0.4, abs=F64)


def test_identical_batches_are_stable(vit, images):
    x, y = images(6)
    ids = torch.arange(6)
    scores = layer_sharpness(vit(), [(x, y, ids)] * 3, attack=ATTACK)
    assert scores.stability == pytest.approx(1.0, abs=F64)
    assert float(scores.std.max()) == 0


def test_ranking_breaks_ties_in_model_order():
    assert scores_of([[1.0, 2.0, 2.0, 0.0, 2.0]]).ranking() == ["b", "c", "e", "a", "d"]
    names = [f"l{i}" for i in range(1000)]
    many = Scores(tuple(names), torch.arange(1000).remainder(2)[None].double(), Sharpness())
    assert many.ranking() == names[1::2] + names[::2]


def test_rho_overrides_and_attack_none_is_clean(setting):
    model, x, y, _ = setting
    overridden = layer_sharpness(model, [(x, y)], attack=None, rho=0.2)
    given = layer_sharpness(model, [(x, y)], attack=None, how=Sharpness(rho=0.2))
    assert torch.equal(overridden.per_batch, given.per_batch)
    assert overridden.how.rho == 0.2
    eps0 = layer_sharpness(model, [(x, y)], attack=PGD(eps=0.0), rho=0.2)
    assert torch.equal(eps0.per_batch, given.per_batch)


def test_progress_counts_images(setting):
    model, x, y, _ = setting
    seen = []
    layer_sharpness(model, [(x, y), (x[:5], y[:5])], attack=None, advance=seen.append)
    assert seen == [12, 5]


def test_as_dict(setting):
    model, x, y, _ = setting
    scores = layer_sharpness(model, [(x, y)], attack=None)
    plain = scores.as_dict()
    assert list(plain["layers"]) == list(scores)
    assert plain["layers"]["head"] == {"score": scores["head"], "std": 0.0}
    assert (plain["rho"], plain["measure"], plain["scale"], plain["stability"]) == (0.05, "step", "none", 1.0)


def test_refusals(vit):
    with pytest.raises(ValueError, match="loader is empty"):
        layer_sharpness(vit(), [])
    for options, sentence in (
        ({"measure": "hessian"}, "step, grad, ascent"),
        ({"scale": "layer"}, "none, relative"),
        ({"rho": 0.0}, "more than 0"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Sharpness(**options)


def test_diverged_weights_are_said_not_ranked(vit, images):
    model = vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="weights have diverged"):
        layer_sharpness(model, [images(4)], attack=None)
