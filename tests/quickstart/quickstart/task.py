"""Model, data and training loop: nothing in here knows of a strategy."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small classifier."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        """Return logits."""
        return self.body(x)


def load_data(partition_id, num_partitions, batch_size):
    """Return the loaders of one client; the data is made up."""
    generator = torch.Generator().manual_seed(partition_id)
    x = torch.randn(100, 8, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > partition_id / num_partitions).long()
    train, test = TensorDataset(x[:80], y[:80]), TensorDataset(x[80:], y[80:])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def train(net, trainloader, epochs, lr, device):
    """Train in place and return the mean loss."""
    net.to(device)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    total = 0.0
    for _ in range(epochs):
        for x, y in trainloader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(trainloader))


@torch.no_grad()
def test(net, testloader, device):
    """Return mean loss and accuracy."""
    net.to(device)
    net.eval()
    loss, hits, count = 0.0, 0, 0
    for x, y in testloader:
        logits = net(x.to(device))
        loss += nn.functional.cross_entropy(logits, y.to(device), reduction="sum")
        hits += int((logits.argmax(1) == y.to(device)).sum())
        count += len(y)
    return float(loss) / count, hits / count
