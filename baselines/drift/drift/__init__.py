"""Methods against client drift on images with label skew, over local epochs."""
