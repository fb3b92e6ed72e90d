"""The clients of the simulation benchmark in Apple's pfl; run by a Python that has it.

``PYTHON _pfl.py MODEL CLIENTS COHORT ROUNDS WARM``, or by ``torchrun`` for two.
"""

import json
import os
import resource
import sys
import time

# Before the imports, since the start of a run is measured with them.
BEGUN = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _models import make_model  # noqa: E402
from pfl.aggregate.simulate import SimulatedBackend  # noqa: E402
from pfl.algorithm.base import NNAlgorithmParams  # noqa: E402
from pfl.algorithm.federated_averaging import FederatedAveraging  # noqa: E402
from pfl.callback.base import TrainingProcessCallback  # noqa: E402
from pfl.data.dataset import Dataset  # noqa: E402
from pfl.data.federated_dataset import FederatedDataset  # noqa: E402
from pfl.data.sampling import get_user_sampler  # noqa: E402
from pfl.hyperparam import NNTrainHyperParams  # noqa: E402
from pfl.metrics import Metrics, Weighted  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402
from torch import nn  # noqa: E402

EXAMPLES, BATCH, LEARNING_RATE = 50, 10, 0.1


class Images(nn.Module):
    """The model, with the two functions that pfl asks for."""

    def __init__(self, name):
        super().__init__()
        self.net = make_model(name)

    def loss(self, x, y, eval=False):  # noqa: A002
        """Return the mean loss."""
        return nn.functional.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x, y, eval=False):  # noqa: A002
        """Return nothing of interest."""
        return {"loss": Weighted(0.0, len(y))}


class Clock(TrainingProcessCallback):
    """Takes the time at the end of every round."""

    def __init__(self):
        self.times = []
        self.cpu = []

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Note the time."""
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())
        return False, Metrics()


def main():
    """Run and print what was measured."""
    name, clients, cohort, rounds, warm = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002  pfl draws its cohorts from it
    data = {}

    def user(client):
        if client not in data:
            generator = torch.Generator().manual_seed(int(client))
            data[client] = (
                torch.randn(EXAMPLES, 1, 28, 28, generator=generator),
                torch.randint(0, 10, (EXAMPLES,), generator=generator),
            )
        return Dataset(raw_data=data[client], user_id=str(client))

    dataset = FederatedDataset(user, get_user_sampler("random", list(range(clients))))
    module = Images(name)
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), 1.0),
    )
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**6,
            train_cohort_size=cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=dataset, val_data=dataset),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=LEARNING_RATE,
            local_batch_size=BATCH,
        ),
        model_eval_params=None,
        callbacks=[clock],
    )
    # The first rounds allocate memory and initialise libraries: they are left out.
    steps = np.diff(clock.times)[warm:]
    found = {
        "seconds": float(np.median(steps)),
        "cpu": (clock.cpu[-1] - clock.cpu[warm]) / (len(clock.cpu) - 1 - warm),
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "start": clock.times[0] - BEGUN,
    }
    print(json.dumps({"rank": int(os.environ.get("RANK", 0)), **found}), flush=True)


if __name__ == "__main__":
    main()
