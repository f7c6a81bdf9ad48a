"""The flat store: the selected parameters of a model as views of one vector.

With it SAM, clipping and the optimizer are arithmetic on vectors of length P, as they are written on paper, and one
kernel call each. Legend: P all selected elements, L layers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Store:
    """Makes the named parameters views of one vector `w_P`; the model computes with them as before.

    layers: {layer: parameter names}, in order. All must share one floating dtype and one device.
    The values do not change, and the `nn.Parameter` objects stay the same ones.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Sequence[str]]) -> None:
        self.layers = {layer: tuple(names) for layer, names in layers.items()}
        self.names = [name for names in self.layers.values() for name in names]
        self.params = [model.get_parameter(name) for name in self.names]
        kinds = {(p.dtype, p.device) for p in self.params}
        if len(kinds) != 1:
            raise ValueError(f"the selected parameters have several dtypes or devices: {sorted(map(str, kinds))}")
        self.w_P = torch.cat([p.detach().reshape(-1) for p in self.params])
        for p, view in zip(self.params, self.split(self.w_P), strict=True):
            p.data = view
        self.offsets_L1 = torch.tensor(self._offsets(), device=self.w_P.device)

    def split(self, v_P: Tensor) -> list[Tensor]:
        """A vector [P] as views in the shapes of the parameters."""
        sizes = [p.numel() for p in self.params]
        return [v.view_as(p) for v, p in zip(v_P.split(sizes), self.params, strict=True)]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One vector [P] from a tensor a parameter; None (an unused parameter) counts as zeros."""
        pairs = zip(tensors, self.params, strict=True)
        return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1).to(p.dtype) for t, p in pairs])

    @property
    def parts(self) -> dict[str, slice]:
        """{layer: its part of the vector}, in order."""
        offsets = self._offsets()
        return dict(zip(self.layers, map(slice, offsets, offsets[1:]), strict=True))

    def release(self) -> None:
        """Gives every parameter storage of its own again."""
        for p in self.params:
            p.data = p.detach().clone()

    def _offsets(self) -> list[int]:
        sizes = dict(zip(self.names, (p.numel() for p in self.params), strict=True))
        offsets = [0]
        for names in self.layers.values():
            offsets.append(offsets[-1] + sum(sizes[n] for n in names))
        return offsets
