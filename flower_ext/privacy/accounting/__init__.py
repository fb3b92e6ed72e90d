"""From noise to (epsilon, delta), and back."""
