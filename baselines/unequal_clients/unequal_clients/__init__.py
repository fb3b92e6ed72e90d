"""HeteroFL and FedConv where few clients can train the whole model."""
