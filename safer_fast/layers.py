"""What a layer is: every `Linear` and `Conv2d`, weight and bias together, or whole blocks, or every parameter.

Knows `nn.Module` only. A selection of layers is an ordered mapping {layer name: its parameter names}.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

Layers = dict[str, tuple[str, ...]]

EVERYTHING = "everything"
GRANULARITIES = ("layer", "block")
_BLOCK = re.compile(r"(?:^|\.)blocks\.\d+$")


def candidate_layers(
    model: nn.Module, *, granularity: str = "layer", include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> Layers:
    """All layers that may be selected, in model order.

    granularity: "layer" (each Linear or Conv2d) or "block" (each module whose name ends in `blocks.<n>`).
    include, exclude: glob patterns on the layer name, or regular expressions written `re:<pattern>`.
    Raises ValueError for an unknown granularity, a bad pattern, or when nothing is left.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: choose one of {', '.join(GRANULARITIES)}")
    found = _blocks(model) if granularity == "block" else _weight_layers(model)
    kept = {n: p for n, p in found.items() if matches(n, include) and not matches(n, exclude)}
    if not kept:
        raise ValueError(
            f"no {granularity} is left of the {len(found)} in this model after include={list(include)}, "
            f"exclude={list(exclude)}; the first ones are named {list(found)[:4]}"
        )
    return kept


def resolve_layers(model: nn.Module, layers: str | Iterable[str]) -> Layers:
    """The parameters that a selection names.

    layers: "all" (every candidate layer), "everything" (every parameter: norms, tokens and positions too), or
    names of layers or of any other module that has parameters (a block, say).
    Raises ValueError for a name that is not in the model, twice in the list or inside another one.
    """
    if layers == EVERYTHING:
        return _owners(model)
    if layers == "all":
        return candidate_layers(model)
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        raise ValueError("no layers given: name at least one, or use 'all' or 'everything'")
    known = dict(model.named_modules())
    selected = {name: _parameters_of(name, known) for name in names}
    flat = [p for ps in selected.values() for p in ps]
    if len(set(flat)) < len(flat) or len(selected) < len(names):
        raise ValueError(f"layers {names} name some parameter twice: give each layer once, no layer inside another")
    return selected


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a glob, or a regular expression written `re:<pattern>` (searched for), matches the name."""
    return any(_match(name, pattern) for pattern in patterns)


def parameters(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> list[nn.Parameter]:
    """The parameters of a selection, in its order."""
    return [model.get_parameter(p) for names in layers.values() for p in names]


def _match(name: str, pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.search(pattern[3:], name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def _parameters_of(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    if name not in modules or name == "":
        near = difflib.get_close_matches(name, modules, n=3)
        raise ValueError(f"no layer {name!r} in this model" + (f"; did you mean {', '.join(near)}?" if near else ""))
    names = tuple(f"{name}.{p}" for p, _ in modules[name].named_parameters())
    if not names:
        raise ValueError(f"layer {name!r} ({type(modules[name]).__name__}) has no parameters to train")
    return names


def _weight_layers(model: nn.Module) -> Layers:
    kinds = (nn.Linear, nn.Conv2d)
    return {
        name: tuple(f"{name}.{p}" if name else p for p, _ in module.named_parameters(recurse=False))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def _blocks(model: nn.Module) -> Layers:
    return {
        name: tuple(f"{name}.{p}" for p, _ in module.named_parameters())
        for name, module in model.named_modules()
        if _BLOCK.search(name)
    }


def _owners(model: nn.Module) -> Layers:
    """Every parameter, grouped by the module that holds it ("" is the model itself)."""
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return {owner: tuple(names) for owner, names in groups.items()}
