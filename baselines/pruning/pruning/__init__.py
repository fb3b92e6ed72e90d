"""Server pruning on text by speaker: accuracy against bytes both ways."""
