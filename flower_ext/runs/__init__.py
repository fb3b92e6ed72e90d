"""Whole runs: launching, comparing and reporting them."""
