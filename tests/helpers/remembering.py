"""Clients whose answers are worked out once."""

import pickle

from flwr.app import Message
from flwr.clientapp import ClientApp


class Remembering(ClientApp):
    """Answers what it was asked before as then: message, context and state the same."""

    def __init__(self, app):
        super().__init__()
        self._app = app
        self._known = {}

    def __call__(self, message, context):
        asked = message.metadata.message_type, message.content
        of = context.node_config, context.run_config, context.state
        key = pickle.dumps((asked, of))
        if key not in self._known:
            reply = self._app(message, context)
            if reply.has_error():
                return reply
            self._known[key] = pickle.dumps((reply.content, context.state))
        content, context.state = pickle.loads(self._known[key])
        return Message(content, reply_to=message)
