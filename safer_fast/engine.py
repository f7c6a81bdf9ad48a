"""Makes a step fast: precision, compilation, prefix reuse, class-token-only last block, CUDA graph.

The result is `step.Step` with its seams filled, so the mathematics is written once:
    eager      the specification itself
    native     on a CPU: Linear layers by oneDNN, attention in C++; nothing is compiled, every shape is welcome
    compiled   one graph an attack iteration; both passes compiled from the first selected block on
    captured   the whole compiled step as one CUDA graph
In bf16 the frozen network computes in bf16 without autocast, the selected layers have fp32 masters in the store, and
SAM's perturbation stays a tensor of its own (see perturbed).
"""

import copy
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import ops, perturbed
from .attacks import PGD
from .attacks.objectives import OBJECTIVES
from .losses import CrossEntropy, Loss
from .models import Segment, segment_of, segments
from .modes import eval_mode, has_dropout, only_grad
from .optimizers import SGD, Optimizer
from .sam import SAM
from .step import DTYPES, MicroBatch, Step

MODES = ("auto", "eager", "native", "compiled", "captured")
ASKED = "asked for"
Forward = Callable[[Tensor], Tensor]


class Choice(NamedTuple):
    """How the step runs, and why."""

    mode: str
    reason: str


def compile_step(
    model: nn.Module,
    layers: str | Iterable[str],
    *,
    attack: PGD | None = PGD(),
    sam: SAM = SAM(),
    optimizer: Optimizer = SGD(),
    loss: Loss = CrossEntropy(),
    clip: float = 1.0,
    accumulate: int = 1,
    precision: str = "auto",
    mode: str = "auto",
    seed: int = 0,
    batch: int | None = None,
) -> Step:
    """A training step, as fast as this machine allows: loss = step(images, labels). Arguments as in `Step`.

    precision: "fp32", "bf16", "fp16" or "auto" (bf16 on a GPU that has it, else fp32). mode: "eager", "native" (CPU),
    "compiled", "captured" (one CUDA graph), or "auto", the fastest that works here; `step.mode` and `step.reason`
    tell which. batch: images of the usual call; by default those of the first. Where something is compiled, the first call does it (a minute or two) for the shape of its batch; a
    batch of another shape, such as a short last one, runs eagerly. A schedule's values recompile nothing.
    In bf16 it computes with a copy: who changes the model's frozen weights calls `step.load_state_tensors` afterwards.
    Raises ValueError for a mode or precision that cannot be had, with the reason.
    """
    device = next(model.parameters()).device
    precision = choose_precision(precision, device)
    options: dict[str, Any] = {
        "attack": attack, "sam": sam, "optimizer": optimizer, "loss": loss, "clip": clip, "accumulate": accumulate,
        "precision": precision, "seed": seed,
    }  # fmt: skip
    choice = choose_mode(mode, device)
    if choice.mode == "eager":
        step = Step(model, layers, **options)
        step.mode, step.reason = choice.mode, choice.reason
        return step
    return FastStep(model, layers, choice=choice, batch=batch, **options)


def compile_attack(model: nn.Module, attack: PGD, *, mode: str = "auto") -> Callable[..., Tensor]:
    """The attack alone, its iteration compiled: x_adv = attack(images, labels, ids, seed=, eps=).

    Arguments and result as of the attack itself, without the model; fp32 or whatever dtype the model has. Every new
    batch shape compiles once more.
    """
    choice = choose_mode(mode, next(model.parameters()).device)
    forward, iterate = None, None
    if choice.mode == "native":
        forward = native(chain(segments(model, class_token_only=True, attention=_attention)))
    elif choice.mode != "eager":
        forward = chain(segments(model, class_token_only=True))
        iterate = compiled_iteration(attack, forward)

    def run(x: Tensor, y: Tensor, ids: Tensor | None = None, **keys: Any) -> Tensor:
        with only_grad(model, ()):
            return attack(model, x, y, ids, forward=forward, iterate=iterate, **keys)

    return run


def choose_precision(precision: str, device: torch.device) -> str:
    """The precision asked for, or the best for this device. Raises ValueError where it would be emulated."""
    if precision != "auto" and precision not in DTYPES:
        raise ValueError(f"precision={precision!r}: choose one of auto, {', '.join(DTYPES)}")
    if device.type == "cpu":
        if precision in ("bf16", "fp16"):
            raise ValueError(f"precision={precision} on a CPU: it is emulated and many times slower there; use fp32")
        return "fp32"
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("precision=bf16: this GPU has none (it came with Ampere); use fp16 or fp32")
    if precision == "auto":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return precision


def choose_mode(mode: str, device: torch.device) -> Choice:
    """The mode asked for, or the fastest for this device. Raises ValueError for one that cannot be had."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    impossible = _impossible(mode, device)
    if impossible:
        raise ValueError(f"mode={mode}: {impossible}")
    if mode != "auto":
        return Choice(mode, ASKED)
    if device.type == "cuda":
        return Choice("captured", "a GPU")
    return Choice(
        "native", f"a CPU; linear by {ops.active('linear', device)}, attention by {ops.active('attention', device)}"
    )


def _impossible(mode: str, device: torch.device) -> str:
    """Why a mode cannot be had on this device; "" if it can."""
    if mode == "captured" and device.type != "cuda":
        return f"CUDA graphs need a GPU, and the model is on {device.type}; use compiled or native"
    if mode == "native" and device.type != "cpu":
        return f"its kernels are for CPUs, and the model is on {device.type}; use captured"
    if mode == "compiled" and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "no C++ compiler (g++ or clang++) was found; install one, or use native"
    return ""


class FastStep(Step):
    """`Step`, compiled and perhaps captured. The first batch decides the shape; others run eagerly."""

    def __init__(
        self, model: nn.Module, layers: str | Iterable[str], *, choice: Choice, batch: int | None = None, **options: Any
    ) -> None:
        self._batch = batch
        self._kind: tuple[Any, ...] | None = None
        self._graph: _Graph | None = None
        self._fast = False
        self._iterate: Callable[..., Tensor] | None = None
        self._choice = choice
        super().__init__(model, layers, **options)

    def __call__(self, images: Tensor, labels: Tensor, ids: Tensor | None = None, **schedule: Any) -> Tensor:
        kind = (images.shape[1:], labels.shape[1:], labels.dtype)
        self._batch, self._kind = self._batch or len(images), self._kind or kind
        usual = len(images) == self._batch and kind == self._kind and len(images) % self.accumulate == 0
        self._fast = self.mode == "native" or (usual and self.mode != "eager")
        try:
            return super().__call__(images, labels, ids, **schedule)
        except torch._dynamo.exc.TorchDynamoException as error:
            # The attack compiles first, before any weight has changed, so the step can be taken again.
            self._fall_back(str(error).strip().splitlines()[0])
        return super().__call__(images, labels, ids, **schedule)

    def _fall_back(self, why: str) -> None:
        """To eager where the engine chose the mode itself; a mode that was asked for and cannot be had raises."""
        if self._choice.reason == ASKED:
            raise ValueError(
                f"mode={self.mode}: this model cannot be compiled into one graph ({why}); use eager or auto"
            )
        self.mode, self.reason = self._choice = Choice("eager", f"this model cannot be compiled into one graph: {why}")
        self._fast, self._graph, self._count = False, None, self._count - 1
        warnings.warn(f"the step runs eagerly: {self.reason}", RuntimeWarning, stacklevel=3)

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """As in Step; a captured graph is captured anew."""
        super().load_state_tensors(tensors)
        self._graph = None
        if self._shadow is not None:  # the frozen weights may have been loaded since it was made
            own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
            with torch.no_grad():
                for name, t in (*self.compute.named_parameters(), *self.compute.named_buffers()):
                    t.copy_(own[name])

    def _use(self, layers: str | Iterable[str]) -> None:
        """Beside the store: the model that computes, cut at the first selected segment."""
        super()._use(layers)
        self._graph = None
        self.mode, self.reason = self._choice
        dropout = has_dropout(self.model, self._training)
        obstacle = self._obstacle(dropout)
        if self.mode == "captured" and obstacle:
            self.mode, self.reason = "compiled", obstacle
        self._shadow = self._make_shadow()
        pieces = self._pieces(dropout)
        first = min(segment_of(pieces, name) for name in self.store.layers)
        make = native if self.mode == "native" else compiled
        self._whole, suffix = chain(pieces), chain(pieces[first:])
        self._prefix = make(chain(pieces[:first])) if first else None
        self._suffix = make(suffix)
        self._choose_iteration()

    def _obstacle(self, dropout: bool) -> str:
        """Why this step cannot be one CUDA graph; "" if it can."""
        if dropout:
            return "dropout is active in a trained module, and both passes must draw alike"
        foreign = self.optimizer.impl != "fused"
        return f"the {self.optimizer.impl} optimizer reads its learning rate on the host" if foreign else ""

    def _pieces(self, dropout: bool) -> list[Segment]:
        plain = self.mode == "native" and self.precision == "fp32" and not dropout
        attention = _attention if plain else None
        pieces = segments(self.compute, class_token_only=not dropout, attention=attention)
        if self._shadow is None:
            return pieces
        head = pieces[-1].forward
        return [*pieces[:-1], pieces[-1]._replace(forward=lambda x: head(x).float())]

    def _choose_iteration(self) -> None:
        """A re-selection keeps what was compiled for the attack, unless the computing model is another one."""
        if self.mode == "native":
            self._whole = native(self._whole)
        elif self.attack and (self._iterate is None or self._shadow is not None):
            self._iterate = compiled_iteration(self.attack, self._whole)

    def _make_shadow(self) -> "list[Any] | None":
        """In bf16, a copy of the model in bf16 that computes; its selected layers, made perturbable."""
        self.compute, self.params, self.copy_P = self.model, self.store.params, None
        if self.precision != "bf16":
            return None
        owners = [self.model.get_submodule(name) for name in self.store.layers]
        if not all(map(perturbed.is_perturbable, owners)) or len(segments(self.model)) == 1:
            self.reason += "; bf16 by autocast, since more than Linear and Conv2d layers is trained"
            return None
        return self._bf16_copy()

    def _bf16_copy(self) -> list[Any]:
        dtype = DTYPES[self.precision]
        self.compute = copy.deepcopy(self.model)
        tensors = (*self.compute.named_parameters(), *self.compute.named_buffers())
        for tensor in (t for name, t in tensors if t.is_floating_point() and not name.startswith("pixel_")):
            tensor.data = tensor.data.to(dtype)  # the pixels' mean and deviation stay fp32, as the pixels do
        self.params = [self.compute.get_parameter(name) for name in self.store.names]
        self.copy_P = self.store.w_P.to(dtype)
        self._e_copy_P = torch.zeros_like(self.copy_P)
        moves = dict(zip(self.store.names, self.store.split(self._e_copy_P), strict=True))
        for p, view in zip(self.params, self.store.split(self.copy_P), strict=True):
            p.data = view
        return [
            perturbed.perturbable(self.compute.get_submodule(n), moves[f"{n}.weight"], moves.get(f"{n}.bias"))
            for n in self.store.layers
        ]

    def _run(self, images: Tensor, labels: Tensor, ids: Tensor, *, attacked: bool) -> Tensor:
        self.forward = self._suffix if self._fast else self._whole
        if self.mode != "captured" or not (self._fast and attacked):
            return super()._run(images, labels, ids, attacked=attacked)
        if self._graph is None:
            self._graph = _Graph(self, images, labels, ids, super()._run)
        return self._graph.replay(images, labels, ids)

    def _attack(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        attack, iterate = self.attack, self._iterate if self._fast else None
        assert attack is not None

        def run(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
            return attack(self.compute, x, y, ids, seed=self._seed, eps=self._eps, forward=self._whole, iterate=iterate)

        with only_grad(self.compute, ()), self._autocast():
            if self.mode != "native":
                return run(x, y, ids)
            with eval_mode(self.compute):  # set once for all threads: each would give back what another one set
                return in_threads(run, x, y, ids)

    def _craft(self, images: Tensor, labels: Tensor, ids: Tensor, *, attacked: bool) -> list[MicroBatch]:
        """As in Step, and what comes before the first selected segment computed once for both passes."""
        batch = super()._craft(images, labels, ids, attacked=attacked)
        if not self._fast or self._prefix is None:
            return batch
        clean = not isinstance(self.loss, CrossEntropy)  # TRADES and MART look at the clean images too
        with torch.no_grad(), eval_mode(self.compute), only_grad(self.compute, ()), self._autocast():
            return [p._replace(x_adv=self._prefix(p.x_adv), x=self._prefix(p.x) if clean else p.x) for p in batch]

    def _dropout_draw(self) -> Tensor | None:
        return None if self.mode == "captured" else super()._dropout_draw()  # captured has no dropout, see _use

    def _moved(self) -> AbstractContextManager[None]:
        if self._shadow is None:
            return super()._moved()
        self._e_copy_P.copy_(self._e_P)
        return perturbed.moved(self._shadow)

    def _autocast(self) -> AbstractContextManager[object]:
        return super()._autocast() if self._shadow is None else nullcontext()


class _Graph:
    """A captured step: static inputs, the CUDA graph, static results."""

    def __init__(self, step: FastStep, images: Tensor, labels: Tensor, ids: Tensor, run: Callable[..., Tensor]) -> None:
        self.step = step
        self.inputs = [t.clone() for t in (images, labels, ids)]
        kept = [t for t in (step.store.w_P, step.copy_P, *step.state_tensors().values()) if t is not None]
        before = [t.clone() for t in kept]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets every library allocate what it needs
                run(*self.inputs, attacked=True)
        torch.cuda.current_stream().wait_stream(stream)
        for t, b in zip(kept, before, strict=True):
            t.copy_(b)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = run(*self.inputs, attacked=True)
        self.accuracy = step.accuracy

    def replay(self, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """One step on these; results are copies, since the next replay overwrites its own."""
        for static, value in zip(self.inputs, (images, labels, ids), strict=True):
            static.copy_(value)
        self.graph.replay()
        self.step.accuracy = self.accuracy.clone()
        return self.loss.clone()


def chain(pieces: Sequence[Segment]) -> Forward:
    """The segments as one function."""

    def forward(x: Tensor) -> Tensor:
        for piece in pieces:
            x = piece.forward(x)
        return x

    return forward


def compiled_iteration(attack: PGD, forward: Forward) -> Callable[..., Tensor]:
    """One attack iteration as one graph: forward, input gradient alone, step and projection.

    autograd.grad inside the graph is what leaves out the weight gradients, which a compiled module otherwise computes.
    """

    def iterate(z: Tensor, x: Tensor, y: Tensor, alpha: Tensor, eps: Tensor, reference: Tensor | None) -> Tensor:
        value = OBJECTIVES[attack.objective](forward(z), y, reference).sum()
        (g,) = torch.autograd.grad(value, z)
        return attack.move(z, g, x, alpha, eps)

    whole = compiled(iterate, fullgraph=True)

    def run(x_adv: Tensor, *rest: Any) -> Tensor:
        # The pixels come in as an input that requires grad: requires_grad_() inside a graph fails on torch 2.11.
        with torch.enable_grad():
            return whole(x_adv.detach().requires_grad_(), *rest)

    return run


def compiled(function: Callable[..., Tensor], *, fullgraph: bool = False) -> Callable[..., Tensor]:
    """torch.compile for static shapes, with autograd.grad traced into the graph."""
    fast = torch.compile(function, fullgraph=fullgraph, dynamic=False)

    def run(*arguments: Any) -> Tensor:
        # Dynamo counts recompilations by code object: several steps in one process share ours.
        with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64):
            return fast(*arguments)

    return run


def _attention(qkv: Tensor) -> Tensor:
    return ops.attention(qkv)[0]


_SMALL = 65  # rows; below, the op's overhead eats what oneDNN gains (measured: 0.3x at 32 rows, even at 65)


class _OneDNN(TorchFunctionMode):
    """Sends every F.linear inside through ops.linear, in any model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args and args[0].numel() >= _SMALL * args[0].shape[-1]:
            return ops.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def in_threads(run: Callable[..., Tensor], *batch: Tensor) -> Tensor:
    """run(*batch) with the batch cut into one part a CPU thread, each computing alone: no thread waits at the end of
    every operator. Exact where images do not mix. What `run` changes in the model has to be set before."""
    threads = torch.get_num_threads()
    n = min(threads, len(batch[0]))
    if n == 1:
        return run(*batch)
    parts = zip(*(t.tensor_split(n) for t in batch), strict=True)
    try:
        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = [future.result() for future in [pool.submit(run, *part) for part in parts]]
    finally:
        torch.set_num_threads(threads)  # MKL knows one number for the whole process
    return torch.cat(results)


def fast_linear(device: torch.device) -> AbstractContextManager[object]:
    """Inside, every Linear of every model takes the fastest exact way on this device."""
    return _OneDNN() if device.type == "cpu" else nullcontext()


def native(function: Forward) -> Forward:
    """The function with its Linear layers by oneDNN: MKL runs at half its speed on CPUs that are not Intel's."""

    def run(x: Tensor) -> Tensor:
        with _OneDNN():
            return function(x)

    return run
