"""A client with a training loop of its own."""

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp


def plain_loop(task, *mods, rate, steps):
    """Make an app that takes plain full-batch steps and knows of no method."""
    app = ClientApp(mods=[*mods])

    @app.train()
    def train(msg, context):
        model = task.model({})
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        data, _ = task.data(context)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            task.loss(model, data).mean().backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": 1})
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

    return app
