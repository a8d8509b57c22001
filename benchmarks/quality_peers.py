"""Write benchmarks/results/peers-tiny.json: our GGUF files and llama.cpp's own, scored by llama.cpp.

Everything is measured by llama-perplexity's KL divergence against the bf16 export of the embedded model, so
text, tokens and arithmetic are the same for all. The vocabulary table is Q8_0 everywhere.

    python benchmarks/quality_peers.py --llama folder/with/llama-perplexity/and/llama-quantize
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from unicorn_backend import measure, models, quantize_checkpoint
from unicorn_backend.formats.gguf import read_header

RESULT = Path(__file__).parent / "results" / "peers-tiny.json"
CONTEXT = "256"
FIELDS = {
    "kl_mean": r"Mean\s+KLD:\s+([-\d.e]+) ±\s+([\d.e-]+)",
    "top1": r"Same top p:\s+([\d.]+) ±\s+([\d.]+)",
    "perplexity": r"Mean PPL\(Q\)\s+:\s+([\d.]+) ±\s+([\d.]+)",
}
# recipes of ours; name -> type of llama-quantize
OURS = ("q4", "hybrid", "q4_k_m", "default", "int8")
PEERS = {"llama.cpp Q4_0": "Q4_0", "llama.cpp IQ4_NL": "IQ4_NL", "llama.cpp Q4_K_M": "Q4_K_M", "llama.cpp Q8_0": "Q8_0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(Path(folder), arguments.llama)
    result = {"schema": 1, "model": "tiny", "text": "WikiText-2 test", "rows": rows, "provenance": measure.provenance()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


def _rows(folder: Path, llama: Path) -> list[dict[str, Any]]:
    # llama.cpp reads "<unk>" in a text as letters, transformers as the token
    text = folder / "text"
    text.write_text(models.SAMPLE_TEXT.read_text(encoding="utf-8").replace("<unk>", "thing"), encoding="utf-8")
    quantize_checkpoint("tiny", folder / "bf16", "none", format="gguf")
    reference, base = folder / "bf16/model.gguf", folder / "base"
    _perplexity(llama, reference, text, "--kl-divergence-base", str(base))
    files = {}
    for recipe in OURS:
        quantize_checkpoint("tiny", folder / recipe, recipe, rules={"embed_tokens": "w8a"}, format="gguf")
        files[f"unicorn {recipe}"] = folder / recipe / "model.gguf"
    for name, kind in PEERS.items():
        files[name] = folder / f"{kind}.gguf"
        command = [str(llama / "llama-quantize"), "--token-embedding-type", "q8_0"]
        subprocess.run([*command, str(reference), str(files[name]), kind], check=True, capture_output=True)
    return [_score(name, path, llama, text, base) for name, path in files.items()]


def _score(name: str, path: Path, llama: Path, text: Path, base: Path) -> dict[str, Any]:
    out = ""
    while not all(re.search(pattern, out) for pattern in FIELDS.values()):  # its log thread may lose the last lines
        out = _perplexity(llama, path, text, "--kl-divergence-base", str(base), "--kl-divergence")
    row: dict[str, Any] = {"name": name, "bits_per_weight": _bits(path)}
    for field, pattern in FIELDS.items():
        found = re.search(pattern, out)
        assert found, f"{field} is not in the output of llama-perplexity for {name}"
        row[field], row[f"{field}_se"] = float(found[1]), float(found[2])
    return row


def _bits(path: Path) -> float:
    """Bits per weight of the layers' matrices."""
    matrices = [t for t in read_header(path).tensors.values() if t.name.startswith("blk.") and len(t.shape) == 2]
    return 8 * sum(t.nbytes for t in matrices) / sum(t.numel for t in matrices)


def _perplexity(llama: Path, model: Path, text: Path, *options: str) -> str:
    command = [str(llama / "llama-perplexity"), "-m", str(model), "-f", str(text), "-c", CONTEXT, "--no-repack"]
    run = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    return run.stdout + run.stderr


if __name__ == "__main__":
    main()
