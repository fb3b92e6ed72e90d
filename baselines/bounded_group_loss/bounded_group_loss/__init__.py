"""Bounded group loss on Adult, split by occupation."""
