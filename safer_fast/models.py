"""Models of timm that take pixels in [0, 1], their weights, and where their forward can be cut. The owner of timm."""

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models.convit import ConVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from .checkpoint import load_tensors
from .perturbed import linear_rows

_HEADS = ("head.", "head_dist.")

Attend = Callable[[Tensor], Tensor]  # packed qkv [B, N, 3, H, d] -> [B, N, H·d]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: int | None = None,
    patch_size: int | None = None,
    in_chans: int = 3,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm model by its timm name, with the normalisation inside: it takes pixels [B, C, H, W] in [0, 1].

    weights: see `load_weights`; patch and position embeddings are resampled to img_size and patch_size, and a head
    for another number of classes stays at its random start. mean, std: default to the model's own, of its pretraining.
    kwargs go to timm (depth, embed_dim, drop_path_rate, …). Nothing is downloaded. The state dict has timm's names.
    Raises ValueError for an unknown name (with the nearest ones) or arguments that the model refuses.
    """
    if name not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"no model {name!r} in timm {timm.__version__}; " + _near(near))
    sizes = {"img_size": img_size, "patch_size": patch_size}
    given = {key: value for key, value in sizes.items() if value is not None} | kwargs
    # Swin's attention is only fused on request; where it is not possible timm falls back by itself.
    timm.layers.set_fused_attn(True, experimental=True)
    try:
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_chans, **given)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"timm cannot build {name} with {given}: {error}") from error
    config = model.pretrained_cfg
    colour = in_chans == 3
    _normalise_inside(model, mean or (config["mean"] if colour else 0.5), std or (config["std"] if colour else 0.5))
    if weights is not None:
        load_weights(model, weights)
    _settle(model, in_chans)
    return model


def load_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Loads a safetensors file, a run folder of ours, or a .pth / .pth.tar of timm; the names of what stayed random.

    `.pth` is read with weights_only=True: no pickle is executed. timm's `state_dict` nesting and `module.` prefixes
    are understood, patch and position embeddings resampled. Only a classifier head may differ (in its classes).
    Raises FileNotFoundError, or ValueError listing the tensors that do not fit.
    """
    state = _resampled(model, _unprefixed(_read(Path(path))))
    own = model.state_dict()
    heads = [n for n in own if n.startswith(_HEADS) and n in state and state[n].shape != own[n].shape]
    state = {name: t for name, t in state.items() if name not in heads}
    wrong = [
        f"{n}: {_shape(state[n])} in the file, {_shape(own[n])} here"
        for n in own.keys() & state.keys()
        if state[n].shape != own[n].shape
    ]
    missing = [n for n in own if n not in state and n not in heads and not n.startswith(_HEADS)]
    extra = [n for n in state if n not in own and not n.startswith(_HEADS)]
    if wrong or missing or extra:
        raise ValueError(_mismatch(path, wrong, missing, extra))
    bad = [n for n, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise ValueError(
            f"{path} holds NaN or infinity in {', '.join(bad[:3])}: use a file from before the training diverged"
        )
    model.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)
    return [n for n in own if n not in state]


class Segment(NamedTuple):
    """A piece of a forward pass: `forward` maps one tensor to one tensor; `prefixes` name the modules it uses."""

    name: str
    prefixes: tuple[str, ...]
    forward: Callable[[Tensor], Tensor]


def segments(model: nn.Module, *, class_token_only: bool = False, attention: Attend | None = None) -> list[Segment]:
    """The forward pass in eval mode as a chain: embedding, each block, head; calling them in turn is model(x).

    For ViT, DeiT, Swin and ConViT of timm. Any other model is one segment.
    class_token_only: where the head reads the class token alone, the last block computes nothing else (keys and
    values of all tokens, query, projection and MLP of one); the same logits up to rounding, 7 % fewer FLOPs in a Ti.
    attention: computes softmax(q kᵀ/√d) v from the packed qkv [B, N, 3, H, d] in timm's plain ViT blocks.
    """
    if isinstance(model, ConVit):
        return _convit_segments(model)
    if isinstance(model, SwinTransformer):
        return _swin_segments(model)
    if not (
        isinstance(model, VisionTransformer) and type(model).forward_features is VisionTransformer.forward_features
    ):
        return [Segment("model", ("",), model)]
    pieces = _vit_segments(model)
    if attention is not None:
        pieces = [p._replace(forward=_PlainBlock(p.forward, attention)) if _is_plain(p.forward) else p for p in pieces]
    if class_token_only and reads_class_token(model):
        pieces[-2] = pieces[-2]._replace(forward=_ClassTokenBlock(model.blocks[-1], _head_tokens(model)))
    return pieces


def _is_plain(block: Any) -> bool:
    """Whether this is timm's pre-norm block with nothing between the qkv product and the attention."""
    attn: Any = block.attn if type(block) is Block else None
    return (
        type(attn) is Attention
        and attn.fused_attn
        and getattr(attn, "gate", None) is None
        and isinstance(attn.q_norm, nn.Identity)
        and isinstance(attn.k_norm, nn.Identity)
    )


def reads_class_token(model: Any) -> bool:
    """Whether the last block of this model may be computed for its class (and distillation) token alone."""
    block: Any = model.blocks[-1] if isinstance(model, VisionTransformer) and len(model.blocks) else None
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and model.global_pool == "token"
        and model.attn_pool is None
        and getattr(block.attn, "gate", None) is None
        and block.attn.fused_attn
    )


def _head_tokens(model: Any) -> int:
    return 2 if hasattr(model, "dist_token") else 1


class _PlainBlock:
    """timm's pre-norm block around another attention. Legend: B images, N tokens, H heads, D = H·d."""

    def __init__(self, block: Any, attention: Attend) -> None:
        self.block, self.attention = block, attention

    def __call__(self, x_BND: Tensor) -> Tensor:
        block = self.block
        return self._mlp(x_BND + block.drop_path1(block.ls1(self._attend(block.norm1(x_BND)))))

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.block.drop_path2(self.block.ls2(self.block.mlp(self.block.norm2(x))))

    def _attend(self, h_BND: Tensor) -> Tensor:
        attn = self.block.attn
        qkv = attn.qkv(h_BND).view(*h_BND.shape[:2], 3, attn.num_heads, attn.head_dim)
        return attn.proj_drop(attn.proj(attn.norm(self.attention(qkv))))


class _ClassTokenBlock(_PlainBlock):
    """The block for the first n tokens of its output."""

    def __init__(self, block: Any, n: int) -> None:
        self.block, self.n = block, n

    def __call__(self, x_BND: Tensor) -> Tensor:
        block = self.block
        return self._mlp(x_BND[:, : self.n] + block.drop_path1(block.ls1(self._attend(block.norm1(x_BND)))))

    def _attend(self, h_BND: Tensor) -> Tensor:
        attn: Any = self.block.attn
        batch, width = len(h_BND), attn.num_heads * attn.head_dim
        first = h_BND[:, : self.n].reshape(-1, h_BND.shape[-1])  # contiguous: one product, not one an image
        q = linear_rows(attn.qkv, first, slice(0, width))
        kv = linear_rows(attn.qkv, h_BND, slice(width, 3 * width))
        q = q.reshape(batch, self.n, attn.num_heads, attn.head_dim).transpose(1, 2)
        k, v = kv.reshape(batch, -1, 2, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = attn.attn_drop.p if attn.training else 0.0
        out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, dropout_p=dropout)
        return attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).reshape(batch, self.n, width))))


def segment_of(pieces: Sequence[Segment], layer: str) -> int:
    """The index of the first segment that uses this layer, "" being the model's own tokens and positions; what none
    names belongs to the last (norm, head)."""

    def inside(a: str, b: str) -> bool:
        return b == "" or a == b or a.startswith(b + ".")

    for i, piece in enumerate(pieces):
        if any(inside(layer, p) or inside(p, layer) for p in piece.prefixes):
            return i
    return len(pieces) - 1


def _vit_segments(model: Any) -> list[Segment]:
    def embed(x: Tensor) -> Tensor:
        return model.norm_pre(model.patch_drop(model._pos_embed(_patches(model, x))))

    def head(x: Tensor) -> Tensor:
        return model.forward_head(model.norm(x))

    start = ("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre")
    return [Segment("embed", start, embed), *_children(model.blocks, "blocks"), Segment("head", (), head)]


def _swin_segments(model: Any) -> list[Segment]:
    pieces = [Segment("embed", ("patch_embed",), lambda x: _patches(model, x))]
    for i, stage in enumerate(model.layers):
        pieces.append(Segment(f"layers.{i}.downsample", (f"layers.{i}.downsample",), stage.downsample))
        pieces += _children(stage.blocks, f"layers.{i}.blocks")
    return [*pieces, Segment("head", (), lambda x: model.forward_head(model.norm(x)))]


def _convit_segments(model: Any) -> list[Segment]:
    def embed(x: Tensor) -> Tensor:
        x = _patches(model, x)
        return model.pos_drop(x + model.pos_embed if model.use_pos_embed else x)

    def with_class_token(x: Tensor) -> Tensor:
        return torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)

    pieces = [Segment("embed", ("patch_embed", "pos_embed"), embed), *_children(model.blocks, "blocks")]
    pieces.insert(1 + model.local_up_to_layer, Segment("class_token", ("cls_token",), with_class_token))
    return [*pieces, Segment("head", (), lambda x: model.forward_head(model.norm(x)))]


def _children(blocks: Iterable[Any], prefix: str) -> list[Segment]:
    return [Segment(f"{prefix}.{i}", (f"{prefix}.{i}",), block) for i, block in enumerate(blocks)]


def _patches(model: Any, x: Tensor) -> Tensor:
    """The embedded patches of normalised pixels, which stay fp32 until then also where weights are bf16."""
    return model.patch_embed(normalise(model, x).to(next(model.patch_embed.parameters()).dtype))


def normalise(model: nn.Module, x: Tensor) -> Tensor:
    """(x − mean) / std, with the model's own; x as it is for a model that has none."""
    mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
    return x if mean is None or std is None else (x - mean) / std


def _normalise_inside(model: nn.Module, mean: Sequence[float] | float, std: Sequence[float] | float) -> None:
    """As a hook and non-persistent buffers: names and state dict stay timm's."""
    for name, value in (("pixel_mean", mean), ("pixel_std", std)):
        model.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(-1, 1, 1), persistent=False)
    model.register_forward_pre_hook(_normalise_hook)


def _normalise_hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """At the top level of the module, so that a model can be pickled."""
    return (normalise(module, args[0]), *args[1:])


def _settle(model: nn.Module, in_chans: int) -> None:
    """ConViT replaces a buffer in its first forward: let it happen before anything is compared, compiled or frozen."""
    if isinstance(model, ConVit):
        with torch.no_grad():
            model(torch.zeros(1, in_chans, *model.patch_embed.img_size))


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give a .safetensors, .pth or .pth.tar file, or a run folder")
    if path.suffix == ".safetensors":
        return dict(load_tensors(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises UnpicklingError, RuntimeError, EOFError, … for what it does not trust or know
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as weights without executing pickle: {first}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not weights by name: give a state dict")
    return state


def _unprefixed(state: dict[str, Any]) -> dict[str, Tensor]:
    """The innermost state dict, without the prefix that all its names share (DataParallel, torch.compile, wrappers)."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(key), dict):
            return _unprefixed(state[key])
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    for prefix in ("module.", "_orig_mod.", "model."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unprefixed({name.removeprefix(prefix): t for name, t in tensors.items()})
    return tensors


def _resampled(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return convert(state, model) if convert else state


def _mismatch(path: str | Path, wrong: list[str], missing: list[str], extra: list[str]) -> str:
    parts = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:4])}{' …' if len(names) > 4 else ''}"
        for what, names in (("of another shape", wrong), ("missing", missing), ("unknown", extra))
        if names
    ]
    return f"{path} does not fit this model ({'; '.join(parts)}): give the model name, depth and width that it was trained with"


def _shape(t: Tensor) -> str:
    return "×".join(map(str, t.shape))


def _near(names: Sequence[str]) -> str:
    return f"did you mean {', '.join(names)}?" if names else "timm.list_models() lists them"
