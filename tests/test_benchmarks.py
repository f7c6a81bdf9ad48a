"""Benchmarks run, compare what is equal, and count what is there. No time is asserted."""

import contextlib
import json

import pytest
import torch

from benchmarks import baselines, bench_data, bench_ops, bench_step, gpu, report, roofline, stages, timing, trace
from safer_fast import bench, cli, ops, profiling
from safer_fast.engine import compile_step

STEP = ["--model", "vit_tiny_patch16_224", "--img-size", "8", "--batch", "2", "--depth", "2", "--repeats", "2",
        "--layers", "blocks.1.mlp.fc1", "--device", "cpu"]  # fmt: skip


# --- the step's benchmark


@pytest.fixture
def cheap_ceilings(monkeypatch):
    """Ceilings out of a hat: measuring them takes longer than the rest."""
    monkeypatch.setattr(bench_step, "ceilings", lambda device: (0.1, 10.0))


def test_baselines_agree_with_ours(tmp_path, monkeypatch, cheap_ceilings):
    """fp32: losses and weights of three steps within 1e-5, or bench_step raises. strong's mathematics, uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    path = tmp_path / "step.json"
    result = bench_step.main([*STEP, "--variants", "ours,ours-eager,plain,strong,full", "--json", str(path)])
    assert set(result["agreement"]["gap"]) == {"ours-eager", "plain", "strong"}
    assert max(result["agreement"]["gap"].values()) < 1e-5
    assert set(result["ratios"]) == {"plain", "strong", "full"}
    assert json.loads(path.read_text())["variants"].keys() == result["variants"].keys()
    assert result["command"].endswith(str(path))


def test_sides_that_part_are_not_timed(monkeypatch, cheap_ceilings):
    monkeypatch.setitem(bench_step.VARIANTS, "plain", bench_step.baseline(_Lame))
    with pytest.raises(AssertionError, match="plain and ours part"):
        bench_step.main([*STEP, "--variants", "ours,plain"])


class _Lame(baselines.PlainStep):
    """Forgets the second pass."""

    def __call__(self, x, y, noise=None):
        self.steps = 1
        return super().__call__(x, y, noise)


def test_a_rival_that_fails_is_left_out_only_when_asked(monkeypatch, cheap_ceilings, capsys):
    def broken(model, layers):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(bench_step.VARIANTS, "strong", broken)
    with pytest.raises(RuntimeError, match="no such luck"):
        bench_step.main([*STEP, "--variants", "ours,strong"])
    result = bench_step.main([*STEP, "--variants", "ours,strong", "--keep-going"])
    assert "no such luck" in result["failed"]["strong"]
    assert "FAILED" in capsys.readouterr().err


# --- timing


def test_variants_take_turns(monkeypatch):
    turns = []
    monkeypatch.setattr(profiling, "clock", lambda run: run())
    variants = {"a": lambda: turns.append("a") or 2.0, "b": lambda: turns.append("b") or 1.0}
    timings = timing.interleave(variants, repeats=3, warmup=1)
    assert turns == ["a", "b"] * 4
    assert timings["a"].seconds == [2.0] * 3
    assert timing.paired_ratio(timings["a"], timings["b"]) == 2.0
    with pytest.raises(ValueError, match="spread"):
        timing.interleave(variants, repeats=1)


def test_paired_ratio_is_immune_to_drift():
    slow = timing.Timing([2.0, 4.0, 8.0, 6.0])
    assert timing.paired_ratio(slow, timing.Timing([s / 2 for s in slow.seconds])) == 2.0
    assert slow.median == 5.0
    assert slow.spread == pytest.approx((7.5 - 2.5) / 2 / 5)


# --- counting


def test_flops_of_a_forward_by_hand(vit):
    n, d, depth, classes = 5, 32, 2, 5
    block = 2 * n * (3 * d * d + d * d + 8 * d * d) + 2 * 2 * n * n * d
    by_hand = 2 * (n - 1) * 16 * d + depth * block + 2 * d * classes
    assert roofline.forward_flops(vit(), 1, 8) == by_hand


def test_kernels_count_the_flops_of_the_blocks():
    """compiled: a block's backward has the FLOPs of its forward and of q kᵀ once more, three N×N·D in all."""
    n, d, shape = 65, 192, roofline.Vit(65, 192, 768, 12, 3 * 32 * 32, True)
    counted = sum(
        k.flops for backward in (False, True) for k in roofline._block(shape, "compiled", 3, backward=backward)
    )
    assert counted == 2 * (2 * n * 12 * d * d) + 7 * 2 * n * n * d
    moved = sum(k.bytes for backward in (False, True) for k in roofline._block(shape, "compiled", 3, backward=backward))
    assert moved == (36 + 44) * n * d * 2


@pytest.mark.parametrize(
    ("width", "published"), [(192, (16.0, 17.2, 20.7)), (384, (6.5, 7.1, 9.0)), (768, (2.17, 2.36, 2.79))]
)
def test_bounds_are_those_counted_independently(width, published):
    shape = roofline.Vit(65, width, 4 * width, 12, 3 * 32 * 32, True)
    selected = dict.fromkeys((9, 10, 11), roofline.TRAINED - {"norm"})
    found = [roofline.bound(roofline.count_step(shape, level, selected)) / 1e3 for level in roofline.LEVELS[1:4]]
    assert found == pytest.approx(published, rel=0.025)


def test_levels_only_get_faster_and_layers_cost():
    shape = roofline.Vit(197, 192, 768, 12, 3 * 224 * 224, True)
    late, early = {11: frozenset({"fc1"})}, {0: frozenset({"fc1"})}
    speeds = [roofline.bound(roofline.count_step(shape, level, late)) for level in roofline.LEVELS]
    assert speeds == sorted(speeds)
    assert roofline.bound(roofline.count_step(shape, "compiled", early)) < speeds[1]
    assert speeds[1] < roofline.flop_bound(roofline.count_step(shape, "compiled", late))
    with pytest.raises(ValueError, match="choose one of"):
        roofline.count_step(shape, "warp", late)


def test_a_model_is_counted_from_its_layers(vit):
    model = vit()
    kernels = roofline.step_kernels(model, 8, ["blocks.1.attn.qkv", "blocks.0.mlp.fc2"], "compiled", attack_steps=1)
    assert [k.name for k in kernels if k.name in ("dqkv", "dproj", "dfc1", "dfc2")] == ["dfc2", "dqkv"] * 2
    assert roofline.step_kernels(model, 8, None, "eager", attack_steps=1) is not None
    assert roofline.step_kernels(torch.nn.Sequential(model), 8, ["0"], "eager", attack_steps=1) is None


# --- ops and data


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_ops_are_measured_on_tensors_where_they_agree(op):
    assert op.name in bench_ops.REALISTIC
    row = bench_ops.measure(op, "cpu", bench_ops.TINY, calls=1, repeats=2)
    assert row["bytes"] > 0
    assert row["runs_as"] == ops.active(op.name, "cpu")


def test_an_op_that_is_wrong_is_not_measured(monkeypatch):
    op = next(op for op in ops.ALL if op.name == "global_norm")
    wrong = type(op)(**(op.__dict__ | {"run": lambda v: op.reference(v) * 1.001}))
    with pytest.raises(AssertionError):
        bench_ops.measure(wrong, "cpu", bench_ops.TINY, calls=1, repeats=2)


def test_input_pipelines_give_the_same_pixels():
    split = bench_data.random_split(50, 8)
    bench_data.agree(split, 16, torch.device("cpu"))
    result = bench_data.main(
        ["--images", "40", "--img-size", "8", "--batch", "16", "--workers", "0", "--repeats", "2", "--device", "cpu"]
    )
    assert set(result["variants"]) == {"ours", "plain, 0 workers"}


# --- ranges and the command's own benchmark


def test_phases_are_marked_in_order_when_asked(vit, images):
    seen = []

    @contextlib.contextmanager
    def mark(name):
        seen.append(name)
        yield

    step = compile_step(vit(), ["blocks.1.mlp.fc1"], mode="eager")
    step(*images(2))
    assert profiling.phase("attack") is profiling.phase("update")  # nothing, and always the same
    assert profiling.enable(mark) == "given"
    try:
        step(*images(2))
    finally:
        profiling.disable()
    assert seen == list(profiling.PHASES)


def test_ranges_are_drawn_by_what_is_installed():
    try:
        assert profiling.enable() in ("nvtx", "torch.cuda.nvtx", "nothing")
        with profiling.phase("attack"):
            pass
    finally:
        profiling.disable()


TINY = bench.Bench("vit_tiny_patch16_224", img_size=8, batch=2, attack_steps=1, repeats=2,
                   args={"depth": 2, "embed_dim": 32, "num_heads": 2})  # fmt: skip


def test_bench_compares_the_modes(capsys):
    result = bench.bench(TINY)
    assert list(result["variants"]) == ["eager", "native"]
    assert result["ratios"].keys() == {"native"}
    assert max(result["gaps"].values()) <= 1e-5
    assert "modes agree" in capsys.readouterr().out


def test_bench_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        bench.bench(bench.Bench(modes="captured", device="cpu"))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        bench.profile(bench.Bench(device="cpu"))
    with pytest.raises(ValueError, match="batch=0"):
        bench.Bench(batch=0)
    with pytest.raises(AssertionError, match="part"):
        bench._agree({"eager": [1.0, 1.0], "native": [1.0, 1.1]}, "fp32")
    with pytest.raises(AssertionError, match="part"):
        bench._agree({"eager": [1.0, 1.0], "captured": [float("nan"), 1.0]}, "bf16")


def test_nsight_lines_run_this_very_configuration():
    systems, compute = bench.nsight_commands(bench.Bench(batch=64, model="deit small"))
    assert systems.startswith("nsys profile --capture-range=cudaProfilerApi")
    assert systems.endswith("safer-fast bench --model 'deit small' --batch 64 --profile")
    assert "--nvtx-include attack/" in compute
    assert "--modes compiled --profile" in compute


def test_the_command_measures_and_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "bench", lambda what: {"batch": what.batch})
    for arguments in (["--json", str(tmp_path / "bench.json"), "--batch", "3"], ["--nsys"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", *arguments])
        assert end.value.code == 0
    assert json.loads((tmp_path / "bench.json").read_text()) == {"batch": 3}
    assert "nsys profile" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--profile", "--device", "cpu"])
    assert end.value.code == 2


# --- the GPU run, in miniature


@pytest.mark.parametrize("stage", ["environment", "agreement", "kernels", "profile", "attention"])
def test_stages_run_in_miniature(stage, tmp_path, capfd):
    assert gpu.run_stage(stage, tmp_path, dry=True) == gpu.OK
    result = json.loads(gpu.path_of(stage, tmp_path).read_text())
    assert result["dry"]
    assert result["status"] == gpu.OK
    assert result["rows"]


def test_ops_stage_finds_what_is_wrong(tmp_path, monkeypatch, capfd):
    good, op = ops.ALL[1], ops.ALL[3]
    wrong = type(op)(**(op.__dict__ | {"name": "wrong", "run": _Wrong(op.run)}))
    monkeypatch.setattr(ops, "ALL", [good, wrong])
    assert gpu.run_stage("ops", tmp_path, dry=True) == gpu.FAILED
    rows = json.loads(gpu.path_of("ops", tmp_path).read_text())["rows"]
    assert all(row["ok"] for row in rows if row["op"] == good.name)
    assert not any(row["ok"] for row in rows if row["op"] == "wrong" and row.get("dtype") == "torch.float32")


class _Wrong:
    """An op a bit off."""

    def __init__(self, run):
        self._opoverload, self.run = run._opoverload, run

    def __call__(self, *arguments):
        return self.run(*arguments) * 1.0001


def test_a_stage_that_raises_is_recorded_and_keeps_its_rows(tmp_path, monkeypatch, capfd):
    def fails(record, dry):
        record.row(before=1)
        raise RuntimeError("the GPU fell off the bus")

    monkeypatch.setitem(stages.STAGES, "environment", stages.Stage("", 1, fails))
    assert gpu.run_stage("environment", tmp_path, dry=True) == gpu.FAILED
    result = json.loads(gpu.path_of("environment", tmp_path).read_text())
    assert result["rows"] == [{"before": 1}]
    assert "fell off the bus" in result["detail"]
    assert "RuntimeError" in result["traceback"]


def test_stages_go_on_after_one_ran_out_of_time(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(stages.STAGES, "kernels", stages.STAGES["kernels"]._replace(seconds=0.05))
    assert gpu.main(["--dry", "--only", "kernels,environment", "--json", str(tmp_path)]) == 1
    out = capfd.readouterr().out
    ends = [line.split() for line in out.splitlines()[-2:]]
    assert ends[0][:4] == ["kernels", "out", "of", "time"]
    assert ends[1][:2] == ["environment", "ok"]
    assert gpu.main(["--dry", "--only", "environment", "--budget", "0", "--json", str(tmp_path)]) == 2
    with pytest.raises(SystemExit):
        gpu.main(["--only", "enviroment"])


def test_a_part_of_the_throughput_table(tmp_path, cheap_ceilings, capfd):
    assert gpu.run_stage("throughput:vit-8", tmp_path, dry=True) == gpu.OK
    assert json.loads(gpu.path_of("step-vit-8", tmp_path).read_text())["dry"]
    assert gpu.run_stage("throughput:vit-9", tmp_path, dry=True) == gpu.FAILED
    assert "choose one of vit-8" in gpu.path_of("throughput:vit-9", tmp_path).read_text()


def test_a_trace_tells_top_kernels_and_gaps():
    def event(name, ts, dur, cat="kernel"):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    found = {"traceEvents": [
        event("gemm", 20, 10), event("norm", 0, 5), event("gemm", 4, 6), event("copy", 50, 1, "gpu_memcpy"),
        event("host", 0, 99, "cpu_op"), event("attack", 0, 30, "gpu_user_annotation"), {"ph": "M", "name": "x"},
    ]}  # fmt: skip
    events = trace.read(found, "kernel")
    assert [e.name for e in events] == ["norm", "gemm", "gemm", "copy"]
    assert trace.top(events, 1) == [{"kernel": "gemm", "us": 16.0, "calls": 2, "share": 16 / 22}]
    seen = trace.gaps(events)
    assert (seen["span_us"], seen["idle_us"], seen["gaps"]) == (51.0, 30.0, 2)
    assert seen["longest"][0] == {"us": 20.0, "after": "gemm", "before": "copy"}
    assert trace.by_phase(found, profiling.PHASES, cuda=True) == {"attack": 30.0}
    assert not trace.gaps([])["ok"]


# --- the README's tables

README = "# Title\n<!-- bench:step -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:ops -->\n<!-- /bench -->\n"


def measurement(device, speed, date):
    ours = {"images_per_s": speed, "spread": 0.01, "n": 20, "share_of_bound": 0.8, "peak_bytes": 2**30}
    return {
        "device": device, "variants": {"ours": ours, "plain": {"peak_bytes": 2**31}}, "ratios": {"plain": 6.5},
        "model": "deit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "batch": 128, "layers": ["a", "b"], "date": date,
    }  # fmt: skip


def test_tables_come_from_measurements(tmp_path):
    (tmp_path / "1.json").write_text(json.dumps(measurement("NVIDIA H200", 12_345.6, "2026-02-01")))
    (tmp_path / "2.json").write_text(json.dumps(measurement("NVIDIA H200", 999.0, "2026-01-01")))
    (tmp_path / "3.json").write_text(json.dumps(measurement("cpu, 2 threads", 7.0, "2026-01-01")))
    (tmp_path / "4.json").write_text(json.dumps(measurement("cpu", 8.0, "2027-01-01") | {"dry": True}))
    text = report.fill(README, report.load(tmp_path))
    assert "12,346 ± 1.0% (n = 20) | 6.50 | – | – | 80% | 1.0 GiB (0.50 × plain) |" in text
    assert "999" not in text
    assert text.index("NVIDIA H200") < text.index("cpu, 2 threads")
    assert "old" not in text
    assert "between" in text
    assert text.count(report.MISSING) == 1  # the ops
    assert report.fill(text, report.load(tmp_path)) == text


def test_without_a_gpu_the_table_says_so(tmp_path):
    (tmp_path / "3.json").write_text(json.dumps(measurement("cpu, 2 threads", 7.0, "2026-01-01")))
    text = report.fill(README, report.load(tmp_path))
    assert f"| GPU | {report.MISSING} |" in text
    assert "cpu, 2 threads" in text
    with pytest.raises(ValueError, match="no table bench:stop"):
        report.fill("<!-- bench:stop -->\n<!-- /bench -->", [])


def test_check_changes_nothing(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert readme.read_text() == README
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0


def test_the_readme_says_what_was_measured():
    assert report.main(["--check"]) == 0
