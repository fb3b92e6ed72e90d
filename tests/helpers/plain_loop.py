"""A client with a training loop of its own."""

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp


def plain_loop(task, *mods, rate, steps, by_hand=False, model_key="arrays"):
    """Make an app that takes plain full-batch steps and knows of no method.

    With ``by_hand`` it does without torch's optimizer.
    """
    app = ClientApp(mods=[*mods])

    @app.train()
    def train(msg, context):
        model = task.model({})
        model.load_state_dict(msg.content[model_key].to_torch_state_dict())
        data, _ = task.data(context)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            task.loss(model, data).mean().backward()
            if by_hand:
                model.w.data -= rate * model.w.grad
            else:
                optimizer.step()
        metrics = MetricRecord({"num-examples": 1})
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

    return app
