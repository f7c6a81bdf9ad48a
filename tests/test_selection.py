"""Which layers are chosen."""

import pytest

from safer_fast.selection import RULES, Selection, select_layers

SCORES = {"a": 1.0, "b": 3.0, "c": 3.0, "d": 0.5, "e": 3.0, "f": 0.5}


@pytest.mark.parametrize(
    ("by", "k", "chosen"),
    [
        ("top", 1, ["b"]),
        ("top", 2, ["b", "c"]),
        ("top", 4, ["a", "b", "c", "e"]),
        ("bottom", 1, ["d"]),
        ("bottom", 2, ["d", "f"]),
        ("bottom", 3, ["a", "d", "f"]),
        ("last", 2, ["e", "f"]),
        ("all", 2, list(SCORES)),
        ("top", 6, list(SCORES)),
    ],
)
def test_rules_with_ties_in_model_order(by, k, chosen):
    assert select_layers(SCORES, k=k, by=by) == chosen


def test_random_is_seeded_without_repeats_and_in_model_order():
    names = [f"l{i}" for i in range(50)]
    draws = [select_layers(names, k=5, by="random", seed=s) for s in range(200)]
    assert draws[3] == select_layers(names, k=5, by="random", seed=3)
    assert all(len(set(d)) == 5 and d == sorted(d, key=names.index) for d in draws)
    assert {n for d in draws for n in d} == set(names)  # every layer is drawn sometimes
    assert len({tuple(d) for d in draws}) > 190
    # Scores have no say.
    assert select_layers(dict.fromkeys(names, 1.0), k=5, by="random", seed=3) == draws[3]


@pytest.mark.parametrize(("layers", "k"), [(50, 2), (10, 1), (1, 1), (150, 8), (29, 1), (31, 2)])
def test_by_default_five_per_cent_and_at_least_one(layers, k):
    assert len(select_layers({f"l{i}": 0.0 for i in range(layers)})) == k


@pytest.mark.parametrize("k", [0, -1, 7])
@pytest.mark.parametrize("by", ["top", "bottom", "random", "last"])
def test_k_out_of_range(k, by):
    with pytest.raises(ValueError, match=rf"k={k}.*6 layers.*1 to 6"):
        select_layers(SCORES, k=k, by=by)


def test_scores_are_needed_for_top_and_bottom():
    for by in ("top", "bottom"):
        with pytest.raises(ValueError, match="layer_sharpness"):
            select_layers(list(SCORES), k=1, by=by)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="choose one of top, bottom, random, last, all, everything"):
        select_layers(SCORES, k=1, by="best")
    with pytest.raises(ValueError, match="or list the layers"):
        Selection(by="best")


def test_selection_object(vit):
    assert Selection(layers=("x", "y")).choose(SCORES) == ["x", "y"]
    assert Selection(by="everything").choose(SCORES) == "everything"
    assert Selection(k=2).choose(SCORES) == ["b", "c"]
    assert Selection(by="random", k=2, seed=4).choose(SCORES) == select_layers(SCORES, k=2, by="random", seed=4)
    needs = {by: Selection(by=by).needs_scores for by in RULES}
    assert {by for by, need in needs.items() if need} == {"top", "bottom"}
    assert not Selection(layers=("x",)).needs_scores
    assert list(Selection(include=("*fc1",)).candidates(vit())) == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    for options, sentence in (({"k": 0}, "k=0"), ({"every": -1}, "every=-1")):
        with pytest.raises(ValueError, match=sentence):
            Selection(**options)
