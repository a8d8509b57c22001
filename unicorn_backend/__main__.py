"""Command line: `unicorn` or `python -m unicorn_backend`.

Errors of this package end in one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

import unicorn_backend
from unicorn_backend import bench as benchmark
from unicorn_backend import demo as demonstration
from unicorn_backend import measure, models, table
from unicorn_backend.errors import CheckpointError, UnicornError

EXPLAIN_TOKENS = 8
"""`explain` runs one prompt of this length and one decode step, so that it shows both graphs."""

app = typer.Typer(
    name="unicorn",
    help="Run stock Hugging Face language models quantized, through torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Local folder, hub id, tiny, gemma3-1b or gemma3-4b.")]
Recipe = Annotated[str, typer.Option("--recipe", "-r", help="Quantization recipe.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the speed comparison.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Quantize the embedded model, generate with it, and show size, speed and fidelity.

    Example: `unicorn demo`
    """
    result = demonstration.demo(rounds)
    typer.echo(json.dumps(result, indent=2) if as_json else demonstration.report(result))


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = "tiny",
    recipe: Recipe = "default",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """Continue PROMPT; the text appears as it is generated.

    Examples: `unicorn run "The film is a"`, `unicorn run --chat -m google/gemma-3-4b-it "What is a unicorn?"`
    """
    tokenizer = models.load_tokenizer(model)
    ids = _encode(tokenizer, prompt, chat)
    compiled: Any = torch.compile(models.load(model), backend="unicorn", options={"recipe": recipe})
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    if not as_json:
        settings["streamer"] = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    torch.manual_seed(seed)
    output = compiled.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
    if as_json:
        text = tokenizer.decode(output, skip_special_tokens=True)
        typer.echo(json.dumps({"prompt": prompt, "text": text, "tokens": len(output)}))


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Local folder, hub id, or tiny.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    recipe: Recipe = "default",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a quantized checkpoint that `from_pretrained` loads without repacking.

    The folder appears complete or not at all.

    Example: `unicorn quantize google/gemma-3-4b-it -o gemma-3-4b-unicorn`
    """
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists; give another folder or --overwrite")
    model, tokenizer = models.load(source), models.load_tokenizer(source)
    before = measure.model_bytes(model)
    unicorn_backend.quantize(model, recipe=recipe)
    _save(out, model, tokenizer)
    after = measure.model_bytes(model)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "recipe": recipe, "bytes_before": before, "bytes_after": after}))
    else:
        typer.echo(f"{out}: {table.size(before)} -> {table.size(after)} ({after / before:.0%}), recipe {recipe}")


@app.command()
def explain(model: Model = "tiny", recipe: Recipe = "default", as_json: AsJson = False) -> None:
    """Show what the backend takes of a model, what it leaves to plain torch, and why.

    Example: `unicorn explain -m google/gemma-3-4b-it`
    """
    compiled: Any = torch.compile(models.load(model), backend="unicorn", options={"recipe": recipe})
    ids = models.sample_ids(EXPLAIN_TOKENS, model)
    compiled.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    explanation = unicorn_backend.explain(compiled)
    typer.echo(explanation.to_json() if as_json else str(explanation))


@app.command()
def bench(
    model: Model = "tiny",
    recipe: Recipe = "default",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0 leaves torch's choice.")] = 0,
    eager: Annotated[bool, typer.Option("--eager/--no-eager", help="Compare with eager bf16.")] = True,
    peer: Annotated[str, typer.Option(metavar="llama-bench=PATH", help="Compare with an external program.")] = "",
    gguf: Annotated[Path | None, typer.Option(help="Model file of the peer.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second next to the memory ceiling and to eager bf16, interleaved.

    Examples: `unicorn bench`, `unicorn bench -m gemma3-1b -p 512 -n 128 --output 1b.json`,
    `unicorn bench -m gemma3-1b --peer llama-bench=./llama-bench --gguf gemma-3-1b-q4_0.gguf`
    """
    if threads:
        torch.set_num_threads(threads)
    work = benchmark.Workload(model, prompt_tokens, new_tokens, rounds, recipe)
    result = benchmark.bench(work, eager=eager, peer=benchmark.Peer.parse(peer, gguf) if peer else None)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result, indent=2) if as_json else benchmark.report(result))


def _encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids [1, T] of a prompt, as plain text or as the user's turn of a chat."""
    if not chat:
        ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
        return ids
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return ids


def _save(out: Path, model: Any, tokenizer: Any) -> None:
    """Write beside `out`, then rename: a reader never sees half a checkpoint."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        new, old = Path(folder) / "new", Path(folder) / "old"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if out.exists():
            os.replace(out, old)
        os.replace(new, out)


def main() -> None:
    """Entry point of the `unicorn` script."""
    transformers_logging.disable_progress_bar()
    try:
        app()
    except UnicornError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
