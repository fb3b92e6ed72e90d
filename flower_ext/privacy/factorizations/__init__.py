"""How noise is correlated over rounds, and what that costs."""
