r"""How many examples of a user to train on, from public or pilot data.

The group size G of ELS and ULS decides what is trained on. One that was chosen by
looking at the silo's own users would tell of them, and no accountant would count it.
The rules here read what is given to them: the sizes and the gradients of users who are
not protected, such as those of a public set, or of a pilot with consent. To pass the
silo's own is to publish what they say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median_low

import torch
from torch import nn

from flower_ext.client.half import trainable
from flower_ext.client.task import Batch, Task, example_losses
from flower_ext.client.users import side_by_side, user_column
from flower_ext.core.errors import at_least, open_unit, positive, refuse, whole
from flower_ext.privacy.accounting.calibration import noise_multiplier_for


def els_group_size(sizes: Sequence[int]) -> int:
    """Return the median number of examples of a user, rounded down: the rule for ELS.

    With a larger G every step needs more noise; with a smaller one examples are lost.
    The median is the rule of Charles et al. (2024).

    Parameters
    ----------
    sizes : sequence of int
        Examples of each user, of public or pilot data.

    Examples
    --------
    >>> els_group_size([1, 2, 3, 8, 100])
    3
    """
    return median_low(_sizes(sizes))


@dataclass(frozen=True)
class GradientMoments:
    r"""How gradients differ between users and within.

    Parameters
    ----------
    mean : float
        :math:`\|\mu\|^2`, the squared norm of the mean over users.
    between : float
        :math:`b^2`, the squared distance of a user's own mean from it, in the mean over
        users.
    within : float
        :math:`w^2`, the squared distance of an example's gradient from its user's mean.
    num_parameters : int
        d, coordinates of a gradient.
    """

    mean: float
    between: float
    within: float
    num_parameters: int

    def __post_init__(self) -> None:
        for name in ("mean", "between", "within"):
            at_least(name, getattr(self, name), 0)
        whole("num_parameters", self.num_parameters, 1)


def gradient_moments(
    task: Task, model: nn.Module, data: Batch, user: str = "user"
) -> GradientMoments:
    r"""Measure gradients on public or pilot data, one example at a time.

    With :math:`n_u` examples and the mean gradient :math:`\bar g_u` of each of U users,
    and the mean m of these means,

    .. math::
       w^2 = \frac{\sum_u \sum_i \|g_{ui} - \bar g_u\|^2}{\sum_u (n_u - 1)}, \quad
       v = \frac{\sum_u \|\bar g_u - m\|^2}{U - 1}, \quad
       b^2 = v - \frac{w^2}{U} \sum_u \frac{1}{n_u}, \quad
       \|\mu\|^2 = \|m\|^2 - \frac{v}{U},

    which are unbiased (analysis of variance); negative ones count as 0.

    Parameters
    ----------
    task, model
        What is trained; the model with the weights to measure at.
    data : dict of Tensor
        Examples of at least two users, one of whom has two.
    user : str (default: "user")
        The column of users.
    """
    users = user_column(data, user)
    order = side_by_side(users)
    counts = torch.unique_consecutive(users[order], return_counts=True)[1].tolist()
    if len(counts) < 2 or max(counts) < 2:
        refuse(
            "data",
            f"{len(order)} examples of {len(counts)} users",
            "of at least two users, one of whom has at least two examples",
        )
    trained = list(trainable(model).values())
    squares = of_means = weighted = 0.0
    total = torch.zeros(())
    for rows in torch.split(order, counts):
        mean = torch.zeros(())
        for row in rows:
            gradient = _gradient(task, model, trained, data, int(row))
            squares += float(gradient.square().sum())
            mean = mean + gradient / len(rows)
        of_means += float(mean.square().sum())
        weighted += len(rows) * float(mean.square().sum())
        total = total + mean
    num = len(counts)
    centre = float((total / num).square().sum())
    within = (squares - weighted) / (sum(counts) - num)
    spread = (of_means - num * centre) / (num - 1)
    return GradientMoments(
        mean=max(0.0, centre - spread / num),
        between=max(0.0, spread - within * fmean(1 / n for n in counts)),
        within=max(0.0, within),
        num_parameters=total.numel(),
    )


def _gradient(
    task: Task,
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    data: Batch,
    row: int,
) -> torch.Tensor:
    example = {name: column[row : row + 1] for name, column in data.items()}
    loss = example_losses(task, model, example).sum()
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    pieces = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(trained, found, strict=True)
    ]
    return torch.cat([g.reshape(-1).double().cpu() for g in pieces])


def uls_error(
    group_size: int,
    moments: GradientMoments,
    *,
    sizes: Sequence[int],
    num_users: int,
    examples_per_step: int,
    epsilon: float,
    delta: float,
    num_steps: int,
) -> float:
    r"""Return the expected squared error of a step of ULS, noise and all.

    A step may look at B examples. With :math:`\bar n_G` the mean over users of
    :math:`n_u(G) = \min(n_u, G)`, it draws :math:`M = \min(N, B / \bar n_G)` of the N
    users, each with probability :math:`q = M / N`. A user's gradient has the mean
    square

    .. math:: r_G^2 = \|\mu\|^2 + b^2 + w^2 \overline{1 / n_u(G)} .

    A clipping norm of :math:`r_G` scarcely clips. Then the step is off the mean
    :math:`\mu` over all possible users by

    .. math::
       E_G = \frac{b^2 + w^2 \overline{1 / n_u(G)}}{N} + \frac{(1 - q) r_G^2}{M}
       + \frac{d \sigma_q^2 r_G^2}{M^2},

    where the first term is because the silo has N users, the second because a step
    draws some of them (the variance of a Poisson sample's sum), the third is the noise
    in d coordinates, :math:`\sigma_q` the noise multiplier of the target at q. A larger
    G gives better gradients of fewer users. The signal-to-noise ratio of a step is
    :math:`\|\mu\|^2 / E_G`.

    Parameters
    ----------
    group_size : int
        G.
    moments, sizes
        See :func:`uls_group_size`.
    num_users, examples_per_step, epsilon, delta, num_steps
        See :func:`uls_group_size`.
    """
    kept = [min(size, whole("group_size", group_size, 1)) for size in _sizes(sizes)]
    users = whole("num_users", num_users, 1)
    drawn = min(users, positive("examples_per_step", examples_per_step) / fmean(kept))
    rate = drawn / users
    own = moments.between + moments.within * fmean(1 / n for n in kept)
    square = moments.mean + own
    noise = noise_multiplier_for(
        epsilon, delta, rounds=num_steps, sampling_probability=rate
    )
    of_noise = moments.num_parameters * noise**2 * square / drawn**2
    return own / users + (1 - rate) * square / drawn + of_noise


def uls_group_size(
    moments: GradientMoments,
    *,
    sizes: Sequence[int],
    num_users: int,
    examples_per_step: int,
    epsilon: float,
    delta: float,
    num_steps: int,
    candidates: Sequence[int] | None = None,
) -> int:
    r"""Return the G with the best signal-to-noise ratio of a step: a rule for ULS.

    The compute of a step is fixed, so that a larger G means fewer users; see
    :func:`uls_error` for what is weighed, and its derivation. Where the examples of a
    user are alike it is 1. Where they differ, and steps are large enough for sampling
    to hide little, it grows.

    Parameters
    ----------
    moments : GradientMoments
        Of public or pilot data, see :func:`gradient_moments`.
    sizes : sequence of int
        Examples of each user there.
    num_users : int
        N, the silo's users, which are public.
    examples_per_step : int
        B, examples whose gradients a step may compute. With G, ``batch-size`` is
        B / G users.
    epsilon, delta : float
        The target.
    num_steps : int
        Steps of all rounds.
    candidates : sequence of int, optional
        Group sizes to choose from; by default powers of two up to the largest size, and
        B.

    Notes
    -----
    The rule is ours: Charles et al. (2024) choose G for ULS by a signal-to-noise ratio
    as well; of theirs no more is used than the idea.
    """
    open_unit("delta", delta)
    most = min(max(_sizes(sizes)), whole("examples_per_step", examples_per_step, 1))
    if candidates is None:
        candidates = [2**i for i in range(most.bit_length())]
    if not candidates:
        refuse("candidates", candidates, "at least one group size")

    def error(group_size: int) -> float:
        return uls_error(
            group_size,
            moments,
            sizes=sizes,
            num_users=num_users,
            examples_per_step=examples_per_step,
            epsilon=epsilon,
            delta=delta,
            num_steps=num_steps,
        )

    return min(candidates, key=error)


def _sizes(sizes: Sequence[int]) -> list[int]:
    found = [whole("sizes", size, 1) for size in sizes]
    if not found:
        refuse("sizes", sizes, "at least one user's number of examples")
    return found
