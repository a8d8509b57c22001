"""The command line, run as its user runs it: what it prints, its exit codes, and what it leaves on disk."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from unicorn_backend import __main__ as cli
from unicorn_backend import bench, doctor, hub, measure, models, table
from unicorn_backend.errors import CheckpointError, OptionError, UnicornError
from unicorn_backend.integration.screening import Saved

COMMANDS = (
    "demo",
    "run",
    "chat",
    "calibrate",
    "doctor",
    "download",
    "serve",
    "publish",
    "quantize",
    "verify",
    "eval",
    "explain",
    "bench",
)


@pytest.fixture(autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user, who compiles once: one folder for all tests of this file."""
    folder = tmp_path_factory.getbasetemp() / "compile-cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("UNICORN_CACHE", "1")
    monkeypatch.setenv("UNICORN_CACHE_DIR", str(folder))


def call(*args: str) -> str:
    result = CliRunner().invoke(cli.app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def call_json(*args: str) -> dict:
    return json.loads(call(*args, "--json"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    assert f"unicorn {command}" in call(command, "--help")


def test_run_continues_the_prompt() -> None:
    out = call_json("run", "The film is a", "-n", "8")
    assert out["tokens"] == 8 and out["text"].strip()


def test_run_streams_the_prompt_and_its_continuation() -> None:
    assert call("run", "The film is a", "-n", "4").lstrip().startswith("The film is a")


def test_run_and_bench_say_what_is_placed_where() -> None:
    null = "ffn x6 on null: no device: calls are recorded and run on the CPU"
    arguments = ("run", "The film is a", "-n", "4", "--device", "null")
    out = call_json(*arguments, "--policy", "fixed")
    assert null in out["placements"] and out["text"] == call_json("run", "The film is a", "-n", "4")["text"]
    assert call_json("run", "The film is a", "-n", "4")["placements"] == []
    streamed = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert null in streamed.stderr and "The film is a" in streamed.stdout
    benched = call_json("bench", "-p", "8", "-n", "2", "--rounds", "1", "--no-eager", "--device", "null")
    assert null in benched["placements"] and benched["devices"] == ["cpu", "null"] and benched["policy"] == "speed"
    for wrong in (("--device", "tpu"), ("--policy", "cheap")):
        with pytest.raises(OptionError, match="allowed are"):
            call("run", "x", "-m", "/no/such/model", *wrong)


def test_run_speculates_to_the_same_text() -> None:
    plain, fast = (call_json("run", "The film is a", "-n", "60", *extra) for extra in ((), ("--speculate",)))
    assert fast["text"] == plain["text"] and fast["accepted"] > 0
    assert fast["model_calls"] < plain["model_calls"] == 60


def test_run_as_a_chat_ends_with_the_turn() -> None:
    out = call_json("run", "Hello", "--chat", "-n", "40")
    assert "<end_of_turn>" not in out["text"] and out["finish"] in ("stop", "length")


def test_chat_from_a_pipe(tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    script = [
        "Hello",
        "And then?",
        "/undo",
        "/set temperature=x",
        "/set max_new_tokens=3",
        "/retry",
        "/stats",
        "/nonsense",
        f"/save {saved}",
        f"/save {tmp_path}",
        f"/load {saved}",
        "/help",
        "/clear",
        "/retry",
        "/exit",
    ]
    arguments = ["chat", "-n", "8", "--seed", "1", "--device", "null"]
    result = CliRunner().invoke(cli.app, arguments, "\n".join(script), catch_exceptions=False)
    out = result.output
    assert result.exit_code == 0, out
    said = (
        "tok/s",
        "reused",
        "forgotten",
        "error: /set: got 'x'",
        "max_new_tokens=3",
        "conversations kept",
        "on null: ",
    )
    for expected in said:
        assert expected in out, (expected, out)
    for expected in ("unknown command /nonsense", "2 messages in", "2 messages from", "error: /save", "no question"):
        assert expected in out.replace("\n", " "), (expected, out)
    assert [m["role"] for m in json.loads(saved.read_text())] == ["user", "assistant"]


def test_doctor_passes_here_and_prints_json() -> None:
    result = call_json("doctor")
    checks = {check["name"]: check for check in result["checks"]}
    assert result["ok"] and checks["native library"]["status"] == "ok"
    assert "GB/s" in checks["bandwidth"]["found"] and {"vulkan", "npu", "huge pages", "compile cache"} <= checks.keys()
    assert all(check["fix"] for check in checks.values() if check["status"] in ("warn", "fail"))
    assert "ready" in call("doctor")


def test_doctor_fails_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_product_error", lambda: (1.0, 1e-6))
    monkeypatch.setattr("sys.argv", ["unicorn", "doctor"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "wrong result" in doctor.check_native().found and doctor.check_native().fix


def test_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNICORN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o755)
    assert "chmod 700" in doctor.check_cache().fix
    monkeypatch.setitem(doctor.TESTED, "torch", "9.9")
    assert doctor.check_version("torch").status == "warn"


def test_download_lists_then_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(file_size=size, will_download=size > 10) for size in (5, 1000)]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, dry_run=False, **__: files if dry_run else "/models/x")
    assert call_json("download", "a/b", "--dry-run")["folder"] == ""
    out = call_json("download", "a/b")
    assert (out["folder"], out["files"], out["bytes"], out["fetched_bytes"]) == ("/models/x", 2, 1005, 1000)


def test_download_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        hub.download("google/gemma-3-1b-it")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="not a hub id"):
        hub.download("not/a/hub/id")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"No space left.*kept: run it again"):
        hub.download("a/b")


def test_publish_checks_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    call("quantize", "tiny", "-o", str(out))
    plan = call_json("publish", str(out), "--repo", "me/tiny-unicorn")
    assert plan["url"] == "" and {"model.safetensors", "README.md"} <= {name for name, _ in plan["files"]}
    assert "nothing was uploaded" in call("publish", str(out), "--repo", "me/tiny-unicorn")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        call("publish", str(out), "--repo", "me/tiny-unicorn", "--yes")
    with pytest.raises(CheckpointError, match="--repo"):
        call("publish", str(out), "--repo", "not/a/repo")
    sent: list[str] = []
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda _, repo, private, exist_ok: sent.append(f"{repo} {private}"))
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda _, **what: f"https://hub/{what['repo_id']}")
    assert call_json("publish", str(out), "--repo", "me/x", "--yes")["url"] == "https://hub/me/x"
    assert sent == ["me/x True"]
    (out / "README.md").unlink()
    with pytest.raises(CheckpointError, match="model card"):
        call("publish", str(out), "--repo", "me/x")


def test_sampling_repeats_with_its_seed() -> None:
    first, again, other = (call_json("run", "The film", "-n", "12", "-t", "1", "--seed", s)["text"] for s in "112")
    assert first == again != other


def test_quantize_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "folder" / "quantized"
    report = call_json("quantize", "tiny", "-o", str(out))
    assert report["totals"]["bytes_after"] < 0.6 * report["totals"]["bytes_before"]
    assert [p.name for p in out.parent.iterdir()] == ["quantized"], "temporary folders left behind"
    direct, loaded = (call_json("run", "The film is a", "-n", "16", "-m", m) for m in ("tiny", str(out)))
    assert direct["text"] == loaded["text"]
    assert call_json("verify", str(out))["problems"] == []


def test_quantize_with_rules(tmp_path: Path) -> None:
    rules = ["--rule", r"layers\.0\.=float", "--rule", "down_proj=w8c"]
    report = call_json("quantize", "tiny", "-o", str(tmp_path / "out"), *rules)
    schemes = {row["name"]: row["scheme"] for row in report["weights"]}
    assert schemes["model.layers.0.mlp.up_proj.weight"] == "float"
    assert schemes["model.layers.1.mlp.down_proj.weight"] == "w8c"
    with pytest.raises(UnicornError, match="REGEX=SCHEME"):
        call("quantize", "tiny", "-o", str(tmp_path / "other"), "--rule", "down_proj")


def test_quantize_with_a_calibration_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(models.SAMPLE_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    report = call_json("quantize", "tiny", "-o", str(tmp_path / "out"), "--calibration", str(tmp_path / "text"))
    assert report["calibration"]["text"] == "text"
    assert call_json("verify", str(tmp_path / "out"))["problems"] == []


def test_eval_and_its_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (tmp_path / "text").write_text(models.SAMPLE_TEXT.read_text(encoding="utf-8")[:2500], encoding="utf-8")
    report = call_json("quantize", "tiny", "-o", str(out), "--eval", "--text", str(tmp_path / "text"))
    again = call_json("eval", str(out), "--reference", "tiny", "--text", str(tmp_path / "text"))
    assert again == report["quality"] == json.loads((out / "quantization_report.json").read_text())["quality"]
    assert again["top1"] > 0.95 and 0 < again["kl_mean"] < 1e-3 and again["kl_mean_se"] > 0
    assert call_json("verify", str(out))["problems"] == []
    arguments = ["eval", str(out), "--reference", "tiny", "--text", str(tmp_path / "text"), "--min-top1", "0.9999"]
    monkeypatch.setattr("sys.argv", ["unicorn", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    with pytest.raises(OptionError, match="readable UTF-8"):
        call("eval", str(out), "--reference", "tiny", "--text", str(out))


def test_verify_fails_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    call("quantize", "tiny", "-o", str(out))
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    monkeypatch.setattr("sys.argv", ["unicorn", "verify", str(out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1


def test_quantize_keeps_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UnicornError, match="--overwrite"):
        call("quantize", "tiny", "-o", str(tmp_path))
    assert (tmp_path / "mine").read_text() == "keep"


def test_explain_shows_both_graphs() -> None:
    plans = call_json("explain")["plans"]
    assert len(plans) >= 2
    assert all(any(step["kind"] == "ffn" for step in plan["steps"]) for plan in plans)


def test_explain_places_measures_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    found = call_json("explain", "--device", "null", "--policy", "fixed", "--measure", "9", "--plot", str(picture))
    measured = {(m["kind"], m["device"], m["tokens"]) for plan in found["plans"] for m in plan["measured"]}
    assert {("ffn", "null", 1), ("ffn", "null", 9), ("norm", "cpu", 1)} <= measured and picture.stat().st_size > 10_000
    assert found["memory"]["devices"]["null"][0] > 1e6


def test_bench_measures_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    args = ("bench", "-p", "16", "-n", "4", "--rounds", "2", "--context", "40", "--output", str(out))
    text = call(*args, "--also", "q4")
    result = json.loads(out.read_text())
    ours, smaller, eager = result["systems"]
    assert (ours["name"], smaller["name"], eager["name"]) == ("unicorn", "unicorn, q4", "eager bf16")
    assert smaller["bytes_per_token"]["weights"] < ours["bytes_per_token"]["weights"]
    assert len(ours["decode_tok_s"]["all"]) == 2
    assert ours["bytes_per_token"]["weights"] < 0.6 * eager["bytes_per_token"]["weights"]
    assert ours["decode_ratio"] > 0 and eager["decode_ratio"] == 1
    assert result["provenance"]["torch"] and result["bandwidth"]["ceiling_gbps"] > 0
    assert "unicorn" in text and "eager bf16" in text
    (at,) = result["contexts"]
    assert at["prompt_tokens"] == 40
    assert [row["name"] for row in at["systems"]] == ["unicorn", "unicorn, q4", "eager bf16"]
    assert all(row["first_token_s"] > 0 and row["decode_tok_s"] > 0 for row in at["systems"])
    result["recipe"], result["systems"][0]["decode_tok_s"]["median"] = "q4", ours["decode_tok_s"]["median"] * 2
    (tmp_path / "other.json").write_text(json.dumps(result))
    compared = call_json("bench", "--compare", str(out), str(tmp_path / "other.json"))
    assert compared["systems"][0]["decode"] == pytest.approx(2) and compared["systems"][0]["same_logits"]
    assert compared["differs"] == ["recipe: default and q4"] and compared["bandwidth"] == 1
    assert "2.00x" in call("bench", "--compare", str(out), str(tmp_path / "other.json"))
    with pytest.raises(OptionError, match="no result of"):
        call("bench", "--compare", str(out), str(tmp_path / "missing.json"))


def test_bench_runs_a_peer(tmp_path: Path) -> None:
    program, gguf = tmp_path / "llama-bench", tmp_path / "model.gguf"
    runs = [{"n_prompt": 16, "n_gen": 0, "avg_ts": 100.0}, {"n_prompt": 0, "n_gen": 4, "avg_ts": 25.0}]
    program.write_text(f"#!/bin/sh\necho '{json.dumps(runs)}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    gguf.write_bytes(bytes(1000))
    args = ("bench", "-p", "16", "-n", "4", "--rounds", "1", "--gguf", str(gguf))
    peers = ("--peer", f"one={program}", "--peer", f"two={program} --option 1")
    systems = call_json(*args, *peers, "--no-eager")["systems"]
    assert [system["name"] for system in systems] == ["unicorn", "one", "two"]
    row = systems[-1]
    assert row["model_bytes"] == 1000
    assert row["decode_tok_s"]["median"] == 25 and row["prefill_tok_s"]["median"] == 100


def test_a_peer_brings_its_own_model(tmp_path: Path) -> None:
    folder = tmp_path / "other-format"
    folder.mkdir()
    (folder / "model.bin").write_bytes(bytes(700))
    (folder / "model.xml").write_bytes(bytes(50))
    script = tmp_path / "like_llama_bench.py"
    script.write_text(
        "import json, sys\n"
        "a = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        f"assert a['-m'] == {str(folder)!r} and sys.argv.count('-m') == 1, sys.argv\n"
        "print(json.dumps([{'n_prompt': 3, 'n_gen': 0, 'avg_ts': 8 * int(a['-p'])},"
        " {'n_prompt': 0, 'n_gen': 2, 'avg_ts': int(a['-n'])}]))\n"
    )
    peer = bench.Peer.parse(f"other={sys.executable} {script} --x 1 -m {folder}", None)
    assert peer.run(3, 2) == measure.Timing(24.0, 2.0)
    assert peer.model_bytes == 750
    assert peer.note == "like_llama_bench.py --x 1 other-format"  # no path of this machine in a published result


def test_peer_errors_say_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="NAME=PROGRAM"):
        bench.Peer.parse("ollama", None)
    with pytest.raises(OptionError, match="NAME=PROGRAM"):
        bench.Peer.parse("ollama=/no/such/program", None)
    with pytest.raises(OptionError, match="--gguf"):
        bench.Peer.parse("llama-bench=/bin/true", tmp_path / "missing.gguf")
    with pytest.raises(OptionError, match="after -m"):
        bench.Peer.parse(f"llama-bench=/bin/true -m {tmp_path}/missing", None)
    with pytest.raises(UnicornError, match="no usable result"):
        bench.Peer("true", ("/bin/true",), tmp_path).run(1, 1)
    with pytest.raises(UnicornError, match="exit code 3: no such model"):
        bench.Peer("sh", ("/bin/sh", "-c", "echo no such model >&2; exit 3"), tmp_path).run(1, 1)


@pytest.mark.parametrize("args", [("run", "x", "-m", "/no/such/model"), ("run", "x", "-r", "w3")])
def test_errors_are_one_line_and_exit_code_2(args: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "unicorn_backend", *args], capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr


def test_weight_bytes_counts_a_tied_table_once(tiny: Any) -> None:
    assert measure.weight_bytes(tiny) == measure.model_bytes(tiny)


def test_weight_bytes_leaves_out_an_untied_table(make_tiny: Callable[[], Any]) -> None:
    model = make_tiny()
    table_bytes = model.get_input_embeddings().weight.nbytes
    tied = measure.weight_bytes(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    assert measure.weight_bytes(model) == tied
    assert measure.model_bytes(model) == tied + table_bytes


def test_kv_bytes_stop_growing_at_the_window(tiny: Any) -> None:
    # 2 KV heads x 64 x (key, value) x 2 bytes = 512 per layer and token; 4 of 6 layers have a window of 128.
    assert measure.kv_bytes(tiny, 100) == 512 * 6 * 100
    assert measure.kv_bytes(tiny, 1000) == 512 * (4 * 128 + 2 * 1000)
    compiled = torch.compile(tiny, backend="unicorn", options={"kv": "int8"})
    assert measure.kv_bytes(compiled, 100) == 2 * 2 * (64 + 4) * 6 * 100


def test_kv_bytes_of_layers_that_differ() -> None:
    from transformers import Gemma4TextConfig, Mamba2Config

    config = Gemma4TextConfig(num_hidden_layers=6)  # 5 sliding layers of head width 256, then one of 512
    model = types.SimpleNamespace(config=config)
    heads = [layer.num_key_value_heads for layer in config.per_layer_config]
    expected = 4 * 10 * (256 * sum(heads[:5]) + 512 * heads[5])
    assert measure.kv_bytes(model, 10) == expected
    assert measure.kv_bytes(types.SimpleNamespace(config=Mamba2Config()), 10) == 0


def test_share_above_the_ceiling_is_a_bug() -> None:
    size = 10**12  # far beyond any cache
    system = bench.System("fake", lambda: None, None, size, size)
    time = measure.Timing(1.0, 1.0)
    for share, bug in ((1.04, False), (1.06, True)):
        runs = [(time, 1000 / share), (time, 9000.0), (time, 1000 / share)]
        row = bench._row(system, runs, 0, None, Saved(), Saved())
        assert row["is_bug"] is bug and abs(row["bandwidth_share"] - share) < 1e-9


def test_interleave_alternates_the_order() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    assert measure.interleave(runs, 2) == {"a": [None, None], "b": [None, None]}
    assert order == ["a", "b", "b", "a"]


def test_random_models_have_the_true_shapes() -> None:
    config = models.random.config("gemma3-1b")
    assert config.layer_types.count("full_attention") == 4 and config.layer_types[5] == "full_attention"
    model = models.random.random_model("gemma3-1b", num_hidden_layers=2, vocab_size=4096)
    with torch.inference_mode():
        logits = model(models.sample_ids(16)).logits
    assert logits.isfinite().all() and 0.3 < float(logits.float().std()) < 3


def test_tables() -> None:
    assert table.text(("", "n"), [("a", "1"), ("bb", "10")]) == "     n\na    1\nbb  10"
    assert table.markdown(("x", "n"), [("a", "1")]) == "| x | n |\n| --- | ---: |\n| a | 1 |"
    assert [table.size(n) for n in (5, 13.9e6, 2.5e9)] == ["5 B", "13.9 MB", "2.50 GB"]
