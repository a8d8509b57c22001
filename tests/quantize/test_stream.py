"""Disk to disk: the same bytes as in memory, whatever the size of blocks and shards, and whatever interrupts."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.quantize.test_checkpoint import assert_same_state, vision_model
from unicorn_backend import UnicornConfig, quantization_report, quantize, quantize_checkpoint, recipes, verify
from unicorn_backend.errors import CheckpointError, OptionError, QuantizationError
from unicorn_backend.formats import safetensors
from unicorn_backend.formats.target import sharded
from unicorn_backend.models import TINY
from unicorn_backend.quantize import output, stream

REPORT = "quantization_report.json"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight takes several blocks."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 16384)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the embedded model, to damage."""
    return Path(shutil.copytree(TINY, tmp_path / "source"))


@pytest.mark.parametrize("recipe", recipes())
def test_same_bytes_as_in_memory(tiny: Any, tmp_path: Path, recipe: str, small_blocks: None) -> None:
    quantize_checkpoint(TINY, tmp_path / "streamed", recipe)
    quantize(tiny, recipe).save_pretrained(tmp_path / "saved")
    assert filecmp.cmp(tmp_path / "streamed/model.safetensors", tmp_path / "saved/model.safetensors", shallow=False)
    for name in ("config.json", "generation_config.json"):
        streamed, saved = (json.loads((tmp_path / folder / name).read_text()) for folder in ("streamed", "saved"))
        version = {"transformers_version": saved["transformers_version"]}  # of who wrote it: one is a copy
        assert streamed | version == saved, name
    assert_same_state(load(tmp_path / "streamed"), tiny)
    assert verify(tmp_path / "streamed") == []


def test_shards_of_any_size(tiny: Any, tmp_path: Path, small_blocks: None) -> None:
    TINY_shards = tmp_path / "float"
    tiny.save_pretrained(TINY_shards, max_shard_size="2MB")
    result = quantize_checkpoint(TINY_shards, tmp_path / "out", shard_bytes=1_000_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert verify(tmp_path / "out") == []
    assert_same_state(load(tmp_path / "out"), quantize(tiny))
    assert result == json.loads((tmp_path / "out" / REPORT).read_text())


def test_report_agrees_with_the_model(tiny: Any, tmp_path: Path) -> None:
    result = quantize_checkpoint("tiny", tmp_path / "out")
    quantize(tiny, keep_weights=True)
    rows = {row.name: row for row in quantization_report(tiny) if row.scheme != "float" and row.bytes_after}
    got = {row["name"].removesuffix(".weight"): row for row in result["weights"] if row["scheme"] != "float"}
    assert rows.keys() == got.keys()
    for name, row in rows.items():
        assert (row.scheme, row.bytes_before, row.bytes_after) == tuple(
            got[name][key] for key in ("scheme", "bytes_before", "bytes_after")
        )
        assert got[name]["sqnr_db"] == pytest.approx(row.sqnr_db, abs=1e-4)
    assert result["totals"]["bytes_after"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    # what a copy has lost is nothing, and JSON has no infinity
    assert {row["sqnr_db"] for row in result["weights"] if row["scheme"] == "float"} == {None}


def test_vision_model(tmp_path: Path, small_blocks: None) -> None:
    model = vision_model()
    model.save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out")
    quantize(model).save_pretrained(tmp_path / "saved")
    streamed, saved = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "saved")
    assert streamed.keys() == saved.keys()
    assert all(torch.equal(streamed[name], saved[name]) for name in saved)
    assert_same_state(type(model).from_pretrained(tmp_path / "out"), model)


def llama(**changes: Any) -> Any:
    config = LlamaConfig(
        vocab_size=70, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, **changes
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_untied_head_and_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama(tie_word_embeddings=False).to(dtype)
    model.save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", rules={"lm_head": "w4g32", r"layers\.1\.mlp": None})
    assert_same_state(load(tmp_path / "out"), quantize(model, rules={"lm_head": "w4g32", r"layers\.1\.mlp": None}))


def test_config_decides_the_dtype(tmp_path: Path) -> None:
    """fp32 files whose config says bf16: everything is rounded first, as from_pretrained does."""
    llama().save_pretrained(tmp_path / "float")
    path = tmp_path / "float" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    quantize_checkpoint(tmp_path / "float", tmp_path / "out")
    config = UnicornConfig()
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype="auto", quantization_config=config)
    assert_same_state(load(tmp_path / "out"), direct)


def test_rules_as_a_function(tmp_path: Path) -> None:
    result = quantize_checkpoint(
        "tiny", tmp_path / "out", rules=lambda name, module: "w8c" if name.endswith("down_proj") else None
    )
    schemes = {row["scheme"] for row in result["weights"] if "down_proj" in row["name"]}
    assert schemes == {"w8c"}
    load(tmp_path / "out")


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="exists"):
        quantize_checkpoint("tiny", tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()
    quantize_checkpoint("tiny", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists() and verify(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def change(source: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def poison(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-7] = value

    return edit


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (poison(UP, float("nan")), r"model\.safetensors: tensor '.*layers\.1\.mlp\.up_proj.*first at \[1023, 249\]"),
        (poison(NORM, float("inf")), r"model\.norm\.weight.*NaN or Inf, first at \[249\]"),
        (lambda t: t.pop(UP), r"no tensor for .*layers\.1\.mlp\.up_proj\.weight \(1 missing\)"),
        (lambda t: t.update({UP: t[UP][:5]}), r"up_proj\.weight' has shape \[5, 256\], the model has \[1024, 256\]"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), r"up_proj\.weight' is torch\.int8"),
        (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), "differs from .*ties them"),
    ],
)
def test_unusable_weights(source: Path, tmp_path: Path, edit: Any, message: str, small_blocks: None) -> None:
    change(source, edit)
    with pytest.raises((CheckpointError, QuantizationError), match=message):
        quantize_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_stored_copy_of_a_tied_head(source: Path, tmp_path: Path, tiny: Any) -> None:
    change(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    quantize_checkpoint(source, tmp_path / "out")
    assert_same_state(load(tmp_path / "out"), quantize(tiny))


def test_unusable_sources(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(quantized(tmp_path), tmp_path / "again")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        quantize_checkpoint(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(OptionError, match="int3"):
        quantize_checkpoint("tiny", tmp_path / "out", "int3")
    (source / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(CheckpointError, match=r"config\.json"):
        quantize_checkpoint(source, tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        quantize_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing/model.gguf", "no/such/place/at/all"])
def test_hub_that_cannot_be_reached(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: no such file or folder"):
        quantize_checkpoint(name, tmp_path / "out")


def test_memory_is_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    """No read is larger than a block (here less than the smallest matrix), and few are alive at a time."""
    sizes: list[int] = []
    real = safetensors.read_exactly

    def read_exactly(path: Path, offset: int, into: torch.Tensor, name: str) -> None:
        sizes.append(into.nbytes)
        real(path, offset, into, name)

    monkeypatch.setattr(safetensors, "read_exactly", read_exactly)
    result = quantize_checkpoint("tiny", tmp_path / "out")
    assert max(sizes) <= 2 * stream.BLOCK_BYTES < max(row["bytes_before"] for row in result["weights"]) / 10
    assert sum(sizes) == result["totals"]["bytes_before"], "every byte is read once"


def quantized(folder: Path) -> Path:
    quantize_checkpoint("tiny", folder / "quantized")
    return folder / "quantized"


def test_full_disk_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    real, calls = os.pwrite, []

    def pwrite(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) > 300:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(output.os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match=r"tensor '.*No space left on device; free some.*--resume"):
        quantize_checkpoint("tiny", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="another source, recipe or version"):
        quantize_checkpoint("tiny", tmp_path / "out", "q4", resume=True)
    quantize_checkpoint("tiny", tmp_path / "out", resume=True)
    assert verify(tmp_path / "out") == [] and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert filecmp.cmp(tmp_path / "out/model.safetensors", quantized(tmp_path) / "model.safetensors", shallow=False)


def test_too_small_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "SPARE_BYTES", 10**18)
    with pytest.raises(CheckpointError, match="GB are needed"):
        quantize_checkpoint("tiny", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be written"):
        quantize_checkpoint("tiny", tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


SLOWLY = """
import os, sys, time
from unicorn_backend.quantize import output, stream
stream.BLOCK_BYTES = 16384
real = output.Output.finish_weight
def finish_weight(self, record):
    real(self, record)
    print(record["name"], flush=True)
    time.sleep(0.01)
output.Output.finish_weight = finish_weight
stream.quantize_checkpoint("tiny", sys.argv[1], resume=True)
"""


def test_killed_twice_and_continued(tmp_path: Path) -> None:
    """SIGKILL in the middle leaves no target; the next run takes over what was finished, and only that."""
    out, whole = tmp_path / "out", quantized(tmp_path)
    for wanted in (10, 30):
        with subprocess.Popen([sys.executable, "-c", SLOWLY, str(out)], stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            for _ in range(wanted):
                assert run.stdout.readline()
            run.send_signal(signal.SIGKILL)
        assert not out.exists()
    journal = [json.loads(line) for line in (tmp_path / "out.partial" / output.JOURNAL).read_text().splitlines()]
    assert len(journal) - 1 >= 40, "the second run kept what the first had finished"
    damage(tmp_path / "out.partial" / "model.safetensors", next(iter(journal[1]["tensors"])), whole)
    quantize_checkpoint("tiny", out, resume=True)
    assert filecmp.cmp(out / "model.safetensors", whole / "model.safetensors", shallow=False)
    assert verify(out) == []


def damage(path: Path, name: str, whole: Path) -> None:
    """Flip a bit in the middle of tensor `name`, whose place is that of the finished file in `whole`."""
    from unicorn_backend.formats.safetensors import read_header

    tensor = read_header(whole / "model.safetensors")[name]
    with open(path, "r+b") as file:
        file.seek(tensor.offset + tensor.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))


def test_only_one_process_writes(tmp_path: Path) -> None:
    layout = sharded({"w": (torch.float32, (2,))}, 100)
    with output.Output(tmp_path / "out", layout, {}):
        with pytest.raises(CheckpointError, match="another process"):
            output.Output(tmp_path / "out", layout, {}).__enter__()


def test_verify_finds_every_change(tmp_path: Path) -> None:
    folder = quantized(tmp_path)
    name = "model.layers.3.mlp.gate_proj.weight_packed"
    damage(folder / "model.safetensors", name, folder)
    (problem,) = verify(folder)
    assert "model.safetensors" in problem and name in problem and "checksum" in problem
    report = json.loads((folder / REPORT).read_text())
    row = next(row for row in report["weights"] if name in row["tensors"])
    row["tensors"]["other"] = row["tensors"].pop(name)
    (folder / REPORT).write_text(json.dumps(report))
    assert len(verify(folder)) == 2
    (folder / REPORT).write_text('{"version": 1, "weights": [[]]}')
    with pytest.raises(CheckpointError, match="damaged"):
        verify(folder)
    (folder / REPORT).write_text('{"version": 7}')
    with pytest.raises(CheckpointError, match="version 7"):
        verify(folder)
    (folder / REPORT).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        verify(folder)


def test_files_beside_the_weights(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: gemma\nlanguage: en\n---\n# Original\n")
    (source / "tokenizer.model").write_bytes(b"spm")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "USE_POLICY.md").write_text("policy")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    quantize_checkpoint(source, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "tokenizer.model").read_bytes() == b"spm" and (out / "USE_POLICY.md").exists()
    assert (out / "additional_chat_templates" / "tools.jinja").exists()
    assert not (out / "pytorch_model.bin").exists()
    card = (out / "README.md").read_text()
    assert "license: gemma" in card and "Gemma Terms of Use" in card and "Original" not in card
    assert "Gemma Terms of Use" in (out / "NOTICE").read_text()


def test_a_rule_that_fits_nothing_is_said(tmp_path: Path) -> None:
    result = quantize_checkpoint("tiny", tmp_path / "out", rules={"up_prj": "w8c", r"layers\.0\.": "w8c"})
    assert result["notes"] == ["rule 'up_prj' fits no linear and no embedding"]
