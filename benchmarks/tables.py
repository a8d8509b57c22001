"""Write the tables of README.md and docs/quantization.md from the JSON in benchmarks/results/, between their markers.

    python benchmarks/tables.py            # rewrite
    python benchmarks/tables.py --check    # exit 1 if a table differs from its JSON

A block `<!-- table: NAME -->` ... `<!-- end -->` holds the table of benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from unicorn_backend import table

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("how-it-works.md", "planner.md", "quantization.md")))
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """`text` with every block replaced by the table of its file."""

    def fill(match: re.Match[str]) -> str:
        result = json.loads((ROOT / "benchmarks" / "results" / f"{match['name']}.json").read_text(encoding="utf-8"))
        kind = match["name"].split("-")[0]
        return f"{match[1]}{KINDS[kind](result)}\n{match[3]}"

    return BLOCK.sub(fill, text)


def decode(result: dict[str, Any]) -> str:
    """Speed of each system, with the ceiling that memory bandwidth sets for its bytes."""
    header = ("", "decode tok/s", "ceiling tok/s", "of bandwidth", "prefill tok/s", "MB per token", "weights")
    rows = [
        (
            row["name"] + (f" ({row['note']})" if row["note"] else ""),
            f"{row['decode_tok_s']['median']:.1f}" + _ratio(row["decode_ratio"]),
            "in cache" if row["in_cache"] else f"{row['ceiling_tok_s']:.1f}",
            "in cache" if row["in_cache"] else f"{row['bandwidth_share']:.0%}",
            f"{row['prefill_tok_s']['median']:.0f}" + _ratio(row["prefill_ratio"]),
            f"{sum(row['bytes_per_token'].values()) / 1e6:.1f}",
            table.size(row["model_bytes"]),
        )
        for row in result["systems"]
    ]
    band, where = result["bandwidth"], result["provenance"]
    caption = (
        f"{result['model']}, {result['weights']} weights, {result['parameters'] / 1e6:,.0f} M parameters; prompt "
        f"{result['prompt_tokens']}, {result['new_tokens']} new tokens; medians of {result['rounds']} interleaved "
        f"rounds. {_machine(where)}; memory read {band['lowest_gbps']:.1f} to "
        f"{band['highest_gbps']:.1f} GB/s around the runs."
    )
    return f"{caption}\n\n{table.markdown(header, rows)}"


def _machine(where: dict[str, Any]) -> str:
    return f"{where['cpu']}, {where['threads']} threads" + (", virtual machine" if where["virtual_machine"] else "")


def _ratio(value: float | None) -> str:
    return "" if value is None or value == 1 else f" ({value:.2f}x)"


def quality(result: dict[str, Any]) -> str:
    """What each recipe changes."""
    header = ("recipe", "weights", "KL divergence, nats", "same top-1 token", "perplexity")
    rows = [
        (
            f"`{row['recipe']}`",
            table.size(row["model_bytes"]),
            f"{row['kl_mean']:.5f} ± {row['kl_mean_se']:.5f}",
            f"{row['top1']:.1%} ± {row['top1_se']:.1%}",
            f"{row['perplexity']:.2f}",
        )
        for row in result["rows"]
    ]
    tokens, reference = result["rows"][0]["tokens"], result["rows"][0]["perplexity_reference"]
    caption = (
        f"{result['model']} against bf16 on {tokens} tokens of {result['text']} (bf16 perplexity {reference:.2f}); "
        "± is one standard error over blocks of tokens."
    )
    return f"{caption}\n\n{table.markdown(header, rows)}"


def quantize(result: dict[str, Any]) -> str:
    """Disk to disk."""
    row, totals = result["medians"], result["totals"]
    header = ("", "seconds", "of the input")
    rows = [
        ("unicorn quantize", f"{row['seconds']:.1f}", f"{row['gb_per_s']:.2f} GB/s"),
        (
            "copy the input, write the output",
            f"{row['disk_seconds']:.1f}",
            f"{totals['bytes_before'] / row['disk_seconds'] / 1e9:.2f} GB/s",
        ),
    ]
    caption = (
        f"{result['model']}, {table.size(totals['bytes_before'])} to {table.size(totals['bytes_after'])}, recipe "
        f"`{result['recipe']}`; medians of {len(result['rounds'])} rounds on one disk; peak memory "
        f"{table.size(row['above_idle_bytes'])} above the idle process. {_machine(result['provenance'])}."
    )
    return f"{caption}\n\n{table.markdown(header, rows)}"


def peers(result: dict[str, Any]) -> str:
    """GGUF files of ours and of llama.cpp."""
    header = ("GGUF file", "bits per weight in the layers", "KL divergence, nats", "same top-1 token")
    rows = [
        (
            row["name"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['kl_mean']:.5f} ± {row['kl_mean_se']:.5f}",
            f"{row['top1']:.1f}% ± {row['top1_se']:.1f}%",
        )
        for row in result["rows"]
    ]
    caption = (
        f"{result['model']} as GGUF, scored by llama-perplexity against its bf16 export on {result['text']}; the "
        "vocabulary table is Q8_0 in every file."
    )
    return f"{caption}\n\n{table.markdown(header, rows)}"


def sizes(result: dict[str, Any]) -> str:
    """Gigabytes of each recipe, and its bits per weight in the layers, of each size of model."""
    models = [row["model"].removeprefix("gemma3-").upper() for row in result["rows"]]
    header = ("recipe", *(f"{name}, GB" for name in models), *(f"{name}, bits" for name in models))
    rows = [
        (
            f"`{recipe}`",
            *(f"{row['recipes'][recipe]['bytes'] / 1e9:.2f}" for row in result["rows"]),
            *(_bits(row["recipes"][recipe]["bits"]) for row in result["rows"]),
        )
        for recipe in result["rows"][0]["recipes"]
    ]
    rows.append(("llama.cpp's Q4_K_M", *("" for _ in models), *(_bits(row["llama.cpp"]) for row in result["rows"])))
    return table.markdown(header, rows)


def _bits(bits: dict[str, float]) -> str:
    return f"{bits['layers']:.2f} ({bits['attention']:.2f}, {bits['ffn']:.2f})"


def models(result: dict[str, Any]) -> str:
    """Architectures by what is matched; those of which the same is true share a row."""
    header = ("model types", "attention", "q, k, v", "feed-forward", "experts", "left to single ops or torch", "tokens")
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in result["rows"]:
        cells = [_of_all(row, kind) for kind in ("attention", "qkv", "ffn", "experts")]
        verdict = row.get("tokens_fp32", row["tokens"])
        reasons = dict.fromkeys(f"{kind}: {reason}" for kind, reason, _ in row["left"]) | dict.fromkeys(row["notes"])
        groups.setdefault((*cells, "; ".join(reasons), verdict), []).append(row["model"])
    rows = [(", ".join(f"`{name}`" for name in names), *cells) for cells, names in groups.items()]
    return table.markdown(header, sorted(rows, key=lambda row: len(row[5])))


def _of_all(row: dict[str, Any], kind: str) -> str:
    taken, left = row["taken"].get(kind, 0), sum(count for what, _, count in row["left"] if what == kind)
    return "" if taken + left == 0 else "yes" if left == 0 else f"{taken} of {taken + left}"


def context(result: dict[str, Any]) -> str:
    """Decode with so many keys."""
    header = ("keys", "K/V", "ms per token", "slower than with few", "MB per token", "GB/s")
    rows = [
        (
            str(row["context"]),
            row["kv"],
            f"{row['step_ms']:.1f}",
            f"{row['slower_than_empty']:.1%}",
            f"{row['mb_per_token']:.0f}",
            f"{row['gb_s']:.1f}",
        )
        for row in result["rows"]
    ]
    caption = (
        f"{result['model']}, random weights and rows; medians over {result['rounds']} interleaved rounds. "
        f"{_machine(result['provenance'])}; memory read {' and '.join(f'{v:.1f}' for v in result['read_gb_s'])} GB/s "
        "before and after."
    )
    return f"{caption}\n\n{table.markdown(header, rows)}"


def disk(result: dict[str, Any]) -> str:
    """Decode with more weights than RAM has room for."""
    header = ("what comes next is read", "MB in the file", "MB read per token", "ms per token", "GB/s of the disk")
    rows = [
        (
            "ahead, a part is kept" if row["ahead"] else "on page faults, by the kernel",
            f"{row['in_file_mb']:.0f}",
            f"{row['read_mb_per_token']:.0f}",
            f"{row['token_ms']:.0f}",
            f"{row['read_mb_per_token'] / row['token_ms']:.2f}",
        )
        for row in result["rows"]
    ]
    read = sorted(result["disk_read_gb_s"])
    caption = (
        f"{result['model']}, random weights, {result['ram_limit_mb'] / 1e3:.1f} GB of RAM by a limit; medians over "
        f"{result['rounds']} processes each, in turn. {_machine(result['provenance'])}; the file read from its start, "
        f"cold: {read[0]:.2f} to {read[-1]:.2f} GB/s; the kernel reads {result['kernel_read_ahead_kb']} kB ahead."
    )
    return f"{caption}\n\n{table.markdown(header, rows)}"


def speculation(result: dict[str, Any]) -> str:
    """With and without drafts."""
    header = ("", "plain tok/s", "with drafts tok/s", "ratio", "drafts accepted")
    names = {"repetitive": "repeats its prompt, greedy", "fresh": "fresh text, temperature 1"}
    rows = [
        (
            names[kind],
            f"{row['plain_tok_s']:.0f}",
            f"{row['speculative_tok_s']:.0f}",
            f"{row['ratio']:.2f}x",
            f"{row['accepted']} of {row['drafted']}",
        )
        for kind, row in ((kind, result[kind]) for kind in names)
    ]
    where = _machine(result["provenance"])
    rounds = result["fresh"]["rounds"]
    return f"{result['model']}; medians of {rounds} interleaved pairs. {where}.\n\n{table.markdown(header, rows)}"


def serving(result: dict[str, Any]) -> str:
    """Requests at once, one after another and together."""
    header = ("requests at once", "one after another, tok/s", "together, tok/s", "ratio", "each of them, tok/s")
    rows = [
        (
            str(row["clients"]),
            f"{row['sequential_total_tok_s']:.1f}",
            f"{row['total_tok_s']:.1f}",
            f"{row['ratio']:.2f}x",
            f"{row['each_tok_s']:.1f}",
        )
        for row in result["rows"]
    ]
    caption = (
        f"{result['model']}; {result['prompt_tokens']} tokens of prompt and {result['new_tokens']} new ones each, "
        f"prompts in the time; medians of {result['rounds']} interleaved rounds. {_machine(result['provenance'])}."
    )
    return f"{caption}\n\n{table.markdown(header, rows)}"


def screening(result: dict[str, Any]) -> str:
    """What screening a head's rows reads, and takes, where no score stands out."""
    header = ("columns", "best scores", "of the head read", "read whole, ms", "screened, ms", "ratio", "copy")
    rows = [
        (
            str(row["columns"]),
            str(row["best"]),
            f"{row['read_share']:.0%}",
            f"{row['whole_ms']:.1f}",
            f"{row['screened_ms']:.1f}",
            f"{row['speedup']:.2f}x",
            table.size(row["copied_bytes"]),
        )
        for row in result["cases"]
    ]
    before, after = result["bandwidth_gbps"]
    caption = (
        f"{result['rows']:,} rows of random weights, random activations; medians of {result['rounds']} rounds of "
        f"{result['calls_per_round']} pairs. {_machine(result['provenance'])}; memory read {before:.1f} and "
        f"{after:.1f} GB/s before and after."
    )
    return f"{caption}\n\n{table.markdown(header, rows)}"


KINDS = {
    "screening": screening,
    "context": context,
    "disk": disk,
    "speculation": speculation,
    "serving": serving,
    "models": models,
    "peers": peers,
    "decode": decode,
    "quality": quality,
    "quantize": quantize,
    "sizes": sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = render(before)
        if check and before != after:
            sys.exit(f"{path.name}: tables differ from benchmarks/results/; run `make tables`")
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
