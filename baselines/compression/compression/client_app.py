"""The client: plain local training; the server says how the change travels."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from compression.dataset import sender_data, speaker_data
from compression.model import accuracy, loss, make_gru, make_lora
from flower_ext import Task, client_app
from flower_ext.client.adapters import classification_loss, classification_metrics

# By the run config's `data`.
TASKS = {
    "shakespeare": Task(make_gru, speaker_data, loss, accuracy),
    "mails": Task(make_lora, sender_data, classification_loss, classification_metrics),
}

# Made once: a worker keeps them from client to client.
APPS = {name: client_app(task) for name, task in TASKS.items()}

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the data of the run."""
    return APPS[str(context.run_config["data"])](message, context)
