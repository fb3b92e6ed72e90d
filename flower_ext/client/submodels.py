"""Clients whose model is as large as they can take."""

from flwr.app import ConfigRecord, UserConfig
from torch import nn

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import Task
from flower_ext.client.tensors import Tensors
from flower_ext.core.errors import refuse
from flower_ext.core.submodels import WIDTH


class SubmodelClient(ClientHalf):
    """Trains and evaluates a model of the width that the server says.

    ``Task.model`` is called with the run's configuration, in which ``width`` is what
    the message says; the whole model is never made::

        def make_model(run_config):
            return Net(hidden=int(64 * run_config.get("width", 1.0)))
    """

    post_processing = True  # it sends what is trained

    def make_model(
        self, task: Task, run_config: UserConfig, config: ConfigRecord
    ) -> nn.Module:
        """Return the task's model of the width in the message."""
        width = config.get(WIDTH)
        if not isinstance(width, float):
            cause = "the strategy must be one that tells a width"
            refuse(f"config[{WIDTH!r}]", width, "a number", cause)
        return task.model({**run_config, WIDTH: width})

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Refuse arrays of another model than the task makes for this width."""
        width = local.number(WIDTH, 1.0)
        for name, own in local.model.state_dict().items():
            if name in arrays and arrays[name].shape != own.shape:
                refuse(
                    f"shape of {name!r} in Task.model",
                    tuple(own.shape),
                    f"{tuple(arrays[name].shape)} for width {width:g}",
                    f"Task.model must read run_config[{WIDTH!r}], and make the model "
                    "that the server's model(width) makes",
                )
        return arrays
