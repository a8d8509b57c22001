"""File formats that checkpoints come in and go out."""
