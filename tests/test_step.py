"""The step against textbooks written out by hand, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from safer_fast.attacks import PGD
from safer_fast.layers import candidate_layers
from safer_fast.losses import MART, TRADES, CrossEntropy
from safer_fast.optimizers import SGD, AdamW
from safer_fast.sam import SAM
from safer_fast.scaler import LossScaler
from safer_fast.step import Step

F64 = 1e-12
ADAM = 1e-11  # AdamW divides by the root of small squares
ATTACK = PGD(eps=0.1, steps=2, start="none")
LAYERS = ["blocks.0.mlp.fc1", "blocks.1.attn.qkv"]


def by_hand_pgd(model, x, y, *, eps=0.1, steps=2):
    x_adv = x.clone()
    for _ in range(steps):
        z = x_adv.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
        x_adv = torch.min(torch.max(x_adv + eps / 4 * g.sign(), x - eps), x + eps).clamp(0, 1)
    return x_adv


def sam_direction(grads, params, *, rho, kind="sam", groups=None):
    """ε̂ of each parameter, as the papers have it. groups: indices that share a norm, for kind "per_layer"."""
    groups = [list(range(len(grads)))] if groups is None else groups
    moves = [None] * len(grads)
    for group in groups:
        t = [params[i].abs() + 0.01 if kind == "asam" else torch.ones_like(params[i]) for i in group]
        norm = sum(((t_i * grads[i]) ** 2).sum() for t_i, i in zip(t, group, strict=True)).sqrt()
        for t_i, i in zip(t, group, strict=True):
            moves[i] = rho * t_i**2 * grads[i] / (norm + 1e-12)
    return moves


def textbook(model, optimizer, params, data, *, rho, clip, kind="sam", groups=None, training=(), replay=True):
    """SAM in its usual form: two backward passes, torch's own clipping and optimizer."""
    for x, y, seed in data:
        model.eval()
        x_adv = by_hand_pgd(model, x, y)
        for module in training:
            module.train()
        torch.manual_seed(seed)
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        if rho:
            old = [p.detach().clone() for p in params]
            grads = [p.grad.clone() for p in params]
            with torch.no_grad():
                for p, move in zip(params, sam_direction(grads, old, rho=rho, kind=kind, groups=groups), strict=True):
                    p.add_(move)
            model.zero_grad()
            if replay:
                torch.manual_seed(seed)
            F.cross_entropy(model(x_adv), y).backward()
            with torch.no_grad():
                for p, w in zip(params, old, strict=True):
                    p.copy_(w)
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def batches(images, n=3, size=6, dtype=torch.float64):
    return [(*images(size, seed=s, dtype=dtype), 100 + s) for s in range(n)]


def run(step, data):
    for x, y, seed in data:
        torch.manual_seed(seed)
        step(x, y)


def distance(a, b):
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("rho", "momentum", "nesterov", "clip"),
    [(0.05, 0.9, False, 1.0), (0.2, 0.9, True, 0.1), (0.05, 0.0, False, 0.0), (0.0, 0.9, False, 1.0)],
)
def test_everything_is_textbook_sam(vit, images, rho, momentum, nesterov, clip):
    ours, theirs, data = vit(dtype=torch.float64), vit(dtype=torch.float64), batches(images)
    optimizer = SGD(lr=0.1, momentum=momentum, weight_decay=1e-2, nesterov=nesterov)
    run(Step(ours, "everything", attack=ATTACK, sam=SAM(rho=rho), optimizer=optimizer, clip=clip), data)
    params = list(theirs.parameters())
    sgd = torch.optim.SGD(params, 0.1, momentum=momentum, weight_decay=1e-2, nesterov=nesterov)
    textbook(theirs, sgd, params, data, rho=rho, clip=clip, training=[theirs])
    assert distance(ours, theirs) < F64
    assert distance(ours, vit(dtype=torch.float64)) > 1e-3


@pytest.mark.parametrize("kind", ["sam", "per_layer", "asam"])
def test_selected_layers_move_as_the_formulas_say(vit, images, kind):
    ours, theirs, data = vit(dtype=torch.float64), vit(dtype=torch.float64), batches(images)
    sam = SAM(rho=0.3, per_layer=kind == "per_layer", adaptive=kind == "asam")
    optimizer = AdamW(lr=0.01, weight_decay=0.1)
    run(Step(ours, LAYERS, attack=ATTACK, sam=sam, optimizer=optimizer, clip=0.5), data)
    params = [p for name in LAYERS for p in theirs.get_submodule(name).parameters()]
    adam = torch.optim.AdamW(params, 0.01, weight_decay=0.1)
    groups = [[0, 1], [2, 3]] if kind == "per_layer" else None
    textbook(theirs, adam, params, data, rho=0.3, clip=0.5, kind=kind, groups=groups)
    assert distance(ours, theirs) < ADAM


def test_asam_has_its_own_default_radius():
    assert (SAM().radius, SAM(adaptive=True).radius, SAM(rho=0.0, adaptive=True).radius) == (0.05, 0.5, 0.0)


def test_rho_zero_is_plain_selective_training_bit_for_bit(vit, images):
    ours, theirs = vit(), vit()
    step = Step(ours, LAYERS, attack=ATTACK, sam=SAM(rho=0.0), optimizer=SGD(lr=0.1, weight_decay=1e-2), clip=0.3)
    params = [p for name in LAYERS for p in theirs.get_submodule(name).parameters()]
    momentum = [torch.zeros_like(p) for p in params]
    for x, y, _ in batches(images, dtype=torch.float32):
        step(x, y)
        grads = torch.autograd.grad(F.cross_entropy(theirs(ATTACK(theirs, x, y)), y), params)
        norm = torch.cat([g.flatten() for g in grads]).double().norm().float()
        scale = ((norm + 1e-6).reciprocal() * 0.3).clamp(max=1)
        with torch.no_grad():
            for p, g, m in zip(params, grads, momentum, strict=True):
                m.copy_(0.9 * m + (scale * g + 1e-2 * p))
                p.copy_(p - 0.1 * m)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_second_pass_repeats_the_dropout_of_the_first(vit, images):
    drop = {"proj_drop_rate": 0.2, "drop_path_rate": 0.3, "pos_drop_rate": 0.1}
    data = batches(images)
    models = [vit(dtype=torch.float64, **drop) for _ in range(3)]
    run(Step(models[0], "everything", attack=ATTACK, sam=SAM(rho=0.5), optimizer=SGD(lr=0.1)), data)
    for model, replay in zip(models[1:], (True, False), strict=True):
        params = list(model.parameters())
        sgd = torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=1e-4)
        textbook(model, sgd, params, data, rho=0.5, clip=1.0, training=[model], replay=replay)
    assert distance(models[0], models[1]) < F64
    assert distance(models[0], models[2]) > 1e-6  # so the draw does matter here


def test_frozen_modules_stay_in_eval_mode_and_selected_ones_train(vit, images):
    """Dropout inside a selected block is on, in a frozen one off."""
    drop = {"proj_drop_rate": 0.3}
    ours, theirs = (vit(dtype=torch.float64, **drop) for _ in range(2))
    data = batches(images)
    run(Step(ours.train(), ["blocks.1"], attack=ATTACK, sam=SAM(rho=0.1), optimizer=SGD(lr=0.1)), data)
    params = list(theirs.blocks[1].parameters())
    sgd = torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=1e-4)
    textbook(theirs, sgd, params, data, rho=0.1, clip=1.0, training=[theirs.blocks[1]])
    assert distance(ours, theirs) < F64


class ConvNet(nn.Module):
    """Has what a ViT has not: running statistics, which training mode would change."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.register_buffer("hidden", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1, weight_decay=0.1), AdamW(lr=0.1, weight_decay=0.1)])
@pytest.mark.parametrize("sam", [SAM(rho=0.1), SAM(rho=0.0)])
def test_frozen_means_frozen(images, bits, differing, optimizer, sam):
    torch.manual_seed(0)
    model = ConvNet()
    model.train()
    model.norm.eval()
    model.norm.bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # stale: momentum and weight decay would drift along it
    before = bits(model)
    step = Step(model, ["conv"], attack=PGD(eps=0.1, steps=2), sam=sam, optimizer=optimizer)
    for x, y, _ in batches(images, dtype=torch.float32, n=4):
        step(x, y)
    assert differing(before, bits(model)) == ["tensor conv.bias", "tensor conv.weight"]


def test_only_selected_parameters_are_differentiated(vit, images):
    model, seen = vit(), []

    class Spy:
        def __call__(self, model, x_adv, x, y):
            seen.append({n for n, p in model.named_parameters() if p.requires_grad})
            return CrossEntropy()(model, x_adv, x, y)

    step = Step(model, LAYERS, attack=ATTACK)
    step.loss = Spy()
    step(*images(4))
    assert seen == [{f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}] * 2


def test_training_mode_reaches_the_statistics_of_a_selected_norm(images):
    torch.manual_seed(0)
    model = ConvNet().eval()
    step = Step(model, ["norm"], attack=None, sam=SAM(rho=0.0))
    x, y = images(8)
    step(x, y)
    assert torch.allclose(model.norm.running_mean, 0.1 * model.conv(x).mean((0, 2, 3)), atol=1e-6)


class RaisesOnCall:
    """Cross-entropy that fails at its n-th call."""

    def __init__(self, call):
        self.left = call

    def __call__(self, model, x_adv, x, y):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of memory")
        return CrossEntropy()(model, x_adv, x, y)


@pytest.mark.parametrize("call", [1, 2])
def test_weights_are_right_after_an_exception(vit, images, bits, differing, call):
    model = vit().train()
    x, y = images(6)
    step = Step(model, LAYERS, attack=ATTACK, sam=SAM(rho=0.5))
    before, state = bits(model), copy.deepcopy(step.state)
    step.loss = RaisesOnCall(call)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(x, y)
    assert differing(before, bits(model)) == []
    assert torch.equal(state["momentum"], step.state["momentum"])
    other = vit().train()
    step.loss = CrossEntropy()
    step(x, y, seed=1)
    Step(other, LAYERS, attack=ATTACK, sam=SAM(rho=0.5))(x, y, seed=1)
    assert distance(model, other) == 0


class Fickle(nn.Module):
    """Uses its second layer in every other forward pass."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(64, 5), nn.Linear(64, 5), 0

    def forward(self, x):
        self.calls += 1
        out = self.a(x.flatten(1))
        return out + self.b(x.flatten(1)) if self.calls % 2 else out


def test_a_parameter_unused_in_the_second_pass_only_decays(images):
    torch.manual_seed(0)
    model = Fickle().double()
    before = [p.detach().clone() for p in model.b.parameters()]
    x, y = images(6, dtype=torch.float64)
    step = Step(model, "all", attack=None, sam=SAM(rho=0.5), optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=0.2))
    step(x, y)
    for p, old in zip(model.b.parameters(), before, strict=True):
        assert torch.allclose(p, old * (1 - 0.1 * 0.2), rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(label_smoothing=0.1), TRADES(), MART()])
@pytest.mark.parametrize("parts", [2, 3, 4, 10])
def test_accumulated_parts_are_the_large_batch(vit, images, loss, parts):
    """10 images in parts of 5; 4, 4, 2; 3, 3, 3, 1; and one by one."""
    whole, split = vit(dtype=torch.float64), vit(dtype=torch.float64)
    attack = PGD(eps=0.1, steps=2)
    options = {"attack": attack, "sam": SAM(rho=0.1), "optimizer": SGD(lr=0.1), "loss": loss, "clip": 0.2}
    one, many = Step(whole, LAYERS, **options), Step(split, LAYERS, accumulate=parts, **options)
    for s in range(2):
        x, y = images(10, seed=s, dtype=torch.float64)
        ids = torch.arange(10) + 7 * s
        a, b = one(x, y, ids), many(x, y, ids)
        assert abs(a - b) < F64
        assert one.accuracy == many.accuracy
    assert distance(whole, split) < F64


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1), AdamW(lr=0.01)])
def test_loss_scaling_changes_no_bit(vit, images, optimizer):
    """A power of two scales without rounding; what is left of it in 1e-12 beside the norm is below float32."""
    plain, scaled = vit(), vit()
    a = Step(plain, LAYERS, attack=ATTACK, sam=SAM(rho=0.1), optimizer=optimizer)
    b = Step(scaled, LAYERS, attack=ATTACK, sam=SAM(rho=0.1), optimizer=optimizer)
    b.scaler = LossScaler(torch.device("cpu"), initial=2.0**12, interval=2)
    for x, y, _ in batches(images, dtype=torch.float32, n=5):
        assert torch.equal(a(x, y), b(x, y))
    assert distance(plain, scaled) == 0
    assert b.scaler.scale == 2.0**14


def test_an_overflow_of_the_scaled_gradient_skips_the_step_and_halves_the_scale(vit, images):
    model = vit()
    step = Step(model, LAYERS, attack=ATTACK)
    step.scaler = LossScaler(torch.device("cpu"), initial=2.0**127)
    before = step.store.w_P.clone()
    x, y = images(6)
    step.loss = Poisoned(times=1e30, calls=(1, 2))
    step(x, y)
    assert torch.equal(before, step.store.w_P)
    assert step.scaler.scale == 2.0**126
    assert step.skipped == 1


class Poisoned:
    """Cross-entropy with its gradient multiplied, at the calls given."""

    def __init__(self, times, calls):
        self.times, self.calls, self.count = times, calls, 0

    def __call__(self, model, x_adv, x, y):
        self.count += 1
        value, logits = CrossEntropy()(model, x_adv, x, y)
        return value * (self.times if self.count in self.calls else 1.0), logits


@pytest.mark.parametrize("times", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.1), AdamW(lr=0.1), SGD(lr=0.1, impl="torch"), AdamW(lr=0.1, impl="torch")]
)
@pytest.mark.parametrize("sam", [SAM(rho=0.1), SAM(rho=0.1, per_layer=True), SAM(adaptive=True)])
def test_a_non_finite_gradient_changes_nothing_and_is_counted(vit, images, times, call, optimizer, sam):
    model = vit()
    step = Step(model, LAYERS, attack=ATTACK, sam=sam, optimizer=optimizer)
    x, y = images(6)
    step(x, y)
    weights, state = step.store.w_P.clone(), {n: t.clone() for n, t in step.state.items()}
    step.loss = Poisoned(times, calls=(call,))
    step(x, y)
    assert torch.equal(weights, step.store.w_P)
    assert all(torch.equal(t, step.state[n]) for n, t in state.items())
    assert step.skipped == 1
    step(x, y)
    assert step.skipped == 1
    assert not torch.equal(weights, step.store.w_P)


def test_one_poisoned_layer_is_enough_to_skip(images):
    """A gradient that is NaN in one selected layer alone, in pass 1 alone, perturbed layer by layer."""
    torch.manual_seed(0)
    model = Fickle()
    model.b.weight.register_hook(lambda g: g * float("nan"))
    step = Step(model, "all", attack=None, sam=SAM(rho=0.1, per_layer=True))
    before = step.store.w_P.clone()
    step(*images(6))
    assert torch.equal(before, step.store.w_P)
    assert step.skipped == 1


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_reselection_keeps_the_state_of_layers_chosen_again(vit, images, kind, impl):
    """Against one torch optimizer a layer: made anew where the layer is new, kept where it was there before."""
    ours, theirs = vit(dtype=torch.float64), vit(dtype=torch.float64)
    a, b, c = "blocks.0.attn.proj", "blocks.0.mlp.fc1", "head"
    if kind == "sgd":
        optimizer, make = SGD(lr=0.1, impl=impl), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer, make = AdamW(lr=0.01, impl=impl), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.05)
    optimizers = {}
    step = None
    for selection in ([a, b], [b, c], [c, a], [a, b, c]):
        if step is None:
            step = Step(ours, selection, attack=ATTACK, sam=SAM(rho=0.1), optimizer=optimizer, clip=0.0)
        else:
            step.select(iter(selection))
        optimizers = {n: optimizers.get(n) or make(list(theirs.get_submodule(n).parameters())) for n in selection}
        params = [p for n in selection for p in theirs.get_submodule(n).parameters()]

        class Together:
            def step(self, optimizers=optimizers):
                for each in optimizers.values():
                    each.step()

        data = batches(images, n=2)
        run(step, data)
        textbook(theirs, Together(), params, data, rho=0.1, clip=0.0)
        assert distance(ours, theirs) < ADAM


def test_reselection_gives_released_layers_their_own_memory(vit, images, bits, differing):
    model = vit()
    step = Step(model, LAYERS, attack=None)
    x, y = images(6)
    step(x, y)
    before = bits(model)
    step.select(["head"])
    assert differing(before, bits(model)) == []
    released = model.get_submodule(LAYERS[0]).weight
    assert released.untyped_storage().nbytes() == released.nbytes
    step(x, y)
    assert differing(before, bits(model)) == ["tensor head.bias", "tensor head.weight"]


def test_a_refused_reselection_leaves_the_step_working(vit, images):
    model, other = vit(), vit()
    steps = [Step(m, LAYERS, attack=None) for m in (model, other)]
    with pytest.raises(ValueError, match=r"did you mean blocks\.0\.mlp"):
        steps[0].select(["blocks.0.mpl"])
    x, y = images(6)
    for step in steps:
        step(x, y)
    assert distance(model, other) == 0
    assert distance(model, vit()) > 0


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.1), AdamW(lr=0.01), SGD(lr=0.1, impl="torch"), AdamW(lr=0.01, impl="torch")]
)
@pytest.mark.parametrize("reselect", [False, True])
def test_state_tensors_continue_to_the_bit(vit, images, optimizer, reselect):
    options = {"attack": PGD(eps=0.1, steps=2), "sam": SAM(rho=0.1), "optimizer": optimizer}
    data = [images(6, seed=s) for s in range(5)]
    model = vit()
    step = Step(model, LAYERS, **options)
    layers = LAYERS
    for x, y in data[:2]:
        step(x, y)
    if reselect:
        layers = [LAYERS[1], "head"]
        step.select(layers)
        step(*data[2], lr=0.03)
    saved, weights = step.state_tensors(), {n: t.clone() for n, t in model.state_dict().items()}
    saved = {n: t.clone() for n, t in saved.items()}
    other = vit(seed=1)
    other.load_state_dict(weights)
    resumed = Step(other, layers, **options)
    resumed.load_state_tensors(saved)
    for x, y in data[3:]:  # the attack's draws too: by default they are counted from the first step
        step(x, y)
        resumed(x, y)
    assert distance(model, other) == 0


def test_loaded_state_is_a_copy(vit, images):
    first, second = Step(vit(), LAYERS, attack=None), Step(vit(), LAYERS, attack=None)
    x, y = images(6)
    first(x, y)
    second.load_state_tensors(first.state_tensors())
    momentum = first.state["momentum"].clone()
    second(x, y)
    assert torch.equal(first.state["momentum"], momentum)


def test_lr_and_eps_of_a_call(vit, images):
    """lr and eps given with a call are those of a step made with them."""
    x, y = images(6)
    called, made = vit(), vit()
    sgd, pgd = SGD(lr=0.1, momentum=0.0), PGD(eps=0.1, steps=2)
    Step(called, LAYERS, attack=pgd, optimizer=sgd)(x, y, lr=0.02, eps=0.05, seed=3)
    Step(made, LAYERS, attack=PGD(eps=0.05, steps=2), optimizer=SGD(lr=0.02, momentum=0.0))(x, y, seed=3)
    assert distance(called, made) == 0
    clean, none = vit(), vit()
    Step(clean, LAYERS, attack=pgd)(x, y, eps=0)
    Step(none, LAYERS, attack=None)(x, y)
    assert distance(clean, none) == 0


def test_draws_are_fresh_in_each_call_and_keyed_by_seed(vit, images):
    x, y = images(6)
    seen = []

    class Spy:
        def __call__(self, model, x_adv, x, y):
            seen.append(x_adv.clone())
            return CrossEntropy()(model, x_adv, x, y)

    attack = PGD(eps=0.1, steps=0)
    for seed in (0, 0, 1):
        step = Step(vit(), LAYERS, attack=attack, sam=SAM(rho=0.1), seed=seed)
        step.loss = Spy()
        step(x, y)
        step(x, y)
    first, again, other = seen[:4], seen[4:8], seen[8:]
    assert torch.equal(first[0], first[1])  # both passes see the same x'
    assert not torch.equal(first[0], first[2])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_what_a_call_reports(vit, images):
    model = vit(dtype=torch.float64)
    x, y = images(9, dtype=torch.float64)
    logits = model(by_hand_pgd(model, x, y)).detach()
    step = Step(model, LAYERS, attack=ATTACK, accumulate=2)
    loss = step(x, y)
    assert abs(loss - F.cross_entropy(logits, y)) < F64
    assert step.accuracy == (logits.argmax(1) == y).float().mean()


def test_soft_labels_train(vit, images):
    """Soft labels that are one-hot are the class indices."""
    x, y = images(6, dtype=torch.float64)
    hard, soft = vit(dtype=torch.float64), vit(dtype=torch.float64)
    Step(hard, LAYERS, attack=ATTACK)(x, y)
    Step(soft, LAYERS, attack=ATTACK)(x, F.one_hot(y, 5).double())
    assert distance(hard, soft) < F64


def test_all_is_every_candidate(vit, images, bits, differing):
    model = vit()
    before = bits(model)
    step = Step(model, "all", attack=None)
    step(*images(6))
    moved = {n.removeprefix("tensor ") for n in differing(before, bits(model))}
    assert moved == {p for names in candidate_layers(model).values() for p in names}
    assert sum(model.get_parameter(n).numel() for n in moved) == step.store.w_P.numel()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip": -1.0}, "clip=-1.0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"precision": "fp8"}, "choose one of fp32, bf16, fp16"),
    ],
)
def test_refusals(vit, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Step(vit(), LAYERS, **options)
