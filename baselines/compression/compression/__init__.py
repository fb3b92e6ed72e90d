"""Codecs of uploads on text by speaker."""
