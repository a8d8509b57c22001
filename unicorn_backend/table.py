"""Plain-text and Markdown tables from rows of strings."""

from __future__ import annotations

from collections.abc import Sequence


def text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces: the first left, the others right aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def padded(cells: Sequence[str]) -> str:
        right = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *right]).rstrip()

    return "\n".join(padded(line) for line in (header, *rows))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the same alignment."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def size(count: float) -> str:
    """Bytes in decimal units: 13.9 MB."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
