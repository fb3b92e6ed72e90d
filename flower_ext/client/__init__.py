"""The client: the task, what a strategy adds to its training, and the ClientApp."""
