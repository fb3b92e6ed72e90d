"""MaxFL and FedAvg on Fashion-MNIST with label skew, and where clients conflict."""
