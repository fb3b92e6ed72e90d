"""DiLoCo, its streaming and MuLoCo, on a small language model of characters."""
