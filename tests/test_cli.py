"""The command: a run that is really killed, and wrong commands that get one sentence and exit code 2."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safer_fast import cli

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "finetune", "quickstart", "--model.args", "{embed_dim: 32, depth: 2, num_heads: 2}", "--limit", "64",
    "--patch-size=4", "--epochs", "4", "--warmup-epochs", "1", "--finetune-epochs", "2", "--selection.every", "1",
    "--attack.steps", "2", "--sharpness.examples", "32", "--batch_size", "16", "--select-by", "pgd-1",
    "--score-by", "pgd-2",
]  # fmt: skip
# A checkpoint after each batch, so that it is killed in the middle of things.
CODE = "import sys; from safer_fast import train, cli; train.SAVE_SECONDS = 0.0; cli.main(sys.argv[1:])"


def start(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def killed_after(process, line, seconds=0.0):
    """SIGKILL once a line of output begins so, and a moment later; what was printed."""
    printed = []
    for text in process.stdout:
        printed.append(text)
        if line in text:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL, "".join(printed)
    return printed


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, by the command."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert command(*TINY, "--out", str(out)) == 0
    return out


def command(*arguments):
    """The exit code of the command, run in this process."""
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return end.code or 0
    return 0


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bytes(run, tmp_path):
    """SIGKILL in stage 1, as stage 2 begins, and while it trains."""
    broken = [*TINY, "--out", "broken", "--resume"]
    killed_after(start(*broken, cwd=tmp_path), "pgd-at epoch 1/2", 0.05)
    killed_after(start(*broken, cwd=tmp_path), "epoch 0, selected")
    killed_after(start(*broken, cwd=tmp_path), "finetune epoch 1/2", 0.05)
    assert not (tmp_path / "broken/results.json").exists()
    last = start(*broken, cwd=tmp_path)
    output = last.communicate(timeout=60)[0]
    assert last.returncode == 0, output
    for name in ("model.safetensors", "best.safetensors", "sharpness.json"):
        assert sha(tmp_path / "broken" / name) == sha(run / name)
    one, other = (json.loads((folder / "results.json").read_text())["runs"][0] for folder in (run, tmp_path / "broken"))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert "pgd-at epoch" not in output  # the last one had not much left to do
    assert "run folder: broken" in output


def files(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_resume_of_a_finished_run_changes_nothing_and_exits_0(run):
    before = files(run)
    assert command(*TINY, "--out", str(run), "--resume") == 0
    assert files(run) == before


def refused(capsys, *arguments):
    """The one sentence of a refusal."""
    capsys.readouterr()
    assert command(*arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return " ".join(printed.err.split())


def test_an_existing_run_is_refused(run, capsys):
    before = files(run)
    sentence = refused(capsys, *TINY, "--out", str(run))
    assert sentence.startswith("safer-fast: ")
    assert "already holds a run: give --resume to go on with it, or another --out" in sentence
    assert "another recipe" in refused(capsys, *TINY, "--out", str(run), "--resume", "--seed", "3")
    assert files(run) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["finetune", "quickstrat"], "did you mean quickstart"),
        (["finetune", "nowhere.yaml"], "no recipe file nowhere.yaml"),
        (["finetune"], "no recipe given"),
        (["finetune", "quickstart", "--epoch", "3"], "did you mean epochs"),
        (["finetune", "quickstart", "--epochs"], "--epochs needs a value"),
        (["finetune", "quickstart", "--epochs", "--resume"], "--epochs needs a value"),
        (["finetune", "quickstart", "extra"], "unexpected argument 'extra'"),
        (["finetune", "quickstart", "--epochs", "many"], "not a whole number"),
        (["finetune", "quickstart", "--eps", "-1"], "eps=-1"),
        (["finetune", "quickstart", "--attack", "pgd-20"], "attack='pgd-20'"),
        (["finetune", "quickstart", "--data", "cifar10", "--data-dir", "nowhere"], "give --data-dir the folder"),
        (["finetune", "quickstart", "--from", "nowhere.pth"], "no weights at nowhere.pth"),
        (["finetune", "quickstart", "--device", "gpu"], "gpu"),
        (["finetune", "quickstart", "--device", "cuda:77"], "cuda:77"),
        (["evaluate", "nowhere"], "no model at nowhere"),
        (["sharpness", "nowhere"], "no model at nowhere"),
        (["show", "nothing"], "no recipe 'nothing'"),
        (["unheard-of"], "No such command"),
    ],
)  # fmt: skip
def test_wrong_commands(capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--attack", "pgd"], "no attack 'pgd'"),
        (["--eps", "much"], "'much' is not a number"),
        (["--eps", "-0.1"], "eps=-0.1"),
        (["--norm", "L1"], "choose one of Linf, L2"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--n", "0"], "--n"),
        (["--n", "-3"], "--n"),
        (["--device", "gpu"], "gpu"),
        (["--model.nmae", "x"], "did you mean model.name"),
    ],
)
def test_wrong_evaluations(run, capsys, arguments, sentence):
    assert sentence in refused(capsys, "evaluate", str(run), *arguments)


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"", lambda b: b[:30], lambda b: b"\xff" * 100])
def test_a_damaged_model_is_refused(run, capsys, tmp_path, damage):
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage((run / "model.safetensors").read_bytes()))
    assert "not a whole safetensors file" in refused(capsys, "evaluate", str(path))


def test_evaluate_writes_what_programs_read(run, capsys, tmp_path):
    report = tmp_path / "report.json"
    assert command("evaluate", str(run), "--attack", "clean,pgd-2", "--json", str(report)) == 0
    found = json.loads(report.read_text())
    expected = json.loads((run / "results.json").read_text())["runs"][0]
    assert (found["clean"], found["robust"]) == (expected["clean"]["last"], expected["robust"]["last"])
    names = [
        "clean",
        "robust",
        "by_attack",
        "n",
        "interval",
        "invalid",
        "verdict",
        "checks",
        "attack",
        "eps",
        "norm",
        "seed",
        "precision",
        "ids_sha256",
    ]
    assert set(names) <= found.keys()
    assert f"robust accuracy  {found['robust']:.2%}" in capsys.readouterr().out
    assert command("evaluate", str(run), "--attack", "pgd-2", "--n", "20", "--eps", "8/255", "--json", str(report)) == 0
    found = json.loads(report.read_text())
    assert (found["n"], found["eps"]) == (20, 8 / 255)


def test_evaluate_of_the_bare_model_file_builds_it_from_what_it_says(run, tmp_path):
    """Moved away from its folder, the file still knows model and data; the recipe's limit does not travel."""
    (tmp_path / "m.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    report, whole = tmp_path / "a.json", tmp_path / "b.json"
    options = ["--attack", "clean", "--eps", "0.1"]
    assert command("evaluate", str(tmp_path / "m.safetensors"), *options, "--limit", "64", "--json", str(report)) == 0
    assert command("evaluate", str(run), *options, "--json", str(whole)) == 0
    assert json.loads(report.read_text())["clean"] == json.loads(whole.read_text())["clean"]


def test_sharpness_scores_a_run(run, capsys, tmp_path):
    assert command("sharpness", str(run), "--out", str(tmp_path / "s"), "--top", "3") == 0
    (record,) = json.loads((tmp_path / "s/sharpness.json").read_text())
    ranked = sorted(record["layers"], key=lambda n: -record["layers"][n]["score"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ranked[:3])
    assert ranked[5] not in printed
    assert set(record["selected"]) == set(ranked[:2])
    assert (tmp_path / "s/sharpness.png").read_bytes().startswith(b"\x89PNG")


def test_show_prints_a_recipe_that_can_be_run_again(capsys, tmp_path):
    from safer_fast import recipe, recipes

    assert command("show", "quickstart", "--epochs", "31", "--eps", "8/255") == 0
    (tmp_path / "r.yaml").write_text(capsys.readouterr().out)
    assert recipe.load(tmp_path / "r.yaml") == recipes.quickstart().replace({"epochs": 31, "eps": 8 / 255})


def test_recipes_are_listed(capsys):
    from safer_fast.recipes import RECIPES

    assert command("recipes") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in RECIPES)


def test_from_means_stage_2_only(run, tmp_path, capsys):
    options = [
        *TINY[:7],
        "--attack.steps",
        "1",
        "--select-by",
        "pgd-1",
        "--score-by",
        "pgd-1",
        "--sharpness.examples",
        "16",
    ]
    assert command(*options, "--from", str(run), "--epochs", "1", "--out", str(tmp_path / "r")) == 0
    log = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in log] == ["finetune"]
    assert "with --from 1 is enough" in refused(capsys, *options, "--epochs", "1", "--out", str(tmp_path / "x"))


def test_default_folders_are_numbered(tmp_path):
    assert cli._next_folder(tmp_path, "a", resume=False) == tmp_path / "a-1"
    assert cli._next_folder(tmp_path, "a", resume=True) == tmp_path / "a-1"
    (tmp_path / "a-1").mkdir()
    (tmp_path / "a-2").mkdir()
    assert cli._next_folder(tmp_path, "a", resume=False) == tmp_path / "a-3"
    assert cli._next_folder(tmp_path, "a", resume=True) == tmp_path / "a-2"


def test_debug_shows_where(run):
    with pytest.raises(ValueError, match="choose one of"):
        cli.main(["evaluate", str(run), "--norm", "L1", "--debug"])
