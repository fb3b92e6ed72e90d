"""Fair objectives, side by side, on schools as clients."""
