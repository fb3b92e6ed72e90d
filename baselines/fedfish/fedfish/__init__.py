"""FedFish and FedAvg on Shakespeare, split by speaker."""
