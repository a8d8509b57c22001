"""The cost model and what it is fed with: tables, phases, keeping a calibration, and what `explain` makes of both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import unicorn_backend
from tests.test_compile_cache import make  # the embedded model cut to two layers
from unicorn_backend import doctor, measure, picture
from unicorn_backend.__main__ import app
from unicorn_backend.errors import OptionError
from unicorn_backend.explanation import Explanation, compare
from unicorn_backend.graph.describe import OPS
from unicorn_backend.partition import calibration, cost
from unicorn_backend.partition.cost import Rates, interpolate, microseconds
from unicorn_backend.partition.memory import plan_memory
from unicorn_backend.plan import Measured, Plan, Step
from unicorn_backend.timing import Event, assign

RATES = Rates(
    "by hand",
    2,
    values=1000.0,
    gathered=2000.0,
    read_gbps=10.0,
    cold={"w8c": {1: 100.0, 8: 200.0, 16: 400.0}},
    cached={"w8c": {1: 10.0, 8: 30.0}},
    attention={1: 50.0, 8: 400.0},
    softmax={1: 1000.0, 8: 8000.0},
    cold_launch={"linear": 7.0, "attention": 9.0},
    cached_launch={"linear": 1.0},
)
LINEAR = Step("linear", "l", "unicorn::linear", "cpu", ("w8c",), 1, weights=(2_000_000,), width=3000)


def test_a_table_is_linear_between_its_points_and_proportional_beyond() -> None:
    table = {1: 10.0, 4: 40.0, 8: 60.0}
    assert [interpolate(table, t) for t in (1, 2, 4, 6, 8, 24)] == [10, 20, 40, 50, 60, 180]


def test_a_product_is_launch_values_and_weights() -> None:
    assert microseconds(LINEAR, 1, 0, RATES) == pytest.approx(7 + 3 + 200)
    assert microseconds(LINEAR, 12, 0, RATES) == pytest.approx(7 + 36 + 2 * 300)
    assert microseconds(LINEAR, 1, 0, RATES, cached=True) == pytest.approx(1 + 3 + 20)
    assert microseconds(LINEAR, 16, 0, RATES, cached=True) == pytest.approx(1 + 48 + 800), "many tokens: cold table"
    small = dataclasses.replace(LINEAR, weights=(100_000,), width=0)
    assert microseconds(small, 1, 0, RATES) == pytest.approx(7 + 2 * 10), "one of two threads"
    assert microseconds(dataclasses.replace(LINEAR, schemes=("float16",)), 1, 0, RATES) is None


def test_how_many_sequences_are_worth_decoding_together() -> None:
    """7 us, 3 per row and the table: 2 rows cost 227 us, 4 rows 263, 8 rows 431. Attention is each row's own."""
    step = dataclasses.replace(LINEAR, weight_bytes=1 << 30)
    plan = Plan(1, "1", [step])
    rates = dataclasses.replace(RATES, cold={"w8c": {1: 100.0, 2: 107.0, 4: 122.0, 8: 200.0}}, cached={})
    rows, gain = cost.rows_worth(plan, rates, 8)
    assert rows == 8 and gain == pytest.approx(8 * 210 / 431)
    assert cost.rows_worth(plan, rates, 4)[0] == 4
    saturated = dataclasses.replace(rates, cold={"w8c": {1: 100.0, 2: 107.0, 4: 122.0, 8: 240.0}})
    rows, gain = cost.rows_worth(plan, saturated, 8)
    assert rows == 4 and gain == pytest.approx(4 * 210 / 263), "8 rows would have 3.29 times the speed, 4 have 3.19"
    attention = Step("attention", "a", "", "cpu", (), 0, key_macs=20000, key_heads=4, key_bytes=1000)
    rows, gain = cost.rows_worth(Plan(1, "1", [step, attention]), saturated, 8)
    assert rows == 2 and gain < 1.5, "reading keys and values is shared by nobody"


def test_attention_reads_keys_and_values() -> None:
    step = Step("attention", "a", "", "cpu", (), 0, key_macs=2000, key_heads=4, key_bytes=1000)
    assert microseconds(step, 1, 1000, RATES) == pytest.approx(9 + 1e-3 * (2000 * 50 + 4 * 1000))
    assert microseconds(dataclasses.replace(step, key_bytes=10_000), 1, 1000, RATES) == pytest.approx(9 + 1000)
    assert cost.seen_keys(1, 512) == 512 and cost.seen_keys(8, 512) == 508.5
    assert cost.seen_keys(128, 128) == 128 and cost.seen_keys(512, 512) == 256.5 + 64


def test_estimates_grow_with_threads_and_say_what_they_are() -> None:
    one, two = (cost.estimate(threads, "avx2") for threads in (1, 2))
    assert "calibrate" in one.source and one.estimated
    for tokens in (1, 512):
        slow, fast = (microseconds(LINEAR, tokens, 0, rates) for rates in (one, two))
        assert slow is not None and fast is not None and fast < slow


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Calibrations that take a second, kept in an empty cache."""
    measure = calibration.calibrate_cpu
    monkeypatch.setattr(calibration, "POINT_S", 0.0)
    monkeypatch.setattr(calibration, "TRACED_RUNS", 2)
    monkeypatch.setattr(cost, "TOKENS", (1, 8, 16))
    monkeypatch.setattr(calibration, "calibrate_cpu", lambda: measure(("w4g32", "w8c", "w8a"), 8 << 20))
    monkeypatch.setenv("UNICORN_CACHE", "1")
    monkeypatch.setenv("UNICORN_CACHE_DIR", str(tmp_path / "new"))
    return tmp_path / "new"


def test_a_calibration_is_kept_for_this_machine_and_replaced(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration.rates().estimated
    run = CliRunner().invoke(app, ["calibrate", "--json"], catch_exceptions=False)
    found = json.loads(run.output)
    (file,) = short.glob("calibration/cpu-*.json")
    assert run.exit_code == 0 and found["files"] == {"cpu": str(file)}
    assert short.stat().st_mode & 0o77 == 0, "or the compile cache would not use it"
    rates = calibration.rates()
    assert not rates.estimated and rates.threads == torch.get_num_threads()
    assert set(rates.cold) == {"w4g32", "w8c", "w8a"} and set(rates.cold["w8c"]) == {1, 8, 16}
    assert all(us > 0 for table in rates.cold.values() for us in table.values())
    assert set(rates.cold_launch) == {"qkv", "attention", "ffn", "norm", "linear", "embedding"}
    assert rates == Rates.of_json(found["devices"]["cpu"])
    text = CliRunner().invoke(app, ["calibrate"]).output
    assert "w4g32" in text and "memory read" in text and len(list(short.glob("calibration/*"))) == 1

    stored = calibration.load("cpu", calibration.identity())
    assert stored is not None and 0 <= stored.age_s < 600
    assert calibration.load("cpu", {**calibration.identity(), "threads": 99}) is None
    file.write_text("{")
    assert calibration.rates().estimated, "a damaged file is as if there were none"
    monkeypatch.setenv("UNICORN_CACHE", "0")
    assert calibration.calibrate().files == {} and calibration.rates().estimated


def test_times_go_to_the_plan_whose_ops_they_are() -> None:
    decode, prompt = Plan(1, "1", [LINEAR, LINEAR]), Plan(2, "dynamic", [LINEAR, LINEAR])
    ours, other = "unicorn::linear", "unicorn::rms_norm"
    calls = [(ours, 9, 90.0), (ours, 1, 5.0), (other, 1, 1.0), (ours, 1, 1.0), (ours, 1, 2.0), (ours, 1, 3.0)]
    calls += [(ours, 1, 4.0), (ours, 1, 7.0)]  # the last one starts a call that did not end
    assign([decode, prompt], [Event(op, tokens, 0, us) for op, tokens, us in calls])
    assert prompt.measured == [Measured(0, 9, 0, 90.0, 1), Measured(1, 1, 0, 5.0, 1)]
    assert decode.measured == [Measured(0, 1, 0, 2.0, 2), Measured(1, 1, 0, 3.0, 2)]
    (folded,) = compare(decode, RATES)
    assert (folded.us, folded.count) == (2.5, 2) and folded.predicted_us == microseconds(LINEAR, 1, 0, RATES, True)


def test_explain_shows_predicted_and_measured_times(sample_ids: torch.Tensor, tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(make(), backend="unicorn")
    ids = sample_ids[:, :9]

    def generate() -> None:
        compiled.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)

    generate()
    before = str(unicorn_backend.explain(compiled))
    assert "us at 512" in before and "estimated" in before and "measured  " not in before
    with unicorn_backend.timed(compiled):
        generate()
    generate()  # not timed any more
    explanation = unicorn_backend.explain(compiled)
    assert "  measured   device  tokens  keys  us" in str(explanation)
    shown = json.loads(explanation.to_json())
    calls = {(m["kind"], m["tokens"]): m for plan in shown["plans"] for m in plan["measured"]}
    assert {kind for kind, tokens in calls if tokens == 1} == {"embedding", "qkv", "attention", "ffn", "norm", "linear"}
    assert ("ffn", 9) in calls and calls["attention", 9]["keys"] == 9 and 10 <= calls["attention", 1]["keys"] <= 12
    assert all(m["us"] > 0 and m["predicted_us"] > 0 for m in calls.values())
    steps = [step for plan in shown["plans"] for step in plan["steps"]]
    head = next(step for step in steps if step["kind"] == "linear")
    assert head["tokens"] == 1 and all(step["predicted_us"]["cpu"] > 0 for step in steps)
    ffn = next(step for step in steps if step["kind"] == "ffn")
    assert ffn["weights"] == [256 * 1024] * 3 and ffn["width"] == 256 + 1024 + 256

    memory = shown["memory"]
    assert 1e6 < memory["weights"] < 8e6 and memory["cache"] == measure.kv_bytes(compiled, 512) > 0
    assert memory["ram"] > memory["ram_free"] > 0 and "memory: weights" in before
    for ending, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        picture.draw(explanation, tmp_path / f"plan{ending}")
        assert (tmp_path / f"plan{ending}").read_bytes().startswith(start)
    with pytest.raises(OptionError, match=r"plan.pdf.*\.png or \.svg"):
        picture.draw(explanation, tmp_path / "plan.pdf")


def test_every_kind_of_region_has_a_colour(tmp_path: Path) -> None:
    kinds = {kind for kind, _ in OPS.values()}
    steps = [Step(kind, "a", "", "cpu", ("w4g32",), 512 * 288, weights=(512 * 512,)) for kind in kinds]
    picture.draw(Explanation("Model", (Plan(1, "1", steps),)), tmp_path / "plan.svg")
    assert all(f"<!-- {kind}, cpu -->" in (tmp_path / "plan.svg").read_text() for kind in kinds)


def test_memory_counts_a_region_once_and_warns_beyond_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    on_null = dataclasses.replace(LINEAR, device="null", weight_bytes=1000)
    plans = [Plan(1, "dynamic", [on_null]), Plan(2, "1", [on_null, dataclasses.replace(on_null, where="other")])]
    found = plan_memory(torch.nn.Linear(4, 4), plans)
    assert found.devices == {"null": (2000, 0)} and found.cache == 0 and found.weights == 80
    assert "null: 2.0 kB of weights" in str(found) and "swap" not in str(found)
    monkeypatch.setattr(measure, "ram", lambda: (50, 40))
    assert "will swap" in str(plan_memory(torch.nn.Linear(4, 4), []))


def test_doctor_tells_the_state_of_the_calibration(short: Path) -> None:
    assert (doctor.check_calibration().status, doctor.check_calibration().fix[:17]) == ("info", "unicorn calibrate")
    calibration.calibrate()
    check = doctor.check_calibration()
    assert check.status == "ok" and "0 days old, memory read" in check.found


def test_memory_of_a_container(tmp_path):
    """Limits of control groups count, of both versions and of groups around; cached files are free memory."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text("4000\n")
    (tmp_path / "a" / "memory.current").write_text("3000\n")
    (tmp_path / "a" / "memory.stat").write_text("anon 1900\nactive_file 600\ninactive_file 500\n")
    assert measure._group_limits("0::/a/b\n", tmp_path) == [(4000, 2100)]
    assert measure._group_limits("0::/\n", tmp_path) == []
    old = tmp_path / "memory"
    old.mkdir()
    for name, value in (("limit_in_bytes", 5000), ("usage_in_bytes", 1000)):
        (old / f"memory.{name}").write_text(f"{value}\n")
    (old / "memory.stat").write_text("cache 100\n")
    assert measure._group_limits("9:cpu:/\n8:memory:/docker/123\n", tmp_path) == [(5000, 4000)]
    total, available = measure.ram()
    assert 0 < available <= total
