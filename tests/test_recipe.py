"""Recipes to YAML and back, every key checked."""

import dataclasses
import math

import pytest
import yaml

from safer_fast import recipe as recipes
from safer_fast.attacks import PGD
from safer_fast.data import Augment
from safer_fast.losses import MART, TRADES, CrossEntropy
from safer_fast.optimizers import SGD, AdamW
from safer_fast.recipe import ALIASES, Data, Model, Recipe, dump, from_dict, load, to_dict
from safer_fast.recipes import RECIPES, named
from safer_fast.sam import SAM
from safer_fast.schedule import Schedule
from safer_fast.selection import Selection
from safer_fast.sharpness import Sharpness

CHANGED = Recipe(
    name="changed: with a colon",
    model=Model(
        "swin_tiny_patch4_window7_224", 32, 2, "a b/w.pth", {"depths": [1, 1], "drop_rate": 8 / 255, "x": None}
    ),
    data=Data("cifar10", "~/data", 512, 77, Augment(pad=2, flip=False)),
    attack=PGD(0.1 + 0.2, 0.01, 7, "L2", 3, "none", "margin"),
    loss=MART(5.0),
    sam=SAM(0.5, per_layer=True, adaptive=True, eta=0.02),
    sharpness=Sharpness("ascent", 0.1, "relative", 3, 100, 10),
    selection=Selection("random", 3, ("blocks.0", "head"), 5, "block", ("re:^a,b",), ("*.x", "[!y]"), 4),
    optimizer=AdamW(1e-5, 0.8, 0.99, 1e-7, 0.0, impl="torch"),
    schedule=Schedule("cosine", (1 / 3, 2 / 3), 0.3, 7),
    epochs=9,
    warmup_epochs=2,
    finetune_epochs=4,
    finetune_lr=1 / 255,
    start="start.pth",
    batch_size=5,
    accumulate=2,
    clip=0.0,
    precision="bf16",
    mode="eager",
    select_by="pgd-1",
    score_by="cw-2",
    eval_batch_size=3,
    seed=11,
)
NAMED = [make() for make in RECIPES.values()]


def leaves(tree, where=""):
    for key, value in tree.items():
        if isinstance(value, dict) and key != "args":
            yield from leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


@pytest.mark.parametrize(
    "recipe", [*NAMED, CHANGED, dataclasses.replace(CHANGED, loss=TRADES(1.0))], ids=lambda r: r.name
)
def test_yaml_and_back_is_the_same_recipe(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    assert load(path) == recipe
    assert dump(load(path)) == dump(recipe)
    assert from_dict(to_dict(recipe)) == recipe


def test_every_option_is_changed_in_the_round_trip():
    """The recipe above leaves no option at its default, so that none can be forgotten."""
    default, changed = dict(leaves(to_dict(Recipe()))), dict(leaves(to_dict(CHANGED)))
    same = {key for key in default.keys() & changed.keys() if default[key] == changed[key]}
    assert not same, same
    assert set(dict(leaves(yaml.safe_load(dump(CHANGED))))) == set(changed)


@pytest.mark.parametrize("kind", [CrossEntropy(0.1), TRADES(2.0), MART(3.0)])
@pytest.mark.parametrize("optimizer", [SGD(0.3, 0.5, 0.0, True), AdamW()])
def test_variants_survive(tmp_path, kind, optimizer):
    recipe = Recipe(loss=kind, optimizer=optimizer)
    (tmp_path / "r.yaml").write_text(dump(recipe))
    assert load(tmp_path / "r.yaml") == recipe


def test_multiples_of_a_255th_are_written_as_such():
    text = dump(Recipe(attack=PGD(eps=8 / 255, alpha=2 / 255)))
    assert "eps: 8/255\n" in text
    assert "alpha: 2/255\n" in text
    assert yaml.safe_load(dump(Recipe(attack=PGD(eps=0.1))))["attack"]["eps"] == 0.1


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.5", 0.5), ("1e-4", 1e-4), ("3", 3.0), (" 1/3 ", 1 / 3)]
)
def test_numbers(text, value):
    assert recipes.number(text) == value


@pytest.mark.parametrize("text", ["eight", "1/0", "8/255/2", "", "/", "1,5"])
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="is not a number"):
        recipes.number(text)


@pytest.mark.parametrize(
    ("changes", "get", "value"),
    [
        ({"eps": "4/255"}, lambda r: r.attack.eps, 4 / 255),
        ({"attack.eps": "4/255"}, lambda r: r.attack.eps, 4 / 255),
        ({"eps": 0.25}, lambda r: r.attack.eps, 0.25),
        ({"attack.alpha": "none"}, lambda r: r.attack.alpha, None),
        ({"rho": "0"}, lambda r: r.sam.rho, 0.0),
        ({"sam.adaptive": "True"}, lambda r: r.sam.adaptive, True),
        ({"sam.adaptive": "false"}, lambda r: r.sam.adaptive, False),
        ({"layers": "head, blocks.0"}, lambda r: r.selection.layers, ("head", "blocks.0")),
        ({"selection.layers": ["head"]}, lambda r: r.selection.layers, ("head",)),
        ({"k": "3", "select": "bottom"}, lambda r: (r.selection.k, r.selection.by), (3, "bottom")),
        ({"epochs": "7"}, lambda r: r.epochs, 7),
        ({"model": "deit_small_patch16_224"}, lambda r: r.model.name, "deit_small_patch16_224"),
        ({"img_size": 64, "patch_size": "8"}, lambda r: (r.model.img_size, r.model.patch_size), (64, 8)),
        ({"model.args": "{depth: 3, init: null}"}, lambda r: r.model.args, {"depth": 3, "init": None}),
        ({"data": "cifar10", "limit": "64"}, lambda r: (r.data.name, r.data.limit), ("cifar10", 64)),
        ({"data.augment.pad": 1}, lambda r: r.data.augment.pad, 1),
        ({"schedule.milestones": "0.5,3/4"}, lambda r: r.schedule.milestones, (0.5, 0.75)),
        ({"optimizer": "adamw"}, lambda r: r.optimizer, AdamW()),
        ({"optimizer": "adamw", "lr": "0.002"}, lambda r: r.optimizer, AdamW(lr=0.002)),
        ({"optimizer.beta1": 0.5, "optimizer": "adamw"}, lambda r: r.optimizer, AdamW(beta1=0.5)),
        ({"optimizer.name": "adamw"}, lambda r: r.optimizer, AdamW()),
        ({"loss": "trades"}, lambda r: r.loss, TRADES()),
        ({"loss.beta": "5", "loss": "mart"}, lambda r: r.loss, MART(5.0)),
        ({"optimizer.momentum": "0.5"}, lambda r: r.optimizer, SGD(momentum=0.5)),
    ],
)
def test_overrides(changes, get, value):
    base = Recipe(sam=SAM(adaptive=False), attack=PGD(alpha=0.01))
    changed = base.replace(changes)
    assert get(changed) == value
    # and nothing else has moved
    a, b = dict(leaves(to_dict(base))), dict(leaves(to_dict(changed)))
    moved = {k.split(".")[0] for k in a.keys() | b.keys() if a.get(k, math.nan) != b.get(k, math.nan)}
    assert moved <= {ALIASES.get(k, k).split(".")[0] for k in changes}


def test_every_alias_leads_somewhere():
    tree = to_dict(Recipe())
    for target in ALIASES.values():
        node = tree
        for part in target.split("."):
            node = node[part]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epoch": 3}, r"no field 'epoch' in a recipe; did you mean epochs"),
        ({"attack.step": 3}, r"no field 'attack.step' in a recipe; did you mean attack\.steps"),
        ({"sam.rh0": 3}, r"did you mean .*rho"),
        ({"model.args.depth": 3, "modl.args": "{}"}, "no field 'modl.args'"),
        ({"optimizer.beta1": 0.5}, "no field 'optimizer.beta1'"),
        ({"optimizer": "adam"}, "choose one of sgd, adamw"),
        ({"loss": "awp"}, "choose one of ce, trades, mart"),
        ({"attack": "pgd-20"}, r"attack='pgd-20'.*attack\.<field>"),
        ({"sam": "0.1"}, r"sam='0\.1'.*sam\.<field>"),
        ({"schedule": "cosine"}, r"schedule\.<field>"),
        ({"attack.name": "pgd"}, "no field 'attack.name'"),
        ({"eps": "-1"}, "attack: eps=-1.0"),
        ({"eps": "much"}, "attack.eps: 'much' is not a number"),
        ({"epochs": "2.5"}, "epochs='2.5' is not a whole number"),
        ({"epochs": 2.5}, "epochs=2.5"),
        ({"epochs": True}, "epochs=True"),
        ({"sam.adaptive": "maybe"}, "sam.adaptive='maybe'"),
        ({"model.args": "3"}, "expected pairs"),
        ({"schedule.milestones": "0.9,0.1"}, "rising fractions"),
        ({"schedule.milestones": 3}, "expected a list"),
        ({"epochs": 1}, "at least 2"),
        ({"epochs": 5, "finetune_epochs": 6}, "part of the 5 epochs"),
        ({"epochs": 5, "warmup_epochs": 5}, "part of stage 1, which has 4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"finetune_lr": 0}, "finetune_lr=0"),
        ({"clip": -1}, "clip=-1"),
        ({"lr": 0}, "optimizer: lr=0"),
        ({"data.holdout": 0}, "data: holdout=0"),
        ({"data.augment.pad": -1}, "data.augment: pad=-1"),
        ({"rho": "nan"}, "sam: rho=nan"),
    ],
)  # fmt: skip
def test_wrong_overrides_are_refused_with_the_field(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe().replace(changes)


def test_files_that_are_no_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    with pytest.raises(FileNotFoundError, match="no recipe file"):
        load(path)
    for text, sentence in (
        ("a: [", "is not YAML"),
        ("- 1\n- 2", "holds no recipe"),
        ("", "holds no recipe"),
        ("attack: {epz: 1}", r"r\.yaml: no field 'attack\.epz' in a recipe; did you mean attack\.eps"),
        ("attack: 3", r"r\.yaml: attack=3"),
        ("loss: {beta: 3}", "choose one of ce, trades, mart"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load(path)
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match="is not YAML"):
        load(path)


def test_python_objects_in_yaml_are_not_made(tmp_path):
    path, witness = tmp_path / "r.yaml", tmp_path / "ran"
    path.write_text(f'name: !!python/object/apply:os.system ["touch {witness}"]')
    with pytest.raises(ValueError, match="is not YAML"):
        load(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        (Recipe(epochs=50), (40, 10)),
        (Recipe(epochs=2), (1, 1)),
        (Recipe(epochs=7), (6, 1)),
        (Recipe(epochs=10, finetune_epochs=4), (6, 4)),
        (Recipe(epochs=10, finetune_epochs=10), (0, 10)),
        (Recipe(epochs=10, start="x.pth"), (0, 2)),
    ],
)
def test_stages(recipe, stages):
    """Stage 2 is a quarter of stage 1; from a checkpoint there is no stage 1."""
    assert (recipe.stage1_epochs, recipe.stage2_epochs) == stages


def test_named_recipes():
    assert named("quickstart") == NAMED[0]
    assert all(recipe.name == name for recipe, name in zip(NAMED, RECIPES, strict=True))
    assert all((make.__doc__ or "").strip() for make in RECIPES.values())
    with pytest.raises(ValueError, match="did you mean quickstart"):
        named("quickstrat")
