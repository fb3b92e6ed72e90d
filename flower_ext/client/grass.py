r"""Grass: an optimizer that trains, and keeps moments of, a few rows of each matrix.

Of a matrix W of m rows and n columns, with the gradient G, r rows are chosen, as
:math:`P^T = \rho B`: B picks rows, and the diagonal :math:`\rho` multiplies them. Adam,
or another optimizer, steps in the space of the r rows, and its step goes back:

.. math::
   W \leftarrow W - \eta\,\alpha\, P\, \mathrm{Adam}(P^T G)

(Muhamed, Li, Woodruff, Diab and Smith 2024, "Grass: Compute efficient low-memory LLM
training with structured sparse gradients", arXiv:2406.17660.) Every so many steps rows
are chosen anew, and the moments begin at zero.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flower_ext.client.task import LocalOptimizer, MakeOptimizer
from flower_ext.core.errors import positive, refuse, whole
from flower_ext.core.typing import Floats
from flower_ext.wire.rows import Rows, shared_rows

if TYPE_CHECKING:
    from flower_ext.client.half import Local, LocalSettings

# Of a client's random numbers: see Local.seed.
_STREAM = 5


def adam(
    parameters: Iterable[nn.Parameter], settings: "LocalSettings"
) -> torch.optim.Optimizer:
    """Return ``torch.optim.Adam`` with the learning rate and weight decay that are set.

    Parameters
    ----------
    parameters : iterable of Parameter
        What it trains.
    settings : LocalSettings
        Of the client; all else is as torch has it.
    """
    return torch.optim.Adam(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


@dataclass(frozen=True)
class Grass(LocalOptimizer):
    r"""Makes an optimizer that trains a few rows of each matrix at a time.

    For ``Task(optimizer=Grass(...))``. The optimizer is an ordinary one of torch, such
    as Adam, whose moments of a matrix are those of r rows: its state is r/m of the
    size. What has no rows, such as a bias, is trained as ever.

    Where the server asks for uploads by :class:`~flower_ext.wire.Rows`, bare or in a
    chain, whose rows are those of the round, these are the rows that are trained, in
    the whole round. The change of a client then has these rows only, and nothing is
    lost by sending no others::

        task = Task(model, data, loss, optimizer=Grass())
        strategy = AdditiveStrategy(upload=Rows(1 / 4))

    Models that stay with the client, such as Ditto's, have rows of their own.

    Parameters
    ----------
    rows : Rows (default: ``Rows(0.25, "largest")``)
        How rows are chosen where the upload does not say it: by the norms of the
        gradient's rows in the step in which they are chosen, the largest or drawn;
        ``client`` draws all alike, and ``round`` those of the round. A density of 1
        gives back the optimizer. With ``rescaled`` it is :math:`\rho_j = 1/\sqrt{r
        q_j}`, so that :math:`E[P P^T] = I`, otherwise 1.
    every : int (default: 200)
        Steps after which rows are chosen anew. Those of a round stay.
    alpha : float (default: 1.0)
        Multiplies the steps of matrices.
    optimizer : callable (default: :func:`adam`)
        ``(parameters, LocalSettings) -> torch.optim.Optimizer``, one that makes its
        state in its first step, as torch's Adam, AdamW and SGD do, not Adagrad.

    Raises
    ------
    ValueError
        When it is made, or before the first step: if the upload is one of rows that are
        rescaled, which would multiply what the client did; if the optimizer has a state
        before its first step; and in a step with a closure.

    Notes
    -----
    A client begins every round with new moments, as with any optimizer here. Weight
    decay acts on the chosen rows. A matrix of which all rows are chosen is trained as
    without, in every bit, and keeps its moments.

    Under :class:`~flower_ext.Stacked` the forward pass is that of all clients, and each
    one's optimizer steps alone. Under DPSGD rows are chosen of gradients that are noisy
    already.

    Deviations from the paper: rows are drawn without replacement, see
    :class:`~flower_ext.wire.Rows`; and the backward pass makes the gradient of the
    whole matrix, so that gradients take the memory, and steps the time, that they take
    without.

    Examples
    --------
    >>> from flower_ext.wire import Rows
    >>> Grass(Rows(0.5, "norm", rescaled=True), every=50).every
    50
    """

    rows: Rows = Rows(0.25, "largest")
    every: int = 200
    alpha: float = 1.0
    optimizer: MakeOptimizer = adam

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Rows):
            refuse("rows", self.rows, "a codec Rows", "Rows(0.25, 'largest')")
        whole("every", self.every, 1)
        positive("alpha", self.alpha)
        if not callable(self.optimizer):
            cause = "lambda parameters, settings: torch.optim.Adam(parameters)"
            refuse("optimizer", self.optimizer, "a function that makes it", cause)

    def make(
        self, parameters: Mapping[str, nn.Parameter], local: "Local"
    ) -> torch.optim.Optimizer:
        """Return the optimizer of one local training."""
        # Of models that stay with the client nothing is sent.
        shared = None if local.branch else shared_rows(local.upload)
        if shared is not None and shared.rescaled:
            refuse(
                "upload",
                shared,
                "rows with rescaled=False",
                "Grass trains these rows, and their change would be multiplied; "
                "Grass(alpha=...) makes larger steps",
            )
        found = self.optimizer(parameters.values(), local.settings)
        rows = shared or self.rows.at(local.server_round)
        return in_rows(
            found, parameters, rows, self.every, self.alpha, local.seed(_STREAM)
        )


def in_rows(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    rows: Rows,
    every: int = 200,
    alpha: float = 1.0,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Let an optimizer step in a few rows of each matrix, and return it.

    For a training loop of one's own, which stays as it is.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        One that has no state yet.
    parameters : Mapping[str, Parameter]
        By the names under which they travel, ``dict(model.named_parameters())``;
        others of the optimizer are trained whole.
    rows : Rows
        How rows are chosen; those of a round as the server told, ``rows.at(5)``.
    every, alpha
        See :class:`Grass`.
    seed : int (default: 0)
        Of the rows that are drawn, other than those of a round.

    Examples
    --------
    >>> model = nn.Linear(3, 8, bias=False)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> rows = Rows(0.25, "largest")
    >>> optimizer = in_rows(optimizer, dict(model.named_parameters()), rows)
    >>> model(torch.ones(3)).sum().backward()
    >>> optimizer.step()
    >>> tuple(optimizer.state[model.weight]["exp_avg"].shape)
    (2, 3)
    """
    if optimizer.state:
        refuse(
            "optimizer",
            type(optimizer).__name__,
            "one without a state before its first step",
            "its state has the size of whole matrices; Adam, AdamW and SGD have none",
        )
    stepping = _Stepping(parameters, rows, every, alpha, seed)
    optimizer.register_step_pre_hook(stepping.before)
    optimizer.register_step_post_hook(stepping.after)
    return optimizer


@dataclass
class _Chosen:
    """Of one matrix: which rows, as indices, and by what their steps are multiplied.

    Rows are None where they are all; a factor is, where it is 1.
    """

    rows: Tensor | None
    gradient_factor: Tensor | None
    step_factor: Tensor | None


@dataclass
class _Whole:
    """A matrix while its rows are stepped in its place."""

    data: Tensor
    gradient: Tensor
    start: Tensor


class _Stepping:
    """Hands an optimizer the rows in the place of matrices, and takes them back."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rows: Rows,
        every: int,
        alpha: float,
        seed: int,
    ) -> None:
        self._names = {p: name for name, p in parameters.items() if p.dim() > 1}
        self._rows, self._alpha, self._seed = rows, alpha, seed
        self._every = 0 if rows.choice == "round" else every
        self._steps: dict[nn.Parameter, int] = {}
        self._chosen: dict[nn.Parameter, _Chosen] = {}
        self._away: dict[nn.Parameter, _Whole] = {}

    @torch.no_grad()
    def before(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Put the rows in the place of each matrix that has a gradient."""
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            cause = "while it steps, the model has the chosen rows only"
            refuse("step", "a closure", "called without", cause)
        for p, name in self._names.items():
            if p.grad is not None:
                self._choose(optimizer, p, name, p.grad)
                self._swap(p, p.grad)

    def _choose(
        self, optimizer: torch.optim.Optimizer, p: nn.Parameter, name: str, grad: Tensor
    ) -> None:
        """Choose rows, where it is time to; then the moments of others go."""
        steps = self._steps.get(p, 0)
        self._steps[p] = steps + 1
        if p in self._chosen and (not self._every or steps % self._every):
            return
        seed = self._rows.round_seed
        if self._every:
            sequence = np.random.SeedSequence([self._seed, steps])
            seed = int(sequence.generate_state(1, np.uint64)[0])
        picked = self._rows.pick(name, p.shape, partial(_norms, grad), seed)
        rho = np.ones(1)
        if picked is None:
            rows = None
        else:
            rows = torch.from_numpy(picked.rows).to(p.device)
            optimizer.state.pop(p, None)
            if self._rows.rescaled:
                rho = 1 / np.sqrt(picked.probabilities)
        self._chosen[p] = _Chosen(rows, _factor(rho, p), _factor(self._alpha * rho, p))

    def _swap(self, p: nn.Parameter, grad: Tensor) -> None:
        chosen = self._chosen[p]
        if chosen.rows is None and chosen.step_factor is None:
            return
        small, gradient = p.data, grad
        if chosen.rows is not None:
            small = small.index_select(0, chosen.rows)
            gradient = gradient.index_select(0, chosen.rows)
        if chosen.gradient_factor is not None:
            gradient = gradient * chosen.gradient_factor
        self._away[p] = _Whole(p.data, grad, small)
        p.grad = None
        p.data = small.clone() if chosen.step_factor is not None else small
        p.grad = gradient

    @torch.no_grad()
    def after(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Put the matrices back, moved in the chosen rows."""
        for p, whole_ in self._away.items():
            chosen, moved = self._chosen[p], p.data
            if chosen.step_factor is not None:
                moved = whole_.start + chosen.step_factor * (moved - whole_.start)
            p.grad = None
            p.data = whole_.data
            p.grad = whole_.gradient
            if chosen.rows is None:
                p.data.copy_(moved)
            else:
                p.data.index_copy_(0, chosen.rows, moved)
        self._away.clear()


def _factor(values: Floats, p: nn.Parameter) -> Tensor | None:
    """Return factors of rows, to be multiplied with them; None if all are 1."""
    if (values == 1).all():
        return None
    factors = torch.from_numpy(values).to(p)
    return factors.reshape(-1, *[1] * (p.dim() - 1))


def _norms(gradient: Tensor) -> Floats:
    """Return the norms of the rows, in float64."""
    flat = gradient.flatten(1)
    norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    return np.asarray(norms.cpu().numpy(), np.float64)
