"""The engine against the eager step; what its graphs contain; what bf16 does to SAM's perturbation."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from safer_fast.attacks import PGD
from safer_fast.engine import Choice, FastStep, choose_mode, choose_precision, compile_attack, compile_step
from safer_fast.losses import MART, TRADES
from safer_fast.models import create_model
from safer_fast.optimizers import SGD
from safer_fast.sam import SAM

LAYERS = ["blocks.2.mlp.fc1", "blocks.3.attn.qkv"]
DEPTH = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model(
        "vit_tiny_patch16_224",
        num_classes=5,
        img_size=8,
        patch_size=4,
        in_chans=1,
        embed_dim=32,
        depth=DEPTH,
        num_heads=2,
    )


def data(n: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 8, 8, generator=generator).to(dtype), torch.arange(n) % 5


def pair(model: nn.Module, layers, mode: str, dtype: torch.dtype, **options):
    """The eager step and another on copies of one model."""
    options = {"optimizer": SGD(lr=0.1), "attack": PGD(eps=0.1, steps=3), **options}
    slow = compile_step(copy.deepcopy(model).to(dtype), layers, mode="eager", **options)
    return slow, compile_step(copy.deepcopy(model).to(dtype), layers, mode=mode, **options)


def whole(step) -> Tensor:
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (LAYERS, {}),
        (LAYERS, {"accumulate": 2}),
        (LAYERS, {"loss": TRADES(), "attack": PGD(eps=0.1, steps=3, objective="kl", start="gaussian")}),
        (LAYERS, {"loss": MART()}),
        (LAYERS, {"sam": SAM(per_layer=True)}),
        (["patch_embed.proj", "head"], {}),
        ("everything", {}),
        (["blocks.3"], {}),
    ],
    ids=["layers", "accumulate", "trades", "mart", "per_layer", "ends", "everything", "block"],
)
def test_native_equals_eager_in_float64(model: nn.Module, layers, options) -> None:
    slow, fast = pair(model, layers, "native", torch.float64, **options)
    x, y = data(dtype=torch.float64)
    for n in (6, 6, 4):  # a short last batch too
        torch.testing.assert_close(fast(x[:n], y[:n]), slow(x[:n], y[:n]), rtol=0, atol=1e-11)
        assert float(fast.accuracy) == float(slow.accuracy)
    torch.testing.assert_close(whole(fast), whole(slow), rtol=0, atol=1e-11)


def test_native_equals_eager_in_float32_after_a_reselection(model: nn.Module) -> None:
    slow, fast = pair(model, LAYERS, "native", torch.float32)
    x, y = data()
    for layers in (LAYERS, ["blocks.0.attn.proj", "blocks.2.mlp.fc1"]):
        slow.select(layers)
        fast.select(layers)
        for _ in range(2):
            torch.testing.assert_close(fast(x, y), slow(x, y), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole(fast), whole(slow), rtol=0, atol=1e-5)


def test_native_in_threads_is_the_same_step(model: nn.Module) -> None:
    """The attack runs a part of the batch a thread; modes come back, and the number of threads changes nothing else."""
    slow, fast = pair(model, LAYERS, "native", torch.float64)
    fast.model.train()
    fast.model.blocks[1].eval()
    modes = [m.training for m in fast.model.modules()]
    x, y = data(7, dtype=torch.float64)
    torch.set_num_threads(3)
    try:
        for _ in range(2):
            torch.testing.assert_close(fast(x, y), slow(x, y), rtol=0, atol=1e-11)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert [m.training for m in fast.model.modules()] == modes
    torch.testing.assert_close(whole(fast), whole(slow), rtol=0, atol=1e-11)


def test_native_works_for_other_architectures() -> None:
    torch.manual_seed(0)
    swin = create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=5,
        img_size=16,
        window_size=2,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(1, 2),
    )
    layers = ["layers.1.blocks.0.mlp.fc1"]
    slow, fast = pair(swin, layers, "native", torch.float64)
    x, y = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    for _ in range(2):
        torch.testing.assert_close(fast(x, y), slow(x, y), rtol=0, atol=1e-10)
    torch.testing.assert_close(whole(fast), whole(slow), rtol=0, atol=1e-10)


def test_compiled_equals_eager_with_a_short_batch_and_a_schedule(model: nn.Module) -> None:
    slow, fast = pair(model, LAYERS, "compiled", torch.float32)
    x, y = data()
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for i, lr in enumerate((0.1, 0.05, 0.01)):
        torch.testing.assert_close(
            fast(x, y, lr=lr, eps=0.1 / (i + 1)), slow(x, y, lr=lr, eps=0.1 / (i + 1)), rtol=0, atol=1e-5
        )
        if i == 0:
            compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles, "a schedule's value recompiled something"
    torch.testing.assert_close(fast(x[:3], y[:3]), slow(x[:3], y[:3]), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole(fast), whole(slow), rtol=0, atol=1e-5)


class Counter:
    """A compiler back end that runs graphs as they are and counts their matrix products and convolutions."""

    def __init__(self) -> None:
        self.products: list[int] = []
        self.convolutions: list[int] = []

    def __call__(self, graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        self.products.append(sum(n in ("aten.mm.default", "aten.addmm.default", "aten.bmm.default") for n in names))
        self.convolutions.append(sum(n.startswith("aten.convolution") for n in names))
        return make_boxed_func(graph.forward)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counting, real = Counter(), torch.compile
    backend = aot_autograd(fw_compiler=counting, bw_compiler=counting)
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    return counting


def test_an_attack_iteration_is_one_graph_without_weight_gradients(model: nn.Module, counter: Counter) -> None:
    attack = compile_attack(copy.deepcopy(model), PGD(eps=0.1, steps=2), mode="compiled")
    x, y = data()
    attack(x, y)
    # Forward: 4 products a block (5 in the last one, whose q and kv are apart) and the head; as many again for the
    # input gradient, and no more: a weight gradient would be one more product for each.
    forward = 4 * DEPTH + 1 + 1
    assert counter.products == [2 * forward]
    assert counter.convolutions == [2]


def test_both_passes_start_at_the_first_selected_block(model: nn.Module, counter: Counter) -> None:
    step = compile_step(copy.deepcopy(model), LAYERS, attack=None, mode="compiled")
    step(*data())
    prefix = 4 * 2  # blocks 0 and 1
    forward = 4 + 5 + 1  # blocks 2 and 3 (whose q and kv are apart), head
    # Input gradients of head, fc2, fc1, proj, q, kv and block 2's fc2; weight gradients of q, kv and block 2's fc1.
    backward = 7 + 3
    assert counter.products == [prefix, forward, backward]  # and pass 2 runs the same two graphs again
    assert counter.convolutions == [1, 0, 0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_effective_perturbation_is_the_one_meant(model: nn.Module, precision: str) -> None:
    """What pass 2 adds to a selected layer's output is x·Eᵀ with E of length rho, in every precision."""
    step = FastStep(
        copy.deepcopy(model), ["blocks.2.mlp.fc1"], choice=Choice("native", "a test"), attack=None, precision=precision,
        sam=SAM(rho=0.05),
    )  # fmt: skip
    x, y = data()
    step(x, y)
    layer = step.compute.get_submodule("blocks.2.mlp.fc1")
    eye = torch.eye(32, dtype=layer.weight.dtype)

    @torch.no_grad()
    def weight() -> Tensor:
        return (layer(eye) - layer(torch.zeros_like(eye))).float().T

    if precision == "fp32":
        before = weight()
        with step._moved():
            effective = weight() - before
    else:
        with step._moved():
            effective = layer.e_weight.float()
    meant = step.store.split(step._e_P)[0]
    total = torch.sqrt(effective.norm() ** 2 + step.store.split(step._e_P)[1].norm() ** 2)
    assert abs(float(total) / 0.05 - 1) < 0.01
    assert float(torch.cosine_similarity(effective.flatten(), meant.flatten(), dim=0)) >= 0.999


def test_bf16_computes_with_copies_and_trains_masters(model: nn.Module) -> None:
    """The frozen model stays fp32 and bit-identical, the copy follows the master, losses stay near fp32's."""
    options = {"attack": PGD(eps=0.1, steps=2), "optimizer": SGD(lr=0.1)}
    before = {n: p.clone() for n, p in model.named_parameters()}
    plain = FastStep(copy.deepcopy(model), LAYERS, choice=Choice("native", "test"), precision="fp32", **options)
    half = FastStep(copy.deepcopy(model), LAYERS, choice=Choice("native", "test"), precision="bf16", **options)
    x, y = data()
    losses = [[float(step(x, y)) for _ in range(8)] for step in (plain, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1][-1] < losses[1][0]
    assert half.copy_P is not None
    assert torch.equal(half.copy_P, half.store.w_P.bfloat16())
    for name, p in half.model.named_parameters():
        assert p.dtype == torch.float32
        assert name.rpartition(".")[0] in LAYERS or torch.equal(p, before[name])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_head_alone_can_be_trained(model: nn.Module, precision: str) -> None:
    options = {"choice": Choice("native", "test"), "precision": precision, "optimizer": SGD(lr=0.1)}
    step = FastStep(copy.deepcopy(model), ["head"], attack=PGD(eps=0.1, steps=2), **options)
    x, y = data()
    losses = [float(step(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_loading_a_state_refreshes_the_bf16_copy(model: nn.Module) -> None:
    options = {"choice": Choice("native", "test"), "precision": "bf16", "attack": None}
    step = FastStep(copy.deepcopy(model), LAYERS, **options)
    other = {name: t + 0.1 for name, t in model.state_dict().items()}
    step.model.load_state_dict(other)
    step.load_state_tensors(step.state_tensors())
    for name, t in step.compute.state_dict().items():
        assert torch.equal(t, other[name].to(t.dtype)), name


def test_the_usual_batch_can_be_told(model: nn.Module) -> None:
    """A run resumed at its short last batch must not take that one for the usual shape."""
    step = FastStep(copy.deepcopy(model), LAYERS, choice=Choice("compiled", "test"), attack=None, batch=6)
    x, y = data()
    step(x[:4], y[:4])
    assert not step._fast


class Breaks(nn.Module):
    """A model that the compiler cannot put into one graph, as peft's DoRA is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.fc(x.flatten(1))


def test_a_model_that_does_not_compile_runs_eagerly_and_says_why() -> None:
    torch.manual_seed(0)
    slow, fast = Breaks(), Breaks()
    fast.load_state_dict(slow.state_dict())
    options = {"attack": PGD(eps=0.1, steps=2), "optimizer": SGD(lr=0.1)}
    eager = compile_step(slow, ["fc"], mode="eager", **options)
    step = FastStep(fast, ["fc"], choice=Choice("compiled", "a GPU"), **options)
    x, y = data()
    with pytest.warns(RuntimeWarning, match="cannot be compiled into one graph"):
        first = step(x, y)
    assert torch.equal(first, eager(x, y))
    assert torch.equal(step(x, y), eager(x, y))
    assert step.mode == "eager"
    assert "one graph" in step.reason
    step.select(["fc"])
    assert step.mode == "eager"
    asked = compile_step(Breaks(), ["fc"], mode="compiled", **options)
    with pytest.raises(ValueError, match="use eager or auto"):
        asked(x, y)


def test_bf16_without_a_shadow_says_so(model: nn.Module) -> None:
    step = FastStep(copy.deepcopy(model), "everything", choice=Choice("native", "test"), precision="bf16", attack=None)
    assert "autocast" in step.reason


@pytest.mark.parametrize(
    ("mode", "sentence"), [("captured", "CUDA graphs need a GPU"), ("fastest", "choose one of auto, eager, native")]
)
def test_a_mode_that_cannot_be_had_is_refused(mode: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        choose_mode(mode, CPU)


def test_a_cpu_takes_the_native_mode_and_no_half_precision() -> None:
    assert choose_mode("auto", CPU).mode == "native"
    assert choose_precision("auto", CPU) == "fp32"
    with pytest.raises(ValueError, match="emulated"):
        choose_precision("bf16", CPU)


def test_compile_attack_equals_the_attack(model: nn.Module) -> None:
    attack, x, y = PGD(eps=0.1, steps=3, restarts=2), *data(dtype=torch.float64)
    double = copy.deepcopy(model).double()
    fast = compile_attack(double, attack, mode="native")
    torch.testing.assert_close(fast(x, y, seed=3), attack(double, x, y, seed=3), rtol=0, atol=1e-12)


def test_captured_equals_eager_on_a_gpu(model: nn.Module) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    slow, fast = pair(model.cuda(), LAYERS, "captured", torch.float32, precision="fp32")
    x, y = (t.cuda() for t in data())
    for lr in (0.1, 0.05, 0.01):
        torch.testing.assert_close(fast(x, y, lr=lr), slow(x, y, lr=lr), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole(fast), whole(slow), rtol=0, atol=1e-5)
