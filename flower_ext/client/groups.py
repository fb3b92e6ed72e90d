"""Groups that cut across clients: the group of each example, and the groups' losses."""

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from flower_ext.client.half import Local
from flower_ext.client.task import Batch, batches, losses_of, num_examples
from flower_ext.core.errors import refuse
from flower_ext.core.groups import COUNTS, LOSS_SUMS
from flower_ext.core.protocol import Metrics


def group_sums(
    losses: Tensor, groups: Tensor, num_groups: int
) -> dict[str, list[float]]:
    """Return the metrics that the server reads, for a training loop of one's own.

    Parameters
    ----------
    losses : Tensor of shape (examples,)
        Of the received model, before training.
    groups : Tensor of shape (examples,) or (examples, groups)
        Index of each example's constraint, ``group * num_labels + label`` if labels
        count; of groups that overlap, flags of those that it is of.
    num_groups : int
        Number of constraints.
    """
    _require_known("groups", groups, num_groups, overlapping=groups.dim() == 2)
    if groups.dim() == 2:
        # Behind the groups, all examples.
        flags = torch.cat([groups, groups.new_ones(len(groups), 1)], 1).cpu().double()
        return {
            LOSS_SUMS: (losses.detach().cpu().double() @ flags).tolist(),
            COUNTS: flags.sum(0).tolist(),
        }
    sums = torch.zeros(num_groups, dtype=torch.float64)
    sums.index_add_(0, groups.cpu(), losses.detach().cpu().double())
    counts = torch.bincount(groups.cpu(), minlength=num_groups)
    return {
        LOSS_SUMS: sums.tolist(),
        COUNTS: [float(count) for count in counts],
    }


def _require_known(
    name: str, indices: Tensor, size: int, *, overlapping: bool = False
) -> None:
    if overlapping:
        if indices.dtype != torch.bool or tuple(indices.shape[1:]) != (size,):
            found = f"{indices.dtype}{list(indices.shape)}"
            bound = f"torch.bool[examples, {size}], a flag for each group"
            refuse(name, found, bound, "the groups of the strategy overlap")
        return
    if indices.dtype != torch.int64 or indices.dim() != 1:
        found = f"{indices.dtype}{list(indices.shape)}"
        refuse(name, found, "int64 indices, one per example")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        refuse(
            name,
            [int(indices.min()), int(indices.max())],
            f"indices from 0 to {size - 1}",
            "a group or label that the strategy was not told of",
        )


class GroupIndex:
    """The group of every example: a column's, or that of a pair (group, label).

    Parameters
    ----------
    group, label : str
        Columns of the data with indices, int64.
    num_groups : int
        Groups, or pairs, that there are.
    num_labels : int
        Labels of which each makes a pair with each group; 0 does not look at labels.
    overlapping : bool (default: False)
        Whether the column of groups has flags of all groups, ``(examples, groups)``.
    """

    def __init__(
        self,
        group: str,
        label: str,
        num_groups: int,
        num_labels: int,
        overlapping: bool = False,
    ) -> None:
        self._overlapping = overlapping
        self._sizes = {group: num_groups // max(num_labels, 1)}
        if num_labels:
            self._sizes[label] = num_labels
        self._group, self._label = group, label
        self._num_groups, self._num_labels = num_groups, num_labels

    def __call__(self, batch: Batch) -> Tensor:
        """Return the indices of a batch, ``(batch,)``, or its flags."""
        index = batch[self._group]
        if self._num_labels:
            index = index * self._num_labels + batch[self._label]
        return index

    def added(self, values: Tensor, batch: Batch) -> Tensor:
        """Return for each example of a batch the sum of its groups' values."""
        index = self(batch)
        return index.to(values.dtype) @ values if self._overlapping else values[index]

    def sums(self, local: Local, data: Batch) -> Metrics:
        """Return each group's sum of losses of the client's model, and its examples.

        Raises
        ------
        ValueError
            If a column is missing, or has an index that is none of a group.
        """
        for column, size in self._sizes.items():
            if column not in data:
                refuse("column", column, f"one of the data's columns {sorted(data)}")
            overlaps = self._overlapping and column == self._group
            _require_known(
                f"column {column!r}", data[column], size, overlapping=overlaps
            )
        losses = losses_of(local.task, local.model, data)
        return {**group_sums(losses, self(data), self._num_groups)}


def mean_gradient(
    local: Local, objective: Callable[[Tensor, Batch], Tensor]
) -> ArrayRecord:
    """Return the gradient of an objective's mean over all training examples.

    Parameters
    ----------
    local : Local
        The client at work; its model stays as it is.
    objective : callable
        ``(losses, batch) -> values`` of shape ``(batch,)``, as of a client half.

    Returns
    -------
    ArrayRecord
        Of all floats of the model's state; zero where nothing is trained.
    """
    # In training BatchNorm would take the data into its statistics.
    was_training = local.model.training
    local.model.eval()
    local.model.zero_grad()
    for batch in batches(local.train, batch_size=256):
        losses = local.task.loss(local.model, batch)
        share = num_examples(batch) / num_examples(local.train)
        mean = objective(losses, batch).mean()
        (share * mean).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in local.model.named_parameters()}
    local.model.zero_grad()
    local.model.train(was_training)
    return ArrayRecord(
        {
            name: torch.zeros_like(x) if found.get(name) is None else found[name]
            for name, x in local.model.state_dict().items()
            if x.is_floating_point()
        }
    )
