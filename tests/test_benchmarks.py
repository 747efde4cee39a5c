"""The benchmark's own arithmetic and its gate; no times are judged here."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


def row(case, method, vs_base, vs_fastlora):
    return {"case": case, "method": method, "vs_base": vs_base, "vs_fastlora": vs_fastlora}


def test_figures_are_geometric_means_over_the_grid():
    small, large = "linear/forward/576x1536/fp32/m16/r16", "linear/forward/4096x4096/fp32/m16/r16"
    rows = [row(small, "fastlora", 0.5, 1.0), row(large, "fastlora", 2.0, 1.0)]
    rows += [row(small, "loralib", 1.0, 2.0), row(large, "loralib", 16.0, 8.0)]
    found = {(r["case"], r["method"]): r["value"] for r in module("table").figures(rows)}
    assert found["figure/forward-over-base", "fastlora"] == pytest.approx(1.0)
    assert found["figure/forward-worst-over-base", "fastlora"] == 2.0
    assert found["figure/forward-over-fastlora", "loralib"] == pytest.approx(4.0)
    assert found["figure/forward-small-over-fastlora", "loralib"] == pytest.approx(2.0)
    assert not [case for case, _ in found if "training" in case]


def test_a_row_replaces_its_older_self(tmp_path):
    table, path = module("table"), tmp_path / "cpu.csv"
    table.update(path, [row("a", "base", 1.0, 2.0), row("b", "base", 1.0, 2.0)])
    table.update(path, [row("a", "base", 1.0, 3.0), row("c", "base", 1.0, 4.0)])
    assert [(r["case"], r["vs_fastlora"]) for r in table.read(path)] == [("a", 3.0), ("b", 2.0), ("c", 4.0)]


def test_ratios_are_medians_within_rounds():
    timing = module("clock").Timing({"base": [1.0, 10.0, 100.0], "fastlora": [2.0, 5.0, 100.0]}, calls=1)
    assert timing.ratio("fastlora", "base") == 1.0
    assert timing.quantiles("base")[1] == 10.0


def test_disturbed_samples_are_dropped_and_counted(monkeypatch):
    clock = module("clock")
    answers = iter([(9.0, True), (9.0, True), (1.0, False)])
    monkeypatch.setattr(clock, "_sample", lambda call, repeats: next(answers))
    timing = clock.Timing({"base": []}, 1, {"base": 0})
    assert clock._clean_sample(lambda: None, 1, float("inf"), "base", timing) == 1.0
    assert timing.dropped == {"base": 2}


def test_nothing_is_timed_while_tests_are_red(tmp_path, monkeypatch):
    pytest.importorskip("loralib")
    pytest.importorskip("peft")
    run = module("run")
    red = tmp_path / "test_red.py"
    red.write_text("def test():\n    assert False\n")
    monkeypatch.setitem(run.GATES, "linear", (str(red),))
    monkeypatch.setattr(run, "measure", lambda *args: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match="linear is not timed"):
        run.main(["--op", "linear", "--out", str(tmp_path / "out.csv")])


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_every_method_computes_the_same_layer(mode):
    """A tiny case through the whole of measure, which refuses a method that is off."""
    pytest.importorskip("loralib")
    pytest.importorskip("peft")
    cases = module("cases")
    case = cases.LinearCase(mode, 3, 48, 40, "bf16", 8)
    methods = [m for m in cases.methods(case) if m != "compile"]
    rows = module("measure").measure(case, "cpu", methods, 0.01)
    assert [r["method"] for r in rows] == methods
    assert all(r["p20_us"] <= r["p50_us"] <= r["p80_us"] and r["samples"] >= 7 for r in rows)
    assert rows[0]["vs_base"] == 1.0 and rows[1]["vs_fastlora"] == 1.0
    # y in bf16 is the least that a call holds
    assert all(r["peak_mb"] >= 3 * 40 * 2 / 1e6 for r in rows)


@pytest.mark.parametrize("op", ["merged", "embedding", "tasks"])
def test_layers_of_other_kinds_agree_before_they_are_timed(op):
    """The largest shapes apart, the real cases; each refuses methods that differ."""
    pytest.importorskip("loralib")
    cases = module("cases")
    for case in cases.cases(op, "cpu"):
        if case.m <= 64:
            rows = module("measure").measure(case, "cpu", cases.methods(case), 0.01)
            assert [r["method"] for r in rows] == cases.methods(case)


def test_eight_tasks_stand_beside_one():
    rows = [row("tasks/forward/m1", m, v, v / 2) for m, v in (("base", 1.0), ("fastlora", 2.0), ("fastlora_8", 3.0))]
    found = {(r["case"], r["method"]): r["value"] for r in module("table").figures(rows)}
    assert found == {
        ("figure/tasks-forward-m1-over-base", "fastlora"): 2.0,
        ("figure/tasks-forward-m1-over-fastlora", "fastlora_8"): 1.5,
    }
