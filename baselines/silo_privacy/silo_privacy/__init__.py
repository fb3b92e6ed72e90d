"""MR-MTL beside local and federated training in silos that are private."""
