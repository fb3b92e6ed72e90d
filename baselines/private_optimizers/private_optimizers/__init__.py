"""Private optimizers at equal epsilon, in one trust model or another."""
