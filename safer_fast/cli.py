"""The `safer-fast` command. Exit codes: 0 done, 1 a bug or a failed run, 2 bad input (one sentence, no traceback)."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .recipe import Recipe

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
# A recipe has many fields, nested; any of them is an option: --epochs 6, --sam.rho 0.1, --attack.steps=7.
_FIELDS = {"allow_extra_args": True, "ignore_unknown_options": True}
_HINT = "Any field of the recipe is an option too: --epochs 6 --sam.rho 0.1 (see `safer-fast show RECIPE`)."

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@app.command(context_settings=_FIELDS, epilog=_HINT)
def finetune(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="a named recipe or a YAML file")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/<recipe>-<n>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out, or start it")] = False,
    start: Annotated[str | None, typer.Option("--from", help="robust checkpoint or run folder: stage 2 only")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="also PGD-AT and PGD-AT (SAM), from the same start")
    ] = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Make a model robust: adversarial training, layer sharpness, selective sharpness-aware finetuning."""
    from .train import finetune as run

    changes = _overrides(context.args)
    if start:
        changes["start"] = start
        if "epochs" in changes:
            changes.setdefault("finetune_epochs", changes["epochs"])
    chosen = _recipe(recipe, changes)
    folder = out or _next_folder(Path("runs"), chosen.name, resume=resume)
    run(chosen, folder, compare=compare, resume=resume, device=device)
    typer.echo(f"run folder: {folder}")


@app.command(context_settings=_FIELDS, epilog=_HINT)
def sharpness(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="run folder or weights file")],
    out: Annotated[Path | None, typer.Option(help="folder for sharpness.json and sharpness.png")] = None,
    top: Annotated[int, typer.Option(help="how many layers to list")] = 10,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Score the layers of a model by adversarial sharpness, list and plot them."""
    from .data import balanced, plain_batches
    from .engine import fast_linear
    from .progress import table, track
    from .sharpness import layer_sharpness

    loaded = _load(model, _overrides(context.args), device)
    how, split = loaded.recipe.sharpness, balanced(loaded.data.train, loaded.recipe.sharpness.examples)
    candidates = loaded.recipe.selection.candidates(loaded.model)
    with track("sharpness", len(split.labels)) as advance, fast_linear(split.images.device):
        scores = layer_sharpness(
            loaded.model, plain_batches(split, how.batch), attack=loaded.recipe.attack, how=how, layers=candidates,
            seed=loaded.recipe.seed, advance=advance,
        )  # fmt: skip
    selected = loaded.recipe.selection.choose(scores)
    std = dict(zip(scores.names, scores.std.tolist(), strict=True))
    rows = [
        [n, f"{scores[n]:.6f}", f"{std[n]:.6f}", "selected" if n in selected else ""] for n in scores.ranking()[:top]
    ]
    title = f"sharpness ({how.measure}, rho {how.rho:g}), {len(scores)} layers, rank stability {scores.stability:.2f}"
    table(title, ["layer", "score", "std", ""], rows)
    if out:
        _write_sharpness(out, scores, selected)


@app.command(context_settings=_FIELDS, epilog=_HINT)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="run folder or weights file")],
    attack: Annotated[str, typer.Option(help="clean, pgd-<steps>, cw-<steps>; several with commas")] = "pgd-20",
    eps: Annotated[str | None, typer.Option(help="budget in [0, 1] pixels, 8/255 say; default: the recipe's")] = None,
    norm: Annotated[str | None, typer.Option(help="Linf or L2; default: the recipe's")] = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="so many test images, balanced over classes; default all")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="images queued at a time; does not change the result")] = 512,
    seed: Annotated[int, typer.Option(help="of the attack's draws")] = 0,
    as_json: Annotated[Path | None, typer.Option("--json", help="write the report here")] = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Clean and robust accuracy on test images."""
    from .attacks import threat
    from .data import balanced
    from .evaluate import evaluate as measure
    from .recipe import number

    loaded = _load(model, _overrides(context.args), device)
    at = threat(norm or loaded.recipe.attack.norm, number(eps) if eps else loaded.recipe.attack.eps)
    split = balanced(loaded.data.test, n) if n else loaded.data.test
    report = measure(
        loaded.model, split.pixels(), split.labels, ids=split.ids, threat=at, attacks=attack, batch_size=batch_size,
        seed=seed,
    )  # fmt: skip
    _print_report(report)
    if as_json:
        from .checkpoint import write_json

        write_json(as_json, report.as_dict())


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="a timm model")] = "deit_tiny_patch16_224",
    img_size: Annotated[int, typer.Option(help="pixels")] = 32,
    patch_size: Annotated[int, typer.Option(help="pixels of a patch")] = 4,
    batch: Annotated[int | None, typer.Option(help="images a step; default 128 on a GPU, 32 on a CPU")] = None,
    layers: Annotated[str | None, typer.Option(help="trained layers, with commas; default two late ones")] = None,
    repeats: Annotated[int | None, typer.Option(help="timed steps; default 20 on a GPU, 5 on a CPU")] = None,
    modes: Annotated[str | None, typer.Option(help="of eager, native, compiled, captured, with commas")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16")] = "auto",
    as_json: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
    nsys: Annotated[bool, typer.Option("--nsys", help="print the lines that profile this with Nsight")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="what those lines run: a few marked steps")] = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Throughput of a training step on this machine, in its modes, against plain PyTorch."""
    from . import bench as benchmark
    from .checkpoint import write_json

    what = benchmark.Bench(
        model=model, img_size=img_size, patch_size=patch_size, batch=batch, layers=layers, repeats=repeats,
        modes=modes, precision=precision, device=device,
    )  # fmt: skip
    if nsys:
        typer.echo("\n".join(benchmark.nsight_commands(what)))
    elif profile:
        typer.echo(f"profiled mode {benchmark.profile(what)}")
    else:
        result = benchmark.bench(what)
        if as_json:
            write_json(as_json, result)


@app.command()
def recipes() -> None:
    """List the named recipes."""
    from .recipes import RECIPES

    for name, make in RECIPES.items():
        typer.echo(f"{name:<22} {(make.__doc__ or '').strip().splitlines()[0]}")


@app.command(context_settings=_FIELDS, epilog=_HINT)
def show(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a named recipe or a YAML file")],
    debug: Debug = False,
) -> None:
    """Print a recipe as YAML, complete, ready to edit."""
    from .recipe import dump

    typer.echo(dump(_recipe(recipe, _overrides(context.args))), nl=False)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one sentence and code 2, diverged weights with code 1; --debug: the traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments)
    except (ValueError, OSError) as error:
        if "--debug" in arguments:
            raise
        typer.echo(f"safer-fast: {_sentence(error)}", err=True)
        raise SystemExit(2) from None
    except ArithmeticError as error:
        if "--debug" in arguments:
            raise
        typer.echo(f"safer-fast: {error}", err=True)
        raise SystemExit(1) from None


class _Loaded:
    """A model with the recipe and data that it belongs to."""

    def __init__(self, recipe: "Recipe", data: Any, model: Any) -> None:
        self.recipe, self.data, self.model = recipe, data, model


def _load(path: str, changes: dict[str, Any], device: str | None) -> _Loaded:
    """A model file or run folder with its recipe: the folder's own, what the file says of itself, or the options."""
    from .data import load_data
    from .models import load_weights
    from .train import device_named, model_for

    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no model at {path}: give a run folder with model.safetensors, or a weights file")
    recipe = _recipe_of(file).replace({**changes, "start": str(file)})
    data = load_data(recipe.data.name, recipe.data.dir, limit=recipe.data.limit, holdout=recipe.data.holdout)
    target = device_named(device)
    moved = {name: getattr(data, name).to(target) for name in ("train", "held_out", "test")}
    model = model_for(recipe, data)
    if random := load_weights(model, file):
        raise ValueError(
            f"{file} has no {', '.join(random)} for the {len(data.classes)} classes of {data.name}: finetune it on this "
            "data first, or give the --data that it was trained on"
        )
    return _Loaded(recipe, data._replace(**moved), model.to(target))


def _recipe_of(file: Path) -> "Recipe":
    from . import checkpoint, recipe

    if (file.parent / "recipe.yaml").is_file():
        return recipe.load(file.parent / "recipe.yaml")
    if file.suffix == ".safetensors" and (known := checkpoint.metadata_of(file)):
        return recipe.from_dict({"model": known["model"], "data": {"name": known["data"]}})
    return recipe.Recipe()


def _recipe(name: str | None, changes: dict[str, Any]) -> "Recipe":
    """A YAML file, a named recipe, or the protocol's defaults; then the changes of the command line."""
    from . import recipe, recipes

    if name is None:
        if not {"model", "model.name"} & changes.keys() or not {"data", "data.name"} & changes.keys():
            raise ValueError("no recipe given: name one (`safer-fast recipes` lists them), or give --model and --data")
        return recipe.Recipe().replace(changes)
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return recipe.load(name).replace(changes)
    return recipes.named(name).replace(changes)


def _overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """--field value and --field=value pairs, as {field: text}; dashes in names become underscores."""
    changes: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--") or len(argument) < 3:
            raise ValueError(f"unexpected argument {argument!r}: options are written --field value")
        key, given, value = argument[2:].partition("=")
        if not given:
            value = next(rest, "")
            if value == "" or value.startswith("--"):
                raise ValueError(f"--{key} needs a value")
        changes[key.replace("-", "_")] = value
    return changes


def _next_folder(parent: Path, name: str, *, resume: bool) -> Path:
    """runs/<name>-<n>: the first free n, or the newest one when resuming."""
    n = 1
    while (parent / f"{name}-{n}").exists():
        n += 1
    return parent / f"{name}-{max(1, n - 1) if resume else n}"


def _write_sharpness(out: Path, scores: Any, selected: Any) -> None:
    from .checkpoint import write, write_json
    from .plots import plot_sharpness

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "sharpness.json", [scores.as_dict() | {"selected": selected}])
    write(out / "sharpness.png", plot_sharpness(scores, selected))
    typer.echo(f"wrote {out / 'sharpness.json'} and {out / 'sharpness.png'}")


def _print_report(report: Any) -> None:
    low, high = report.interval
    typer.echo(f"clean accuracy   {report.clean:.2%}  ({report.n} images)")
    for name, accuracy in report.by_attack.items():
        typer.echo(f"after {name:<10} {accuracy:.2%}")
    typer.echo(
        f"robust accuracy  {report.robust:.2%}  (95 % interval {low:.2%} to {high:.2%}; {report.norm} "
        f"eps {report.eps:.4g}, {report.precision}, seed {report.seed}; {report.seconds:.0f} s)"
    )
    if report.invalid:
        typer.echo(f"INVALID: logits were not finite for {report.invalid} images; they count as wrong")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
