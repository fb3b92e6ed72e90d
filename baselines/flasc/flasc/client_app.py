"""The client: one app for all methods; the server says what is trained."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flasc.dataset import client_data
from flasc.model import make_model
from flower_ext import client_app
from flower_ext.client.adapters import adapter_task
from flower_ext.strategies import FLASCClient

METHOD = "method"

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train what the method of the message trains."""
    # Made for each message, as the model depends on the method; its base is read once.
    name = str(message.content.config_records["config"][METHOD])
    task = adapter_task(make_model(name, context.run_config), client_data)
    return client_app(task, FLASCClient)(message, context)
