"""Whose example is whose: users as units of privacy inside a silo."""

import torch
from torch import Tensor

from flower_ext.client.task import Batch, num_examples
from flower_ext.core.errors import refuse, whole


def keep_per_user(users: Tensor, most: int) -> Tensor:
    """Return the indices of the first ``most`` examples of every user, ascending.

    Parameters
    ----------
    users : Tensor
        Whose example it is, integers of shape ``(n,)``.
    most : int
        G, at least 1.

    Examples
    --------
    >>> keep_per_user(torch.tensor([7, 3, 7, 7, 3]), most=2)
    tensor([0, 1, 2, 4])
    """
    whole("most", most, 1)
    if users.ndim != 1 or users.is_floating_point() or users.is_complex():
        shown = f"{users.dtype} of shape {tuple(users.shape)}"
        refuse("users", shown, "integers of shape (n,)")
    order = torch.argsort(users, stable=True)
    ordered = users[order]
    places = torch.arange(len(users), device=users.device)
    new = torch.ones_like(places, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = torch.cummax(torch.where(new, places, 0), 0).values if len(users) else new
    return torch.sort(order[places - first < most]).values if len(users) else order


def side_by_side(users: Tensor) -> Tensor:
    """Return an order in which each user's examples are next to each other.

    Users come in the order of their first examples, and so do the examples of each.

    Parameters
    ----------
    users : Tensor
        Whose example it is, integers of shape ``(n,)``.

    Examples
    --------
    >>> side_by_side(torch.tensor([7, 3, 7, 7, 3]))
    tensor([0, 2, 3, 1, 4])
    """
    _, places = torch.unique(users, return_inverse=True)
    first = torch.full_like(users, len(users), dtype=torch.long)
    order = torch.arange(len(users), device=users.device)
    first.scatter_reduce_(0, places, order, "amin")
    return torch.argsort(first[places], stable=True)


def runs_of(users: Tensor) -> tuple[Tensor, Tensor]:
    """Return each example's user, counted from 0, and how many examples each one has.

    Parameters
    ----------
    users : Tensor
        As :func:`side_by_side` orders them.

    Raises
    ------
    ValueError
        If a user's examples are apart: each part would be clipped by itself.
    """
    values, places, counts = torch.unique_consecutive(
        users, return_inverse=True, return_counts=True
    )
    if len(torch.unique(values)) != len(values):
        # Without the values: they are of the silo's data.
        raise ValueError("the examples of a user must be side by side in the data")
    return places, counts


def num_users(data: Batch, user: str) -> int:
    """Return the number of users in the data, by the column that names them."""
    return len(torch.unique(user_column(data, user)))


def user_column(data: Batch, user: str) -> Tensor:
    """Return the column that says whose example it is, or say that there is none."""
    if user not in data:
        refuse("user", user, f"one of the data's columns {sorted(data)}")
    num_examples(data)  # the columns are as long as each other
    return data[user]
