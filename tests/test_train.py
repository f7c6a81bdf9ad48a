"""A whole run on 64 digits: what it leaves behind, and that no interruption shows in it."""

import dataclasses
import hashlib
import json

import pytest
import torch

from safer_fast import checkpoint, train
from safer_fast import recipe as recipes
from safer_fast.attacks import PGD, Linf
from safer_fast.data import Augment, load_data
from safer_fast.evaluate import evaluate
from safer_fast.layers import candidate_layers
from safer_fast.losses import TRADES
from safer_fast.models import create_model
from safer_fast.optimizers import SGD, AdamW
from safer_fast.recipe import Data, Model, Recipe
from safer_fast.selection import Selection
from safer_fast.sharpness import Sharpness
from safer_fast.train import finetune

TINY = Recipe(
    name="tiny",
    model=Model(
        "vit_tiny_patch16_224", 8, 4, args={"embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.2}
    ),
    data=Data("digits", limit=64, holdout=8, augment=Augment(pad=1, flip=False)),
    attack=PGD(eps=0.05, steps=2),
    optimizer=SGD(lr=0.1),
    sharpness=Sharpness(examples=32, batch=16),
    selection=Selection(k=2, every=1),
    epochs=5,
    warmup_epochs=2,
    finetune_epochs=2,
    finetune_lr=0.02,
    batch_size=24,
    select_by="pgd-1",
    score_by="pgd-2",
)


def tree(folder):
    """{file: (bytes, time of change)} of a whole folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One undisturbed run with its comparisons."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, finetune(TINY, out, compare=True)


def test_results_have_the_fields_that_programs_read(run):
    out, returned = run
    results = json.loads((out / "results.json").read_text())
    assert results == returned
    assert [r["name"] for r in results["runs"]] == ["safer", "pgd-at", "pgd-at-sam"]
    for r in results["runs"]:
        assert {"name", "clean", "robust", "layers", "trained_parameters", "seconds"} <= r.keys()
        for kind in ("clean", "robust"):
            assert set(r[kind]) == {"best", "last"}
            assert all(0 <= v <= 1 and (v * 64).is_integer() for v in r[kind].values())
        assert all(r["robust"][which] <= r["clean"][which] for which in ("best", "last"))
        assert r["seconds"] > 0
    safer, pgd_at, sam = results["runs"]
    model = create_model("vit_tiny_patch16_224", weights=out, num_classes=10, img_size=8, patch_size=4, in_chans=1,
                         **TINY.model.args)  # fmt: skip
    assert len(safer["layers"]) == 2
    assert set(safer["layers"]) <= set(candidate_layers(model))
    selected = [p for name in safer["layers"] for p in model.get_submodule(name).parameters()]
    assert safer["trained_parameters"] == sum(p.numel() for p in selected)
    assert pgd_at["trained_parameters"] == sam["trained_parameters"] == sum(p.numel() for p in model.parameters())


def test_the_run_folder_is_complete(run):
    out, _ = run
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    expected = {
        "recipe.yaml", "log.jsonl", "model.safetensors", "best.safetensors", "results.json", "environment.json",
        "sharpness.json", "sharpness.png", "curves.png", "last/manifest.json", "start/manifest.json",
        "runs/pgd-at/model.safetensors", "runs/pgd-at/log.jsonl", "runs/pgd-at-sam/model.safetensors",
    }  # fmt: skip
    assert expected <= found
    assert not any(name.endswith("results.json") for name in found - {"results.json"})
    assert not any(".tmp" in name or ".new" in name or ".old" in name for name in found)
    assert recipes.load(out / "recipe.yaml") == TINY
    assert {"torch", "timm", "device", "python"} <= json.loads((out / "environment.json").read_text()).keys()


def test_the_saved_model_scores_what_the_results_say(run):
    out, results = run
    data = load_data("digits", limit=64, holdout=8)
    for folder, row in (
        (out, results["runs"][0]),
        (out / "runs/pgd-at", results["runs"][1]),
        (out / "runs/pgd-at-sam", results["runs"][2]),
    ):
        for which, file in (("last", "model.safetensors"), ("best", "best.safetensors")):
            model = create_model("vit_tiny_patch16_224", weights=folder / file, num_classes=10, img_size=8,
                                 patch_size=4, in_chans=1, **TINY.model.args)  # fmt: skip
            test = data.test
            report = evaluate(model, test.pixels(), test.labels, ids=test.ids, threat=Linf(0.05), attacks="pgd-2")
            assert (report.clean, report.robust) == (row["clean"][which], row["robust"][which])


def test_what_was_never_selected_is_as_it_was_after_stage_1(run):
    out, _ = run
    start, _ = checkpoint.load(out / "start")
    end = checkpoint.load_tensors(out / "model.safetensors")
    chosen = {layer for record in json.loads((out / "sharpness.json").read_text()) for layer in record["layers"]}
    changed = {n for n, t in end.items() if not torch.equal(t, start[n])}
    assert changed == {f"{layer}.{kind}" for layer in chosen for kind in ("weight", "bias")}
    other = checkpoint.load_tensors(out / "runs/pgd-at/model.safetensors")
    assert all(not torch.equal(t, start[n]) for n, t in other.items())


def test_selection_was_by_the_scores_that_were_written(run):
    out, results = run
    records = json.loads((out / "sharpness.json").read_text())
    assert [r["epoch"] for r in records] == [0, 1]
    for record in records:
        scores = {n: v["score"] for n, v in record["sharpness"]["layers"].items()}
        assert set(record["layers"]) == set(sorted(scores, key=scores.get, reverse=True)[:2])
    assert results["runs"][0]["layers"] == records[-1]["layers"]


def test_the_log_tells_of_every_epoch(run):
    out, results = run
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in log] == [0, 1, 2, 3, 4]
    assert [r["stage"] for r in log] == ["pgd-at"] * 3 + ["finetune"] * 2
    assert [r["eps"] for r in log] == pytest.approx([0, 0.025, 0.05, 0.05, 0.05])  # at the last batch of each
    # 3 batches an epoch: the last of the 9 steps of stage 1 begins at 8/9 of it, past 7/8; of stage 2 at 5/6.
    # The clean start ends with step 3; from step 4 on the rate rises by 1/300 of itself a step.
    assert [r["lr"] for r in log] == pytest.approx([0.1, 0.1 * 2 / 300, 0.01 * 5 / 300, 0.02, 0.02])
    held_out = [r.get("held_out_robust") for r in log]
    assert held_out[:2] == [None, None]
    stage2 = held_out[3:]
    assert results["runs"][0]["best_epoch"] == 1 + stage2.index(max(stage2))


def test_model_files_are_reproducible_and_say_what_they_are(run, tmp_path):
    out, _ = run
    finetune(TINY, tmp_path / "again")
    for name in ("model.safetensors", "best.safetensors", "sharpness.json"):
        assert sha(tmp_path / "again" / name) == sha(out / name), name
    finetune(dataclasses.replace(TINY, seed=1), tmp_path / "other")
    assert sha(tmp_path / "other/model.safetensors") != sha(out / "model.safetensors")
    known = checkpoint.metadata_of(out / "model.safetensors")
    assert (known["data"], known["model"]["name"]) == ("digits", "vit_tiny_patch16_224")
    assert str(tmp_path.parent) not in json.dumps(known)


class Killed(BaseException):
    """Nobody catches this."""


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1), AdamW(lr=0.003)], ids=lambda o: o.name)
def test_a_run_resumed_after_any_interruption_ends_with_the_same_bytes(tmp_path, monkeypatch, optimizer):
    """With a checkpoint after each batch, killed at every second step, mid-epoch and between epochs and stages."""
    recipe = dataclasses.replace(TINY, optimizer=optimizer, finetune_lr=optimizer.lr / 5)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = finetune(recipe, whole)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    gradient = train.Step._gradient
    calls, kills = [0], 0

    def dying(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 5:  # steps that no checkpoint holds are done again, so this must leave some progress
            raise Killed
        return gradient(self, *args, **kwargs)

    monkeypatch.setattr(train.Step, "_gradient", dying)
    for _ in range(40):
        calls[0] = 0
        try:
            results = finetune(recipe, broken, resume=True)
            break
        except Killed:
            kills += 1
    assert kills >= 4
    for name in ("model.safetensors", "best.safetensors", "sharpness.json"):
        assert sha(broken / name) == sha(whole / name), name
    untimed = lambda r: {k: v for k, v in r.items() if k not in ("seconds", "images_per_s")}  # noqa: E731
    assert [untimed(r) for r in results["runs"]] == [untimed(r) for r in expected["runs"]]
    logs = [[untimed(json.loads(line)) for line in (f / "log.jsonl").read_text().splitlines()] for f in (whole, broken)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("moment", ["plot", "best", "save", "results"])
def test_a_crash_while_something_is_written_does_not_show(run, tmp_path, monkeypatch, moment):
    """A picture, the best epoch's weights, the checkpoint itself or the results: each dies once, later."""
    place, name = {
        "plot": (train, "plot_sharpness"),
        "best": (checkpoint, "save_tensors"),
        "save": (checkpoint, "save"),
        "results": (train, "plot_curves"),
    }[moment]
    original, count = getattr(place, name), [0]

    def dying(*args, **kwargs):
        count[0] += 1
        if count[0] == (1 if moment == "results" else 2):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, dying)
    with pytest.raises(Killed):
        finetune(TINY, tmp_path / "run")
    finetune(TINY, tmp_path / "run", resume=True)
    whole, _ = run
    for file in ("model.safetensors", "best.safetensors", "sharpness.json"):
        assert sha(tmp_path / "run" / file) == sha(whole / file)
    assert (tmp_path / "run/curves.png").is_file()


def test_resume_of_a_finished_run_changes_nothing(run):
    out, results = run
    before = tree(out)
    assert finetune(TINY, out, compare=True, resume=True) == results
    assert finetune(TINY, out, resume=True) == results
    assert tree(out) == before


def test_resume_without_a_checkpoint_starts(run, tmp_path):
    finetune(TINY, tmp_path / "new", resume=True)
    assert sha(tmp_path / "new/model.safetensors") == sha(run[0] / "model.safetensors")


def test_comparisons_can_be_added_later(run, tmp_path):
    finetune(TINY, tmp_path / "run")
    before = sha(tmp_path / "run/model.safetensors")
    results = finetune(TINY, tmp_path / "run", compare=True, resume=True)
    assert sha(tmp_path / "run/model.safetensors") == before
    untimed = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]  # noqa: E731
    assert untimed(results["runs"]) == untimed(run[1]["runs"])


def test_an_existing_run_is_not_overwritten(run):
    out, _ = run
    before = tree(out)
    with pytest.raises(FileExistsError, match="give --resume to go on with it, or another --out"):
        finetune(TINY, out)
    with pytest.raises(FileExistsError, match="another recipe"):
        finetune(dataclasses.replace(TINY, seed=5), out, resume=True)
    assert tree(out) == before


def test_from_a_checkpoint_every_method_starts_with_its_weights(run, tmp_path, monkeypatch):
    start = run[0] / "runs/pgd-at/best.safetensors"
    recipe = dataclasses.replace(TINY, start=str(start), epochs=1, finetune_epochs=1)
    begun = []
    original = train._Loop.run

    def watched(self):
        begun.append({n: t.clone() for n, t in self.model.state_dict().items()})
        return original(self)

    monkeypatch.setattr(train._Loop, "run", watched)
    results = finetune(recipe, tmp_path / "run", compare=True)
    assert [r["name"] for r in results["runs"]] == ["safer", "pgd-at", "pgd-at-sam"]
    weights = checkpoint.load_tensors(start)
    assert len(begun) == 3
    for state in begun:
        assert all(torch.equal(t, weights[n]) for n, t in state.items())
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in log] == ["finetune"]


def test_test_images_choose_nothing(run, tmp_path, monkeypatch):
    """With half of the test images and wrong labels on them, the same epochs, layers and weights come out."""

    def mislabelled(*args, **kwargs):
        data = load_data(*args, **kwargs)
        test = data.test.take(torch.arange(32))
        return data._replace(test=test._replace(labels=(test.labels + 1) % 10))

    monkeypatch.setattr(train, "load_data", mislabelled)
    results = finetune(TINY, tmp_path / "run")
    for name in ("model.safetensors", "best.safetensors", "sharpness.json"):
        assert sha(tmp_path / "run" / name) == sha(run[0] / name)
    assert (results["runs"][0]["n"], run[1]["runs"][0]["n"]) == (32, 64)


def test_test_and_held_out_images_are_never_trained_on(tmp_path, monkeypatch):
    data, seen = load_data("digits", limit=64, holdout=8), set()
    original = train.Step.__call__

    def watched(self, x, y, ids, **options):
        seen.update(ids.tolist())
        return original(self, x, y, ids, **options)

    monkeypatch.setattr(train.Step, "__call__", watched)
    finetune(dataclasses.replace(TINY, epochs=2, warmup_epochs=0, finetune_epochs=1), tmp_path / "run")
    assert seen == set(data.train.ids.tolist())
    assert not seen & {*data.held_out.ids.tolist(), *data.test.ids.tolist()}


def test_trades_trains_with_its_own_attack_and_is_scored_by_another(tmp_path, monkeypatch):
    used = set()
    original = PGD.__call__

    def watched(self, *args, **kwargs):
        used.add((self.objective, self.start, self.steps))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PGD, "__call__", watched)
    recipe = dataclasses.replace(TINY, loss=TRADES(), epochs=2, warmup_epochs=0, finetune_epochs=1)
    finetune(recipe, tmp_path / "run")
    assert used == {("kl", "gaussian", 2), ("ce", "uniform", 1), ("ce", "uniform", 2)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": "blocks.0.mlp.fc9"}, "did you mean blocks.0.mlp.fc"),
        ({"k": 11}, "has 10 layers to choose from"),
        ({"selection.exclude": "*"}, "no layer is left"),
        ({"select_by": "pgd"}, "no attack 'pgd'"),
        ({"score_by": "pgd-2,autoattak"}, "no attack 'autoattak'"),
        ({"img_size": 32}, "does not take the 8×8 images of digits"),
        ({"model": "vit_tiny_patch16_225"}, "did you mean vit_tiny_patch16_224"),
        ({"model.args": "{depht: 2}"}, "timm cannot build"),
        ({"weights": "nowhere.pth"}, "no weights at nowhere.pth"),
        ({"data": "digitz"}, "choose one of digits"),
        ({"data": "cifar10"}, "needs --data-dir"),
        ({"limit": 3}, "limit=3"),
        ({"precision": "fp8"}, "fp8"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, changes, sentence):
    with pytest.raises((ValueError, OSError), match=sentence):
        finetune(TINY.replace(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
