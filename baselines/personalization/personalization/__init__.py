"""Personal models on images with label skew and on text by speaker."""
