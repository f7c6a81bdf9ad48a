"""The training loop: stage 1, then SAFER and what it is compared with, all resumable to the bit.

Every random draw is keyed by (seed, purpose, epoch, batch), so a checkpoint is tensors and a few numbers, and a
resumed run ends with the bits of an undisturbed one.
"""

import json
import math
import platform
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from . import recipe as recipes_on_disk
from .attacks import threat
from .data import Dataset, balanced, batches, load_data, plain_batches
from .engine import choose_mode, choose_precision, compile_step, fast_linear
from .evaluate import Report, attack_named, evaluate
from .layers import EVERYTHING, resolve_layers
from .models import create_model
from .modes import eval_mode
from .optimizers import Optimizer
from .plots import plot_curves, plot_sharpness
from .profiling import hardware
from .progress import say, table, track
from .recipe import Recipe
from .sam import SAM
from .schedule import clean_epochs, eps_factor
from .seeds import mix
from .selection import Selection
from .sharpness import Scores, layer_sharpness
from .step import Step

SAVE_SECONDS = 120.0  # a checkpoint at least so often, and at the end of each epoch
Record = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """What stage 2 trains, and how. SAFER: selected layers under SAM; the baselines: everything."""

    name: str
    selection: Selection
    sam: SAM


def methods(recipe: Recipe, *, compare: bool) -> list[Method]:
    """SAFER as the recipe has it; with compare also PGD-AT and PGD-AT (SAM), from the same start and budget."""
    whole = Selection(by=EVERYTHING, every=0)
    rivals = [Method("pgd-at", whole, SAM(rho=0.0)), Method("pgd-at-sam", whole, recipe.sam)]
    return [Method("safer", recipe.selection, recipe.sam), *(rivals if compare else [])]


def finetune(
    recipe: Recipe, out: Path, *, compare: bool = False, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Runs a recipe into the folder `out` and returns what `results.json` holds.

    resume: goes on from the newest checkpoint there; starts where there is none, changes nothing where all is done.
    compare: also PGD-AT and PGD-AT (SAM) from the same start. Raises FileExistsError if `out` holds another run, or
    this one and resume is not given; ValueError for a recipe that its model or data refuse (before anything is written).
    """
    run = _Run(recipe, out, device)
    run.open(resume=resume)
    if (done := run.finished(compare)) is not None:
        return done
    results = {"runs": [run.method(m) for m in methods(recipe, compare=compare)]}
    checkpoint.write(out / "curves.png", plot_curves(run.histories, chance=1 / len(run.data.classes)))
    checkpoint.write_json(out / "results.json", results)
    _show(results, recipe, n=len(run.data.test.labels))
    return results


class _Run:
    """One run folder: data and device, the common start, and each method trained from it."""

    def __init__(self, recipe: Recipe, out: Path, device: str | None) -> None:
        self.recipe, self.out = recipe, out
        self.device = device_named(device)
        choose_precision(recipe.precision, self.device)
        choose_mode(recipe.mode, self.device)
        spec = recipe.data
        data = load_data(spec.name, spec.dir, limit=spec.limit, holdout=spec.holdout)
        self.data: Dataset = data._replace(
            **{s: getattr(data, s).to(self.device) for s in ("train", "held_out", "test")}
        )
        self.model = model_for(recipe, data).to(self.device)
        self.initial = _whole(self.model)
        self.histories: dict[str, list[Record]] = {}
        self._check()
        self.said: set[str] = set()

    def announce(self, step: Step) -> None:
        """Says once how the steps of this run are computed, and why."""
        text = f"step: {step.mode}, {step.precision} on {self.device} ({step.reason})"
        if text not in self.said:
            say(text)
        self.said.add(text)

    def _check(self) -> None:
        """Finds now what would be refused hours later: names of attacks and layers, the number of layers."""
        r, at = self.recipe, threat(self.recipe.attack.norm, self.recipe.attack.eps)
        for name in f"{r.select_by},{r.score_by}".split(","):
            attack_named(name.strip(), at)
        resolve_layers(self.model, r.selection.choose(dict.fromkeys(r.selection.candidates(self.model), 0.0)))

    def open(self, *, resume: bool) -> None:
        """Makes the folder, or checks that it is this recipe's."""
        path, text = self.out / "recipe.yaml", recipes_on_disk.dump(self.recipe)
        if path.exists() and not resume:
            raise FileExistsError(f"{self.out} already holds a run: give --resume to go on with it, or another --out")
        if path.exists() and path.read_text() != text:
            raise FileExistsError(
                f"{self.out} holds a run of another recipe: resume it as it was, or give another --out"
            )
        if (self.out / "results.json").exists():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write(path, text)
        checkpoint.write_json(self.out / "environment.json", environment(self.device))

    def finished(self, compare: bool) -> dict[str, Any] | None:
        """The results of a run that is complete."""
        path = self.out / "results.json"
        if not path.exists():
            return None
        results = json.loads(path.read_text())
        return results if len(results["runs"]) >= len(methods(self.recipe, compare=compare)) else None

    def method(self, method: Method) -> Record:
        """Trains and scores one method, in a folder of its own unless it is SAFER."""
        folder = self.out if method.name == "safer" else self.out / "runs" / method.name
        folder.mkdir(parents=True, exist_ok=True)
        tensors, start = self.start()
        self.model.load_state_dict(tensors)
        loop = _Loop(self, folder, "finetune", self.recipe.stage2_epochs, method, start["history"])
        state = loop.run()
        self.histories[method.name] = state["history"]
        return self._score(folder, method, loop, state)

    def start(self) -> tuple[dict[str, Tensor], Record]:
        """Weights and history after stage 1: what every method starts from."""
        if not self.recipe.stage1_epochs:
            return self.initial, {"history": []}
        found = checkpoint.load(self.out / "start")
        if found is None:
            everything = Method("safer", Selection(by=EVERYTHING, every=0), SAM(rho=0.0))
            state = _Loop(self, self.out, "pgd-at", self.recipe.stage1_epochs, everything, []).run()
            checkpoint.save(self.out / "start", _whole(self.model), {"history": state["history"]})
            found = _whole(self.model), {"history": state["history"]}
        return found

    def _score(self, folder: Path, method: Method, loop: "_Loop", state: Record) -> Record:
        """Test accuracy of the best and the last epoch; the test set has chosen neither."""
        last, best = _whole(self.model), checkpoint.load_tensors(folder / "best.safetensors")
        reports: dict[str, Report] = {}
        for name, tensors in (("last", last), ("best", best)):
            if name == "best" and all(torch.equal(t.cpu(), best[n]) for n, t in last.items()):
                reports["best"] = reports["last"]
                continue
            self.model.load_state_dict(tensors)
            reports[name] = self.evaluate(f"{method.name}: test, {name} epoch", self.data.test, self.recipe.score_by)
        checkpoint.save_tensors(folder / "model.safetensors", last, describe(self.recipe, self.data))
        return {
            "name": method.name,
            "clean": {name: reports[name].clean for name in ("best", "last")},
            "robust": {name: reports[name].robust for name in ("best", "last")},
            "layers": [layers] if isinstance(layers := state["selections"][-1]["layers"], str) else layers,
            "trained_parameters": loop.step.store.w_P.numel(),
            "seconds": round(state["seconds"], 3),
            "n": reports["last"].n,
            "interval": {name: list(reports[name].interval) for name in ("best", "last")},
            "attack": reports["last"].attack,
            "eps": reports["last"].eps,
            "invalid": {name: reports[name].invalid for name in ("best", "last")},
            "best_epoch": state["best"]["epoch"],
            "skipped_steps": int(loop.step.skipped),
        }

    def evaluate(self, label: str, split: Any, attack: str) -> Report:
        """Accuracy on a split, in the recipe's threat model."""
        at = threat(self.recipe.attack.norm, self.recipe.attack.eps)
        size = self.recipe.eval_batch_size
        return evaluate(
            self.model, split.pixels(), split.labels, ids=split.ids, threat=at, attacks=attack, batch_size=size,
            seed=self.recipe.seed, label=label,
        )  # fmt: skip


class _Loop:
    """One stage of one method. `state` is plain values; with the tensors of model and step it is the checkpoint."""

    def __init__(self, run: _Run, folder: Path, stage: str, epochs: int, method: Method, history: list[Record]) -> None:
        self.run_, self.folder, self.stage, self.epochs, self.method = run, folder, stage, epochs, method
        self.recipe, self.data, self.model = run.recipe, run.data, run.model
        self.warmup = self.recipe.warmup_epochs if stage == "pgd-at" else 0
        self.state: Record = {
            "stage": stage, "epoch": 0, "batch": 0, "loss": 0.0, "hits": 0.0, "seen": 0, "seconds": 0.0,
            "history": list(history), "selections": [], "best": {"epoch": -1, "robust": -1.0},
        }  # fmt: skip
        self.batches = -(-len(self.data.train.labels) // self.recipe.batch_size)
        self.saved = self.ticked = time.perf_counter()
        self.lr = self.eps = 0.0

    def run(self) -> Record:
        """Trains to the end of the stage, from the newest checkpoint of it where there is one."""
        self._restore()
        while self.state["epoch"] < self.epochs:
            if self.state["batch"] == 0:
                self._select()
            self._end_epoch(self._epoch())
        return self.state

    def _restore(self) -> None:
        found = checkpoint.load(self.folder / "last")
        if found and found[1]["stage"] == self.stage:
            tensors, self.state = found
            self.model.load_state_dict(
                {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
            )
            self.step = self._new_step(self.state["selections"][-1]["layers"])
            self.step.load_state_tensors({n: t for n, t in tensors.items() if not n.startswith("model.")})

    def _new_step(self, layers: list[str] | str) -> Step:
        r = self.recipe
        optimizer: Optimizer = r.optimizer if self.stage == "pgd-at" else replace(r.optimizer, lr=r.finetune_lr)
        attack = replace(r.attack, objective="kl", start="gaussian") if r.loss.name == "trades" else r.attack
        step = compile_step(
            self.model, layers, attack=attack, sam=self.method.sam, optimizer=optimizer, loss=r.loss, clip=r.clip,
            accumulate=r.accumulate, precision=r.precision, mode=r.mode, seed=r.seed,
            batch=min(r.batch_size, len(self.data.train.labels)),
        )  # fmt: skip
        self.run_.announce(step)
        return step

    def _select(self) -> None:
        epoch, every = self.state["epoch"], self.method.selection.every
        if epoch and not (every and epoch % every == 0):
            return
        layers = self._choose(epoch)
        if epoch == 0:
            self.step = self._new_step(layers)
        elif layers != self.state["selections"][-2]["layers"]:  # the same again would compile everything anew
            self.step.select(layers)

    def _choose(self, epoch: int) -> list[str] | str:
        selection = self.method.selection
        names: Any = list(selection.candidates(self.model))
        record: Record = {"epoch": epoch}
        if selection.needs_scores:
            names = scores = self._sharpness()
            record["sharpness"] = scores.as_dict()
        record["layers"] = selection.choose(names)
        self.state["selections"].append(record)
        if selection.needs_scores:
            say(f"{self.method.name}: epoch {epoch}, selected {', '.join(record['layers'])}")
            checkpoint.write_json(self.folder / "sharpness.json", self.state["selections"])
            checkpoint.write(self.folder / "sharpness.png", plot_sharpness(scores, record["layers"]))
        return record["layers"]

    def _sharpness(self) -> Scores:
        how, split = self.recipe.sharpness, balanced(self.data.train, self.recipe.sharpness.examples)
        with track(f"{self.method.name}: sharpness", len(split.labels)) as advance, fast_linear(self.run_.device):
            return layer_sharpness(
                self.model, plain_batches(split, how.batch), attack=self.recipe.attack, how=how,
                layers=self.method.selection.candidates(self.model), seed=self.recipe.seed, advance=advance,
            )  # fmt: skip

    def _epoch(self) -> float:
        """The rest of an epoch; returns images/s."""
        s, r = self.state, self.recipe
        start, before = time.perf_counter(), s["seen"]
        if s["batch"]:  # resumed within the epoch, perhaps after its last batch
            self.lr, self.eps = self._rates(s["epoch"] + (s["batch"] - 1) / self.batches)
        key = mix(r.seed, self.stage, s["epoch"])
        todo = batches(
            self.data.train, r.batch_size, seed=mix(r.seed, self.stage), epoch=s["epoch"], augment=r.data.augment,
            skip=s["batch"],
        )  # fmt: skip
        label = f"{self.method.name}: {self.stage} epoch {s['epoch'] + 1}/{self.epochs}"
        loss, hits = (torch.tensor(s[k], dtype=torch.float64, device=self.run_.device) for k in ("loss", "hits"))
        with track(label, len(self.data.train.labels) - s["seen"]) as advance:
            for batch in todo:
                at = s["epoch"] + s["batch"] / self.batches
                torch.manual_seed(mix(key, "dropout", s["batch"]))
                self.lr, self.eps = self._rates(at)
                value = self.step(*batch, lr=self.lr, eps=self.eps, seed=key)
                loss += value * len(batch.y)
                hits += self.step.accuracy * len(batch.y)
                s["batch"] += 1
                s["seen"] += len(batch.y)
                advance(len(batch.y), loss=loss / s["seen"], robust=hits / s["seen"])
                if time.perf_counter() - self.saved > SAVE_SECONDS:
                    s["loss"], s["hits"] = float(loss), float(hits)
                    self._save()
        s["loss"], s["hits"] = float(loss), float(hits)
        return (s["seen"] - before) / (time.perf_counter() - start)

    def _rates(self, epoch: float) -> tuple[float, float]:
        """Learning rate and eps at a (fractional) epoch of this stage."""
        schedule, attack = self.recipe.schedule, self.recipe.attack
        factor = schedule.factor(epoch / self.epochs)
        if self.stage == "pgd-at":
            factor *= schedule.rise(round((epoch - clean_epochs(self.warmup)) * self.batches))
        return self.step.optimizer.lr * factor, attack.eps * eps_factor(epoch, self.warmup)

    def _tick(self) -> None:
        """Counts the time since the last tick; what a killed process did after its last checkpoint is not counted."""
        now = time.perf_counter()
        self.state["seconds"] += now - self.ticked
        self.ticked = now

    def _end_epoch(self, rate: float) -> None:
        s = self.state
        record = {
            "stage": self.stage, "epoch": len(s["history"]), "lr": self.lr,
            "eps": self.eps, "loss": _finite(s["loss"] / s["seen"]), "train_robust": s["hits"] / s["seen"],
        }  # fmt: skip
        s["epoch"] += 1
        if s["epoch"] > self.warmup or s["epoch"] == self.epochs:
            record |= self._held_out(s["epoch"])
        self._tick()
        record |= {"images_per_s": round(rate, 1), "seconds": round(s["seconds"], 3)}
        s["history"].append(record)
        s |= {"batch": 0, "loss": 0.0, "hits": 0.0, "seen": 0}
        self._say(record)
        self._save()

    def _held_out(self, epoch: int) -> Record:
        """Accuracy on held-out training images; a new best epoch's weights are kept."""
        report = self.run_.evaluate(f"{self.method.name}: held out", self.data.held_out, self.recipe.select_by)
        if report.robust > self.state["best"]["robust"]:
            self.state["best"] = {"epoch": epoch, "robust": report.robust}
            checkpoint.save_tensors(
                self.folder / "best.safetensors", _whole(self.model), describe(self.recipe, self.data)
            )
        return {"held_out_clean": report.clean, "held_out_robust": report.robust}

    def _say(self, record: Record) -> None:
        held_out = "".join(
            f", {k.replace('_', ' ')} {record[k]:.1%}" for k in ("held_out_clean", "held_out_robust") if k in record
        )
        say(
            f"{self.method.name}: {self.stage} epoch {self.state['epoch']}/{self.epochs}, loss {record['loss'] or math.nan:.3f}, "
            f"eps {record['eps']:.4f}, lr {record['lr']:.4g}{held_out}, {record['images_per_s']:,.0f} images/s"
        )

    def _save(self) -> None:
        self._tick()
        tensors = {f"model.{n}": t for n, t in _whole(self.model).items()} | self.step.state_tensors()
        checkpoint.save(self.folder / "last", tensors, self.state)
        lines = "".join(json.dumps(r) + "\n" for r in self.state["history"])
        checkpoint.write(self.folder / "log.jsonl", lines)
        self.saved = time.perf_counter()


def device_named(name: str | None) -> torch.device:
    """The device of that name; by default a GPU if there is one. Raises ValueError for one that is not here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def model_for(recipe: Recipe, data: Dataset) -> nn.Module:
    """The recipe's model for this data, from its weights or starting checkpoint, drawn with the recipe's seed."""
    spec = recipe.model
    torch.manual_seed(mix(recipe.seed, "model"))
    model = create_model(
        spec.name, num_classes=len(data.classes), img_size=spec.img_size, patch_size=spec.patch_size,
        in_chans=data.train.images.shape[1], weights=recipe.start or spec.weights, **spec.args,
    )  # fmt: skip
    try:
        with torch.no_grad(), eval_mode(model):
            model(data.train.images[:1].cpu().float() / 255)
    except (AssertionError, RuntimeError) as error:
        size = "×".join(map(str, data.train.images.shape[2:]))
        raise ValueError(
            f"{spec.name} does not take the {size} images of {data.name}: {error}; give --img-size and --patch-size"
        ) from None
    return model


def describe(recipe: Recipe, data: Dataset) -> Record:
    """What a model file says of itself: enough to build it again, nothing of time, machine or paths."""
    model = recipes_on_disk.to_dict(recipe.model) | {"weights": None}
    return {"model": model, "data": data.name, "classes": list(data.classes)}


def environment(device: torch.device) -> Record:
    """Versions and hardware."""
    return {
        "device": str(device), "hardware": hardware(device), "torch": torch.__version__,
        "timm": version("timm"), "python": platform.python_version(), "platform": platform.platform(),
        "command": sys.argv,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    """None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict: the live one changes with the next step."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _show(results: dict[str, Any], recipe: Recipe, n: int) -> None:
    rows = []
    for r in results["runs"]:
        cells = [f"{100 * r[kind][which]:.1f}" for which in ("best", "last") for kind in ("clean", "robust")]
        rows.append([r["name"], *cells, f"{r['trained_parameters']:,}", f"{r['seconds']:.0f}"])
    title = f"{recipe.name}: test accuracy in %, {n} images, {recipe.score_by} at eps {recipe.attack.eps:.4g}"
    table(title, ["", "clean best", "robust best", "clean last", "robust last", "trained", "seconds"], rows)
