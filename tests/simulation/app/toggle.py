"""A client that forgets in every other round what it knew."""

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext.simulation import packed

app = ClientApp(mods=[packed])


@app.train()
def toggle(message, context):
    """Report whether there was a state, and turn that round."""
    had = "x" in context.state
    if had:
        del context.state["x"]
    else:
        context.state["x"] = MetricRecord({"n": 1})
    metrics = MetricRecord({"had": int(had)})
    return Message(RecordDict({"m": metrics}), reply_to=message)
