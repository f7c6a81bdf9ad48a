"""The flat store: views of one vector that the model computes with."""

import pytest
import torch

from safer_fast.store import Store

LAYERS = {"head": ("head.weight", "head.bias"), "b0": ("blocks.0.attn.proj.weight", "blocks.0.norm1.bias")}


def test_nothing_changes_and_writing_the_vector_writes_the_model(vit, images, bits, differing):
    model = vit()
    before, objects = bits(model), list(model.parameters())
    store = Store(model, LAYERS)
    assert differing(before, bits(model)) == []
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    store.w_P.mul_(2)
    for names in LAYERS.values():
        for name in names:
            assert torch.equal(model.get_parameter(name), 2 * before[f"tensor {name}"])
    other = vit()
    with torch.no_grad():
        for names in LAYERS.values():
            for name in names:
                other.get_parameter(name).mul_(2)
    x, _ = images(3)
    assert torch.equal(model(x), other(x))


def test_parts_and_offsets_say_where_each_layer_lies(vit):
    model = vit()
    store = Store(model, LAYERS)
    for layer, names in LAYERS.items():
        by_hand = torch.cat([model.get_parameter(n).flatten() for n in names])
        assert torch.equal(store.w_P[store.parts[layer]], by_hand)
    assert store.offsets_L1.tolist() == [0, store.parts["head"].stop, store.parts["b0"].stop] == [0, 165, 165 + 1056]


def test_flatten_and_split_are_inverse_and_none_is_zero(vit):
    store = Store(vit(), LAYERS)
    v = torch.arange(float(len(store.w_P)))
    pieces = store.split(v)
    assert [p.shape for p in pieces] == [p.shape for p in store.params]
    assert torch.equal(store.flatten(pieces), v)
    v[: pieces[0].numel()] = 0
    assert torch.equal(store.flatten([None, *pieces[1:]]), v)


def test_release_cuts_the_tie_and_keeps_the_values(vit, bits, differing):
    model = vit()
    store = Store(model, LAYERS)
    before = bits(model)
    store.release()
    store.w_P.zero_()
    assert differing(before, bits(model)) == []


def test_several_dtypes_are_refused(vit):
    model = vit()
    model.head.bfloat16()
    with pytest.raises(ValueError, match="several dtypes"):
        Store(model, LAYERS)
