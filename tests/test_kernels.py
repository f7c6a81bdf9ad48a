"""Every op against its reference, and both against oracles that share no code with them.

Runs on the CPU, with C++ kernels where they are built, and on the GPU as well where there is one.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from safer_fast import ops
from safer_fast.kernels import linear
from safer_fast.kernels.philox import philox

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
BY_NAME = {op.name: op for op in ops.ALL}

# One unit in the last place, or two, of the dtype that is compared; atol for results near 0 of inputs near 1.
TOLERANCE = {
    torch.float64: {"rtol": 1e-14, "atol": 1e-15},
    torch.float32: {"rtol": 3e-7, "atol": 1.2e-7},
    torch.bfloat16: {"rtol": 2**-7, "atol": 0.0},
    torch.float16: {"rtol": 2**-10, "atol": 0.0},
}
# The same arithmetic in the same order: every bit agrees. Norms add up in another order, and PyTorch's float32 sqrt
# is not always the nearest float (1 in 5 is not, torch 2.15 on AVX2).
EXACT = {"uniform_start", "linf_step", "sam_perturb", "sgd_update", "gather_augment"}
# Products add up in another order, with fused multiply-adds.
PRODUCTS = {"linear", "attention", "attention_backward"}
PRODUCT_TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 2e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
}


def agree(op: str, ours: object, theirs: object) -> None:
    if not isinstance(ours, torch.Tensor):
        assert ours == theirs or ours is theirs
        return
    assert isinstance(theirs, torch.Tensor)
    table = PRODUCT_TOLERANCE if op in PRODUCTS else TOLERANCE
    tolerance = {"rtol": 0.0, "atol": 0.0} if op in EXACT else table.get(ours.dtype, {})
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


def twin(op: ops.Op, which: str):
    """The op itself or its reference: an oracle must hold for both."""
    return op.run if which == "run" else op.reference


both = pytest.mark.parametrize("which", ["run", "reference"])


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_op_equals_its_reference(op: ops.Op, dtype: torch.dtype, device: str) -> None:
    for args in op.samples(device, dtype, 0):
        expected = copy.deepcopy(args)
        result, expected_result = op.run(*args), op.reference(*expected)
        for ours, theirs in zip(tree_leaves(result), tree_leaves(expected_result), strict=True):
            agree(op.name, ours, theirs)
        for ours, theirs in zip(args, expected, strict=True):
            agree(op.name, ours, theirs)
        assert op.bytes_moved(*args) >= 0


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_opcheck(op: ops.Op) -> None:
    samples = list(op.samples("cpu", torch.float32, 0))
    for args in samples[:2]:  # the second has bf16 gradients and copies
        torch.library.opcheck(op.run._opoverload, args)


def test_active_names_what_runs() -> None:
    native = {ops.active(op.name, "cpu") for op in ops.ALL if op.name != "linear"}
    assert native in ({"native"}, {"reference"})
    assert ops.active("linear", "cpu") == ("onednn" if torch.backends.mkldnn.is_available() else "reference")
    gpu = {ops.active(op.name, "cuda") for op in ops.ALL if op.triton}
    assert gpu == {"triton" if ops.HAVE_TRITON else "reference"}
    assert ops.active("attention", "cuda") == "reference"
    with pytest.raises(ValueError, match="linf_step"):
        ops.active("linf_stop", "cpu")


def test_absent_library_is_silent_and_a_broken_one_is_not(tmp_path) -> None:
    assert ops._load_native(tmp_path) is None
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    sentence = ops._load_native(tmp_path)
    assert sentence
    assert str(tmp_path / "_C.abi3.so") in sentence
    assert "rebuild it" in sentence


def test_ops_trace_into_one_graph() -> None:
    def attack_step(x, x_adv, grad, alpha, eps):
        ops.linf_step(x_adv, grad * 2, x, alpha, eps)
        return x_adv + ops.global_norm(x_adv.flatten())

    x_adv, grad, x, alpha, eps = next(iter(BY_NAME["linf_step"].samples("cpu", torch.float32, 0)))
    twin_adv = x_adv.clone()
    compiled = torch.compile(attack_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x_adv, grad, alpha, eps), attack_step(x, twin_adv, grad, alpha, eps))
    assert torch.equal(x_adv, twin_adv)


# --- what is refused


def test_a_leaf_on_the_tape_is_not_written() -> None:
    x_adv, grad, x, alpha, eps = next(iter(BY_NAME["linf_step"].samples("cpu", torch.float32, 0)))
    x_adv.requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        ops.linf_step(x_adv, grad, x, alpha, eps)
    with torch.no_grad():
        ops.linf_step(x_adv, grad, x, alpha, eps)
    for name, args in (("l2_step", 5), ("sam_perturb", 8), ("sgd_update", 10), ("adamw_update", 13)):
        sample = list(next(iter(BY_NAME[name].samples("cpu", torch.float32, 0))))
        assert len(sample) == args
        sample[0].requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name} writes"):
            getattr(ops, name)(*sample)


def spoilt(name: str, **changes):
    """A sample of the op, larger than one element, with some arguments replaced, by position."""
    samples = list(BY_NAME[name].samples("cpu", torch.float32, 0))
    args = list(samples[3 if name.endswith("update") else 0])
    for position, change in changes.items():
        i = int(position[1:])
        args[i] = change(args[i])
    return name, args


def gappy(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, t], dim=-1)[..., 0]


REFUSED = [
    spoilt("linf_step", _0=torch.Tensor.half),
    spoilt("linf_step", _0=gappy),
    spoilt("linf_step", _1=lambda g: g[:1]),
    spoilt("linf_step", _1=torch.Tensor.int),
    spoilt("linf_step", _2=torch.Tensor.double),
    spoilt("l2_step", _0=gappy),
    spoilt("l2_step", _2=torch.Tensor.double),
    spoilt("l2_step", _0=torch.Tensor.flatten, _1=torch.Tensor.flatten, _2=torch.Tensor.flatten),
    spoilt("uniform_start", _0=torch.Tensor.bfloat16),
    spoilt("uniform_start", _1=lambda ids: ids[:1]),
    spoilt("uniform_start", _1=torch.Tensor.int),
    spoilt("global_norm", _0=torch.Tensor.int),
    spoilt("global_norm", _0=lambda v: v[None]),
    spoilt("layer_norms", _1=torch.Tensor.int),
    spoilt("sam_perturb", _0=gappy),
    spoilt("sam_perturb", _3=lambda norms: norms[:1]),
    spoilt("sam_perturb", _4=lambda offsets: offsets - offsets.clamp(max=1)),
    spoilt("sgd_update", _0=gappy),
    spoilt("sgd_update", _1=torch.Tensor.double),
    spoilt("sgd_update", _2=lambda _: gappy(torch.zeros(1027))),
    spoilt("adamw_update", _2=torch.Tensor.bfloat16),
    spoilt("adamw_update", _4=lambda g: g.repeat(2)),
    spoilt("gather_augment", _0=torch.Tensor.float),
    spoilt("gather_augment", _1=lambda index: index + 100),
    spoilt("gather_augment", _1=lambda index: index - 100),
    spoilt("gather_augment", _4=lambda pad: -1),
    spoilt("linear", _0=lambda x: x[..., :-1]),
    spoilt("linear", _0=torch.Tensor.double),
    spoilt("linear", _1=lambda w: w[..., None]),
    spoilt("linear", _2=lambda b: b[:1]),
    spoilt("linear", _2=torch.Tensor.double),
    spoilt("attention", _0=torch.Tensor.bfloat16),
    spoilt("attention", _0=torch.Tensor.int),
    spoilt("attention", _0=lambda qkv: qkv[:, :, :2]),
    spoilt("attention", _0=lambda qkv: qkv[0]),
    spoilt("attention_backward", _0=lambda g: g[..., :-1]),
    spoilt("attention_backward", _0=torch.Tensor.double),
    spoilt("attention_backward", _2=lambda probs: probs[..., :-1]),
]


@both
@pytest.mark.parametrize(("name", "args"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_tensors_get_a_sentence(name: str, args: list, which: str) -> None:
    with pytest.raises((ValueError, RuntimeError, IndexError)) as refusal:
        twin(BY_NAME[name], which)(*copy.deepcopy(args))
    assert len(str(refusal.value)) > 20


# --- random numbers

# Random123's known answers for philox4x32, 10 rounds: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_ints(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, as the paper writes it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = divmod(0xD2511F53 * c[0], 2**32), divmod(0xCD9E8D57 * c[2], 2**32)
        c = [right[0] ^ c[1] ^ k[0], right[1], left[0] ^ c[3] ^ k[1], left[1]]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox_ints(counter, key) == words
    ours = philox(tuple(torch.tensor(c) for c in counter), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert [int(word) for word in ours] == words


@both
@settings(max_examples=20, deadline=None)
@given(image=st.integers(-(2**63), 2**63 - 1), seed=st.integers(-(2**63), 2**63 - 1), stream=st.integers(0, 2**32 - 1))
def test_uniform_start_draws_these_words(which: str, image: int, seed: int, stream: int) -> None:
    start = twin(BY_NAME["uniform_start"], which)
    zeros = torch.zeros(1, 11, dtype=torch.float64)
    u = start(zeros, torch.tensor([image]), torch.tensor(seed), number(1.0), stream, -1.0, 1.0)
    for j in range(11):
        counter = [j // 4, image % 2**32, (image >> 32) % 2**32, stream]
        word = philox_ints(counter, [seed % 2**32, (seed >> 32) % 2**32])[j % 4]
        assert u[0, j] == (word >> 8) * 2.0**-23 - 1


@both
def test_uniform_start_is_uniform(which: str) -> None:
    start = twin(BY_NAME["uniform_start"], which)
    n, bins = 50_000, 64
    u = start(torch.zeros(4, n), torch.arange(4), torch.tensor(1), number(1.0), 0, -1.0, 1.0)
    assert abs(u.mean()) < 5 / math.sqrt(3 * 4 * n)
    counts = torch.histc(u.double(), bins, -1, 1)
    expected = 4 * n / bins
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_squared - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    correlation = torch.corrcoef(torch.stack([u[0], u[1], u[0].roll(1), u[2]]))
    assert (correlation - torch.eye(4)).abs().max() < 5 / math.sqrt(n)


@both
@pytest.mark.parametrize("name", ["uniform_start", "gather_augment"])
def test_a_draw_belongs_to_its_image(name: str, which: str) -> None:
    """Neither the place in the batch nor the other images matter."""
    fn = twin(BY_NAME[name], which)
    order = torch.tensor([5, 2, 4, 0, 3, 1, 6, 7])
    ids = torch.arange(8) * 2**33 + 5
    if name == "uniform_start":
        x = torch.rand(8, 3, 5, 5)

        def draw(pick: torch.Tensor) -> torch.Tensor:
            return fn(x[pick], ids[pick], torch.tensor(3), number(0.1), 0, 0.0, 1.0)
    else:
        data = torch.randint(0, 256, (8, 3, 9, 9), dtype=torch.uint8)

        def draw(pick: torch.Tensor) -> torch.Tensor:
            return fn(data, pick, ids[pick], torch.tensor(3), 2, True)

    whole = draw(torch.arange(8))
    assert torch.equal(draw(order), whole[order])
    assert torch.equal(torch.cat([draw(order[:3]), draw(order[3:])]), whole[order])
    assert not torch.equal(whole[0], whole[1])


# --- attacks


@both
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), eps=st.floats(0, 0.5), alpha=st.floats(0, 0.5))
def test_linf_step_keeps_the_budget(which: str, seed: int, eps: float, alpha: float) -> None:
    step = twin(BY_NAME["linf_step"], which)
    random = torch.Generator().manual_seed(seed)
    x, grad = torch.rand(2, 3, 7, generator=random), torch.randn(2, 3, 7, generator=random)
    x_adv = x.clone()
    for _ in range(3):
        step(x_adv, grad, x, number(alpha), number(eps))
    assert (x_adv.double() - x.double()).abs().max() <= eps + 1e-7
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    # A constant gradient has a closed form.
    reach = min(3 * alpha, eps)
    torch.testing.assert_close(x_adv, (x + reach * grad.sign()).clamp(0, 1), rtol=0, atol=3e-7)


@both
@pytest.mark.parametrize("name", ["linf_step", "l2_step"])
def test_no_gradient_no_move(name: str, which: str) -> None:
    step = twin(BY_NAME[name], which)
    x = torch.rand(3, 4, 5)
    grad = torch.zeros(3, 4, 5)
    grad[1] = float("nan")
    x_adv = (x + 0.01).clamp(0, 1)
    before = x_adv.clone()
    step(x_adv, grad, x, number(0.1), number(0.5))
    assert torch.equal(x_adv, before)
    step(x_adv, torch.randn(3, 4, 5), x, number(0.1), number(0.0))
    assert torch.equal(x_adv, x)


@both
def test_one_nan_spoils_one_l2_image_and_one_linf_pixel(which: str) -> None:
    x, grad = torch.full((2, 3, 4), 0.5), torch.ones(2, 3, 4)
    grad[0, 1, 2] = float("nan")
    for name in ("linf_step", "l2_step"):
        x_adv = x.clone()
        twin(BY_NAME[name], which)(x_adv, grad, x, number(0.1), number(0.3))
        assert x_adv.isfinite().all()
        assert x_adv[0, 1, 2] == 0.5
        assert (x_adv[1] > 0.5).all()
        assert (x_adv[0] > 0.5).sum() == (11 if name == "linf_step" else 0)


@both
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_l2_step_closed_form(which: str, scale: float) -> None:
    """From x the first step has length alpha, or eps where that is less, along the gradient of any scale."""
    step = twin(BY_NAME["l2_step"], which)
    x = torch.full((2, 3, 8, 8), 0.5)
    grad = torch.randn(2, 3, 8, 8)
    direction = grad.double() / grad.double().flatten(1).norm(dim=1)[:, None, None, None]
    for alpha, eps in ((0.1, 0.5), (2.0, 0.5)):
        x_adv = x.clone()
        step(x_adv, grad * scale, x, number(alpha), number(eps))
        moved = x_adv.double() - x.double()
        torch.testing.assert_close(moved, min(alpha, eps) * direction, rtol=1e-5, atol=6e-8)


@both
@settings(max_examples=25, deadline=None)
@example(seed=0, eps=0.5, level=0.3, flat=True)  # 3e-7 too far if rounded to the nearest float
@example(seed=0, eps=0.0, level=0.3, flat=True)  # 0 / 0
@given(seed=st.integers(0, 2**31), eps=st.floats(0, 3), level=st.floats(0, 1), flat=st.booleans())
def test_l2_step_keeps_the_budget(which: str, seed: int, eps: float, level: float, flat: bool) -> None:
    """Measured in float64, on flat images too, whose pixels all round the same way."""
    step = twin(BY_NAME["l2_step"], which)
    random = torch.Generator().manual_seed(seed)
    shape = (2, 3, 32, 32)
    x = torch.full(shape, level) if flat else torch.rand(shape, generator=random)
    grad = torch.ones(shape) if flat else torch.randn(shape, generator=random)
    x_adv = x.clone()
    for _ in range(3):
        step(x_adv, grad, x, number(eps / 2), number(eps))
        assert (x_adv.double() - x.double()).flatten(1).norm(dim=1).max() <= eps + 1e-7
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1


# --- norms and SAM


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_are_right_at_any_scale(which: str, dtype: torch.dtype, scale: float) -> None:
    v = (torch.randn(70_001) * scale).to(dtype)
    exact = np.sqrt(np.sum(v.double().numpy().astype(np.longdouble) ** 2))
    assert abs(float(twin(BY_NAME["global_norm"], which)(v)) / exact - 1) < 1e-7
    offsets = torch.tensor([0, 3, 3, 40_000, 70_001])
    norms = twin(BY_NAME["layer_norms"], which)(v, offsets)
    assert norms[1] == 0
    assert abs(float(norms.double().square().sum().sqrt()) / exact - 1) < 2e-7


def test_norms_are_the_same_bits_for_any_number_of_threads() -> None:
    v = torch.randn(300_001)
    offsets = torch.tensor([0, 100_001, 300_001])
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append((ops.global_norm(v), ops.layer_norms(v, offsets)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@both
def test_sam_perturb_has_radius_rho_along_the_gradient(which: str) -> None:
    perturb = twin(BY_NAME["sam_perturb"], which)
    w, g = torch.randn(2, 5003).unbind()
    e = torch.full_like(w, float("nan"))
    offsets = torch.tensor([0, 5003])
    perturb(e, g, w, ops.layer_norms(g, offsets), offsets, number(0.05), False, 0.0)
    assert abs(float(e.double().norm()) / 0.05 - 1) < 1e-6
    assert torch.cosine_similarity(e.double(), g.double(), dim=0) > 1 - 1e-12

    layers = torch.tensor([0, 7, 2000, 5003])
    perturb(e, g, w, ops.layer_norms(g, layers), layers, number(0.05), False, 0.0)
    torch.testing.assert_close(ops.layer_norms(e, layers), torch.full((3,), 0.05), rtol=1e-6, atol=0)


@both
def test_sam_perturb_adaptive_closed_form(which: str) -> None:
    """ASAM's ascent point lies on ||e / t|| = rho, along t² g (Kwon et al. 2021, eq. 11)."""
    w, g = torch.randn(2, 3001).unbind()
    t, e, offsets = w.abs() + 0.01, torch.empty(3001), torch.tensor([0, 3001])
    twin(BY_NAME["sam_perturb"], which)(e, g, w, ops.layer_norms(t * g, offsets), offsets, number(0.5), True, 0.01)
    assert abs(float((e / t).double().norm()) / 0.5 - 1) < 1e-6
    assert torch.cosine_similarity((e / t).double(), (t * g).double(), dim=0) > 1 - 1e-12


@both
def test_sam_perturb_leaves_a_non_finite_layer_alone(which: str) -> None:
    g = torch.tensor([1.0, 2.0, float("nan"), float("inf"), 3.0])
    offsets = torch.tensor([0, 2, 4, 5])
    e = torch.full((5,), float("nan"))
    norms = ops.layer_norms(g, offsets)
    assert norms.isnan().tolist() == [False, True, False]
    twin(BY_NAME["sam_perturb"], which)(e, g, torch.ones(5), norms, offsets, number(1.0), False, 0.0)
    torch.testing.assert_close(e, torch.tensor([1 / 5**0.5, 2 / 5**0.5, 0, 0, 1]))
    twin(BY_NAME["sam_perturb"], which)(e, g[:2].repeat(3)[:5], torch.ones(5), norms, offsets, number(0.0), False, 0.0)
    assert not e.any()


# --- optimizers


@both
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_sgd_update_equals_torch(which: str, max_norm: float, nesterov: bool) -> None:
    start, lr = torch.randn(1003), 0.1
    w, m, half = start.clone(), torch.zeros(1003), start.bfloat16()
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theirs], lr=lr, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
    for k in range(4):
        g = torch.randn(1003) * 10.0 ** (k - 2)  # clipped in some steps, not in others
        twin(BY_NAME["sgd_update"], which)(w, m, half, g, ops.global_norm(g), number(lr), max_norm, 0.9, 1e-2, nesterov)
        theirs.grad = g.clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_([theirs], max_norm)
        optimizer.step()
        torch.testing.assert_close(w, theirs.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(half, w.bfloat16())


@both
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_adamw_update_equals_torch(which: str, max_norm: float) -> None:
    start, lr = torch.randn(1003), 1e-2
    w, m, v, half = start.clone(), torch.zeros(1003), torch.zeros(1003), start.bfloat16()
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for k in range(5):
        g = torch.randn(1003) * 10.0 ** (k - 2)
        twin(BY_NAME["adamw_update"], which)(
            w, m, v, half, g, ops.global_norm(g), number(k + 1.0), number(lr), max_norm, 0.9, 0.99, 1e-8, 0.1
        )
        theirs.grad = g.clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_([theirs], max_norm)
        optimizer.step()
        torch.testing.assert_close(w, theirs.detach(), rtol=2e-6, atol=2e-6)
        assert torch.equal(half, w.bfloat16())


@both
@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["sgd_update", "adamw_update"])
def test_a_non_finite_gradient_writes_nothing(name: str, which: str, norm: float) -> None:
    w, g = torch.randn(2, 2001).unbind()
    g[3] = norm
    state = [w.clone(), torch.rand(2001), *([torch.rand(2001)] if name == "adamw_update" else []), w.bfloat16()]
    before = copy.deepcopy(state)
    step = [number(3.0)] if name == "adamw_update" else []
    hyper = [0.9, 0.99, 1e-8, 0.1] if name == "adamw_update" else [0.9, 0.1, True]
    twin(BY_NAME[name], which)(*state, g, ops.global_norm(g), *step, number(0.1), 1.0, *hyper)
    assert all(torch.equal(new, old) for new, old in zip(state, before, strict=True))


# --- products


def products(forward) -> int:
    """How many products `forward` and the gradients of its result ask for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        forward().sum().backward()
    return sum(event.name == "safer_fast::linear" for event in profile.events())


def test_linear_computes_and_keeps_only_what_is_asked_for() -> None:
    x, w, b = torch.randn(6, 4, 8), torch.randn(5, 8), torch.randn(5)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert products(lambda: ops.linear(x.requires_grad_(), w, b)) == 2
        assert [t.data_ptr() for t in kept] == [w.data_ptr()]
        kept.clear()
        assert products(lambda: ops.linear(x.detach(), w.requires_grad_(), b)) == 2
        assert [t.data_ptr() for t in kept] == [x.data_ptr()]
        assert products(lambda: ops.linear(x, w, b)) == 3
        kept.clear()
        assert products(lambda: ops.linear(x.detach(), w.detach(), b.requires_grad_())) == 1
        assert not kept


def test_linear_gradients_are_f_linears() -> None:
    for args in BY_NAME["linear"].samples("cpu", torch.float32, 0):
        leaves = [None if t is None else t.requires_grad_() for t in args]
        ours, theirs = ops.linear(*leaves), torch.nn.functional.linear(*leaves)
        g, inputs = torch.randn_like(ours), [t for t in leaves if t is not None]
        gradients = (torch.autograd.grad(y, inputs, g) for y in (ours, theirs))
        for a, b in zip(*gradients, strict=True):
            agree("linear", a, b)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(ops.linear, leaves)
    assert torch.autograd.gradgradcheck(ops.linear, leaves)


def test_linear_without_onednn_is_f_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = next(iter(BY_NAME["linear"].samples("cpu", torch.float32, 0)))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(ops.linear(x, w, b), torch.nn.functional.linear(x, w, b))
    with monkeypatch.context() as patch:
        patch.setattr(linear, "_onednn", lambda x, w, b: x @ w.t())
        patch.setattr(linear, "have_onednn", linear.have_onednn.__wrapped__)
        if torch.backends.mkldnn.is_available():
            with pytest.warns(RuntimeWarning, match="F.linear runs instead: a wrong result"):
                assert torch.equal(ops.linear(x, w, b), torch.nn.functional.linear(x, w, b))


def sdpa(qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 65, 197])
def test_attention_is_sdpa(tokens: int, dtype: torch.dtype, which: str) -> None:
    for heads in (1, 3):
        for d in (7, 16, 24, 32, 64):
            qkv = torch.randn(2, tokens, 3, heads, d, dtype=dtype, requires_grad=True)
            expected = sdpa(qkv)
            out, probs = twin(BY_NAME["attention"], which)(qkv)
            agree("attention", out, expected)
            assert probs.shape == (2, heads, tokens, tokens + -tokens % 16)
            assert (probs[..., tokens:] == 0).all()
            g = torch.randn_like(out)
            ours = twin(BY_NAME["attention_backward"], which)(g, qkv.detach(), probs.detach())
            agree("attention_backward", ours, torch.autograd.grad(expected, qkv, g)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at one that is no leaf
def test_attention_gradients() -> None:
    qkv = torch.randn(2, 5, 3, 2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.attention(t)[0], qkv)
    assert not ops.attention(qkv)[1].requires_grad
    torch.library.opcheck(BY_NAME["attention"].run._opoverload, (qkv.detach().float().requires_grad_(),))
    once = torch.autograd.grad(ops.attention(qkv)[0].sum(), qkv, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="attention_backward"):
        once.sum().backward()


@pytest.mark.skipif(ops.active("attention", "cpu") != "native", reason="a promise of the C++ kernel's")
def test_attention_of_an_image_is_its_own() -> None:
    qkv, g = torch.randn(5, 65, 3, 3, 64), torch.randn(5, 65, 192)

    def both_ways(pick: slice) -> list[torch.Tensor]:
        out, probs = ops.attention(qkv[pick])
        return [out, probs, ops.attention_backward(g[pick], qkv[pick], probs)]

    threads, whole = torch.get_num_threads(), both_ways(slice(None))
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for i in range(5):
            assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(both_ways(slice(i, i + 1)), whole, strict=True))
    finally:
        torch.set_num_threads(threads)


@both
def test_attention_of_extremes(which: str) -> None:
    attend = twin(BY_NAME["attention"], which)
    qkv = torch.randn(2, 17, 3, 2, 16)
    qkv[0, :, :2, 0] *= 1e4  # scores of 1e8: a choice of one token each
    out, _ = attend(qkv)
    scores = torch.einsum("ihd,jhd->hij", qkv[0, :, 0], qkv[0, :, 1])[0]
    torch.testing.assert_close(out[0, :, :16], qkv[0, scores.argmax(dim=1), 2, 0])
    qkv[1, 3, 0, 1, 2] = float("nan")  # one query of one head
    spoilt_out, _ = attend(qkv)
    assert spoilt_out[1, 3, 16:].isnan().all()
    assert spoilt_out.isnan().sum() == 16
    assert torch.equal(spoilt_out[0], out[0])


@pytest.mark.skipif(ops.active("attention", "cpu") != "native", reason="there is no C++ kernel")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_attention_on_lesser_machines(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFER_FAST_ISA", isa)
    for dtype in (torch.float32, torch.float64):
        for args in BY_NAME[name].samples("cpu", dtype, 0):
            for ours, theirs in zip(
                *(tree_leaves(twin(BY_NAME[name], w)(*args)) for w in ("run", "reference")), strict=True
            ):
                agree(name, ours, theirs)


# --- data


@both
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    pad=st.integers(0, 5),
    flip=st.booleans(),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_gather_augment_equals_torchvision(
    which: str, seed: int, pad: int, flip: bool, height: int, width: int
) -> None:
    data = torch.randint(0, 256, (6, 3, height, width), dtype=torch.uint8)
    index, ids = torch.tensor([5, 0, 5, 2]), torch.tensor([7, -1, 2**40 + 3, 0])
    batch = twin(BY_NAME["gather_augment"], which)(data, index, ids, torch.tensor(seed), pad, flip)
    key = [seed % 2**32, (seed >> 32) % 2**32]
    for image, source, name in zip(batch, index.tolist(), ids.tolist(), strict=True):
        w0, w1, w2, _ = philox_ints([0, name % 2**32, (name >> 32) % 2**32, 0xA06], key)
        top, left = w0 * (2 * pad + 1) // 2**32, w1 * (2 * pad + 1) // 2**32
        expected = tv.crop(tv.pad(data[source], [pad]), top, left, height, width)
        if flip and w2 % 2:
            expected = tv.horizontal_flip(expected)
        assert torch.equal(image, (expected.double() / 255).float())


@both
def test_gather_augment_without_augmentation_is_loading(which: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    args = (data, torch.tensor([0]), torch.tensor([9]), torch.tensor(1), 0, False)
    pixels = twin(BY_NAME["gather_augment"], which)(*args)
    assert torch.equal(pixels, torch.from_numpy((np.arange(256) / 255).astype(np.float32)).view(1, 1, 16, 16))
