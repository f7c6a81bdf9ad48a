"""timm models with normalisation inside, forward passes in pieces, and weights from every kind of file."""

import copy
import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from safer_fast.models import create_model, load_weights, normalise, segment_of, segments

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 7}
VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
FAMILIES = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "vit_base_patch16_clip_224": VIT,  # a norm before the blocks
    "convit_tiny": {**VIT, "local_up_to_layer": 2},
    "swin_tiny_patch4_window7_224": {
        "patch_size": 2, "embed_dim": 16, "window_size": 2, "depths": (2, 1), "num_heads": (2, 4),
    },
    "xcit_nano_12_p16_224": {"depth": 2, "patch_size": 16, "img_size": 32},  # any other model: one segment
}  # fmt: skip


def small(name, seed=0, **changes):
    torch.manual_seed(seed)
    return create_model(name, **{**SMALL, **FAMILIES[name], **changes}).eval()


def pixels(name, n=3):
    size = FAMILIES[name].get("img_size", 8)
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_segments_in_turn_are_the_model(name):
    model, x = small(name), pixels(name)
    h = x
    for piece in segments(model):
        h = piece.forward(h)
    assert torch.equal(h, model(x))
    assert len(segments(model)) >= (1 if name.startswith("xcit") else 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_belongs_to_the_segment_that_uses_it(name):
    """Cut before the segment of a layer: what comes before does not change when the layer does, what follows does."""
    x = pixels(name)
    model = small(name)
    pieces = segments(model)
    for layer, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.LayerNorm):
            continue
        first, moved = segment_of(pieces, layer), copy.deepcopy(model)
        with torch.no_grad():
            for p in moved.get_submodule(layer).parameters():
                p.add_(torch.randn_like(p))
        h, k = x, x
        for i, (piece, other) in enumerate(zip(pieces, segments(moved), strict=True)):
            if i == first and i:
                assert torch.equal(h, k), layer
            h, k = piece.forward(h), other.forward(k)
        # A block's last bias reaches the logits; only heads that are not used in eval mode do not.
        assert not torch.equal(h, k) or "head_dist" in layer or layer.startswith("head"), layer


@pytest.mark.parametrize("name", FAMILIES)
def test_normalisation_is_inside_and_names_are_timms(name):
    model, x = small(name), pixels(name)
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=False, **{**SMALL, **FAMILIES[name]}).eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    mean, std = (torch.tensor(plain.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    assert torch.equal(model(x), plain((x - mean) / std))
    assert torch.equal(normalise(model, x), (x - mean) / std)
    assert not torch.equal(model(x), plain(x))


def test_mean_and_std_can_be_given():
    model = small("vit_tiny_patch16_224", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    x = pixels("vit_tiny_patch16_224")
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert torch.equal(normalise(model, x), by_hand)
    grey = small("vit_tiny_patch16_224", in_chans=1)
    assert torch.equal(normalise(grey, x[:, :1]), (x[:, :1] - 0.5) / 0.5)
    assert torch.equal(normalise(torch.nn.Identity(), x), x)


def test_normalisation_follows_the_model(vit, images):
    x, _ = images(2)
    model = vit()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert model.double()(x.double()).dtype == torch.float64
    assert model.half().pixel_mean.dtype == torch.float16
    assert torch.equal(pickle.loads(pickle.dumps(vit()))(x), expected)


def test_convit_is_settled_when_it_is_made():
    """timm replaces a buffer in the first forward pass: none is replaced any more afterwards."""
    model = small("convit_tiny")
    before = {n: b.data_ptr() for n, b in model.named_buffers()}
    model(pixels("convit_tiny"))
    assert {n: b.data_ptr() for n, b in model.named_buffers()} == before


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("vit_tiny_patch16_225", {}, "did you mean vit_tiny_patch16_224"),
        ("qqqq", {}, "timm.list_models"),
        ("vit_tiny_patch16_224", {"depht": 2}, "timm cannot build vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", {"embed_dim": 33, "num_heads": 2}, "timm cannot build"),
    ],
)
def test_what_timm_refuses(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_model(name, **{**SMALL, "depth": 1, **options})


# Weights


@pytest.fixture
def source():
    """A small ViT whose weights are to be loaded into another one."""
    return small("vit_tiny_patch16_224", seed=1)


def wrapped(state, how):
    return {
        "plain": lambda: state,
        "module.": lambda: {f"module.{n}": t for n, t in state.items()},
        "state_dict": lambda: {"epoch": 3, "arch": "x", "state_dict": state},
        "model": lambda: {"model": state, "lr": 0.1},
        "deep": lambda: {"state_dict": {"model": {f"module._orig_mod.{n}": t for n, t in state.items()}}},
        "other entries": lambda: {**state, "note": "text"},
    }[how]()


@pytest.mark.parametrize("how", ["plain", "module.", "state_dict", "model", "deep", "other entries"])
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
def test_pth_files_of_every_nesting(source, tmp_path, how, suffix):
    torch.save(wrapped(source.state_dict(), how), tmp_path / f"w{suffix}")
    model = small("vit_tiny_patch16_224", seed=2)
    assert load_weights(model, tmp_path / f"w{suffix}") == []
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())


def test_safetensors_and_run_folders(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", tmp_path, str(tmp_path)):
        model = small("vit_tiny_patch16_224", seed=2, weights=path)
        assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_head_of_other_classes_stays_random_and_is_named(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = small("vit_tiny_patch16_224", seed=2, num_classes=4)
    head = model.head.weight.clone()
    assert load_weights(model, tmp_path / "w.safetensors") == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert torch.equal(model.blocks[2].mlp.fc2.weight, source.blocks[2].mlp.fc2.weight)


def test_a_headless_file_leaves_the_head_and_names_it(source, tmp_path):
    state = {n: t for n, t in source.state_dict().items() if not n.startswith("head.")}
    save_file(state, tmp_path / "w.safetensors")
    assert load_weights(small("vit_tiny_patch16_224"), tmp_path / "w.safetensors") == ["head.weight", "head.bias"]


def test_a_file_that_does_not_fit_lists_the_tensors(source, tmp_path):
    state = source.state_dict()
    state["blocks.0.norm1.weight"] = torch.ones(31)
    del state["blocks.1.attn.qkv.bias"]
    state["blocks.9.attn.qkv.bias"] = torch.ones(3)
    save_file(state, tmp_path / "w.safetensors")
    model = small("vit_tiny_patch16_224", seed=2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this model") as error:
        load_weights(model, tmp_path / "w.safetensors")
    for part in ("1 of another shape: blocks.0.norm1.weight: 31 in the file, 32 here",
                 "1 missing: blocks.1.attn.qkv.bias", "1 unknown: blocks.9.attn.qkv.bias"):  # fmt: skip
        assert part in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("changes", [{"depth": 2}, {"depth": 4}, {"embed_dim": 48}])
def test_another_architecture_is_refused(source, tmp_path, changes):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="give the model name, depth and width"):
        small("vit_tiny_patch16_224", weights=tmp_path / "w.safetensors", **changes)


class Runs:
    """Pickled, it would run code when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_with_code_is_refused_and_not_run(source, tmp_path):
    witness = tmp_path / "ran"
    torch.save({"state_dict": source.state_dict(), "extra": Runs(witness)}, tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Runs(witness)))
    torch.save(source, tmp_path / "whole.pth")
    for name in ("w.pth", "raw.pth", "whole.pth"):
        with pytest.raises(ValueError, match="without executing pickle"):
            load_weights(small("vit_tiny_patch16_224"), tmp_path / name)
    assert not witness.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(source, tmp_path, value):
    state = source.state_dict()
    state["norm.bias"][3] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"NaN or infinity in norm\.bias"):
        load_weights(small("vit_tiny_patch16_224"), tmp_path / "w.safetensors")


def test_files_that_are_damaged_or_of_another_kind(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    for name in ("w.safetensors", "w.pth"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"empty-{name}").write_bytes(b"")
    names = ["cut-w.safetensors", "cut-w.pth", "empty-w.safetensors", "empty-w.pth", "list.pth", "empty.pth"]
    for name in names:
        with pytest.raises(ValueError, match=re.escape(name)):
            load_weights(small("vit_tiny_patch16_224"), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(small("vit_tiny_patch16_224"), tmp_path / "nowhere.pth")


def test_patch_and_position_embeddings_are_resampled(tmp_path):
    """From 16-pixel patches at 64 px to 4-pixel patches at 32 px: 4×4 positions become 8×8, 16×16 kernels 4×4."""
    big = small("vit_tiny_patch16_224", img_size=64, patch_size=16)
    with torch.no_grad():  # smooth in space, so that a resampled one is recognised
        ramp = torch.linspace(-1, 1, 4)
        grid = torch.stack([ramp[:, None].expand(4, 4), ramp[None].expand(4, 4)] * 16, -1)
        big.pos_embed[:, 1:] = grid.reshape(1, 16, 32)
        big.patch_embed.proj.weight.copy_(torch.linspace(-1, 1, 16).expand(32, 3, 16, 16))
    save_file(big.state_dict(), tmp_path / "w.safetensors")
    model = small("vit_tiny_patch16_224", seed=3, img_size=32, weights=tmp_path / "w.safetensors")
    assert model.pos_embed.shape == (1, 65, 32)
    assert torch.equal(model.pos_embed[:, 0], big.pos_embed[:, 0])  # the class token's stays
    fine = model.pos_embed[0, 1:].detach().view(8, 8, 32)
    rising = fine[:, :, 0].diff(dim=0)
    assert (rising > 0).all()
    assert torch.allclose(fine[:, :, 0], fine[:, :1, 0].expand(8, 8), atol=1e-5)  # along one axis only
    assert torch.allclose(fine[:, :, 0], fine[:, :, 1].T, atol=1e-5)
    kernel = model.patch_embed.proj.weight.detach()
    assert kernel.shape == (32, 3, 4, 4)
    assert (kernel[0, 0].diff(dim=1) > 0).all()
    assert torch.allclose(kernel[0, 0], kernel[0, 0, :1].expand(4, 4), rtol=0.02)
    # The same picture, a ramp, in small gives about the same token (FlexiViT's condition): the kernel is scaled by area.
    picture = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    reduced = torch.nn.functional.interpolate(picture, size=(4, 4), mode="bicubic", antialias=True)
    token = (picture[0] * big.patch_embed.proj.weight[0].detach()).sum()
    assert (reduced[0] * kernel[0]).sum().item() == pytest.approx(token.item(), rel=0.1)


def test_resampling_to_the_same_size_changes_nothing(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = small("vit_tiny_patch16_224", seed=3, weights=tmp_path / "w.safetensors")
    assert torch.equal(model.pos_embed, source.pos_embed)
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)


@pytest.mark.parametrize("name", FAMILIES)
def test_own_state_dicts_load_again(name, tmp_path):
    source = small(name, seed=4)
    save_file({n: t.contiguous() for n, t in source.state_dict().items()}, tmp_path / "w.safetensors")
    model = small(name, seed=5)
    assert load_weights(model, tmp_path / "w.safetensors") == []
    assert torch.equal(model(pixels(name)), source(pixels(name)))
