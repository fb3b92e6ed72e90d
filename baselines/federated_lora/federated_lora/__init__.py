"""Ways to average LoRA adapters, on mailing lists split by sender."""
