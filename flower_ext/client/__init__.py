"""The client: tasks, client halves, trainers, personal state, and the ClientApp."""
