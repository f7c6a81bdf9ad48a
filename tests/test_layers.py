"""Which parameters a name stands for."""

import pytest
from torch import nn

from safer_fast.layers import candidate_layers, matches, parameters, resolve_layers
from safer_fast.models import create_model


def test_deit_tiny_has_fifty_layers():
    """12 blocks of four, patch embedding and head: METHOD, section 1."""
    layers = candidate_layers(create_model("deit_tiny_patch16_224", num_classes=10))
    assert len(layers) == 50
    assert list(layers)[:3] == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert list(layers)[-1] == "head"
    assert layers["head"] == ("head.weight", "head.bias")


def test_candidates_are_the_linear_and_convolution_layers_with_their_biases(vit):
    model = vit()
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers = candidate_layers(model)
    assert set(layers) == expected
    for name, own in layers.items():
        assert own == (f"{name}.weight", f"{name}.bias")
    assert not any("norm" in n or "token" in n or "pos" in n for own in layers.values() for n in own)


def test_blocks(vit):
    model = vit()
    blocks = candidate_layers(model, granularity="block")
    assert list(blocks) == ["blocks.0", "blocks.1"]
    assert blocks["blocks.1"] == tuple(f"blocks.1.{n}" for n, _ in model.blocks[1].named_parameters())


def test_everything_is_every_parameter_once(vit):
    model = vit()
    flat = [n for own in resolve_layers(model, "everything").values() for n in own]
    assert sorted(flat) == sorted(n for n, _ in model.named_parameters())
    assert len(parameters(model, resolve_layers(model, "everything"))) == len(flat)


def test_filters(vit):
    model = vit()
    assert list(candidate_layers(model, include=["*.qkv", "head"])) == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "head",
    ]
    left = candidate_layers(model, include=["re:^blocks"], exclude=["*.mlp.*", r"re:\.1\."])
    assert list(left) == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert matches("a.b", ["re:b$"])
    assert not matches("a.b", ["b"])


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (["blocks.0.mlp.fc3"], r"did you mean blocks\.0\.mlp\.fc"),
        (["head", "head"], "twice"),
        (["blocks.0", "blocks.0.mlp.fc1"], "inside another"),
        (["blocks.0.attn.q_norm"], "no parameters"),
        ([], "no layers given"),
        ([""], "no layer ''"),
    ],
)
def test_wrong_names_are_refused_with_the_mend(vit, layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        resolve_layers(vit(), layers)


def test_wrong_filters_are_refused(vit):
    with pytest.raises(ValueError, match="choose one of layer, block"):
        candidate_layers(vit(), granularity="stage")
    with pytest.raises(ValueError, match="not a regular expression"):
        candidate_layers(vit(), include=["re:("])
    with pytest.raises(ValueError, match="no layer is left of the 10"):
        candidate_layers(vit(), exclude=["*"])
