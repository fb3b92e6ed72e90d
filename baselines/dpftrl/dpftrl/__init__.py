"""DP-FTRL's mechanisms beside DP-FedAvg at equal epsilon."""
