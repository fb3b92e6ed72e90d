"""MaxFL and FedAvg on Fashion-MNIST with label skew."""
