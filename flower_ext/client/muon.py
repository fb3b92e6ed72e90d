"""Muon for a model's hidden matrices, and AdamW for all else, as one optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from flower_ext.client.task import LocalOptimizer
from flower_ext.core.errors import open_unit, refuse
from flower_ext.core.parts import Filter, personal_names, require_filter

if TYPE_CHECKING:
    from flower_ext.client.half import Local


@dataclass(frozen=True)
class MuonAdamW(LocalOptimizer):
    r"""Makes an optimizer that steps hidden matrices by Muon, and the rest by AdamW.

    For ``Task(optimizer=MuonAdamW())``. Muon makes the momentum of a matrix orthogonal,
    which is meant for hidden layers; embeddings, the output layer, norms and biases are
    for AdamW. Both are torch's. A step of Muon is scaled to the size of AdamW's
    (``adjust_lr_fn="match_rms_adamw"``, by :math:`0.2\sqrt{\max(m, n)}`), so that one
    learning rate serves both; it is that of the client's settings, and so is the
    decoupled weight decay.

    Parameters
    ----------
    adamw : str, sequence of str or callable, optional
        Matrices that are for AdamW: patterns of names such as ``"lm_head.*"``, as of
        :mod:`fnmatch`, or a function ``name -> bool``. By default those of
        ``nn.Embedding`` and of the last layer. What is no matrix always is.
    momentum : float (default: 0.95)
        Of Muon, Nesterov's, in (0, 1).
    betas : tuple of float (default: (0.9, 0.95))
        Of AdamW.

    Raises
    ------
    ValueError
        Before the first step, if no matrix is left for Muon.

    References
    ----------
    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu
    et al. 2025, "Muon is scalable for LLM training", arXiv:2502.16982 (the scale).

    Examples
    --------
    >>> MuonAdamW(adamw=["embed.*", "lm_head.*"]).momentum
    0.95
    """

    adamw: Filter = None
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        require_filter(self.adamw, "adamw")
        open_unit("momentum", self.momentum)

    def make(
        self, parameters: Mapping[str, nn.Parameter], local: "Local"
    ) -> torch.optim.Optimizer:
        """Return the optimizer of one local training."""
        names = list(parameters)
        if self.adamw is None:
            last = names[-1].rpartition(".")[0]
            own = {name for name in names if name.rpartition(".")[0] == last}
            embeddings = (
                x for x in local.model.modules() if isinstance(x, nn.Embedding)
            )
            others = {id(x.weight) for x in embeddings}
            own |= {name for name, p in parameters.items() if id(p) in others}
        else:
            own = set(personal_names(names, self.adamw, "adamw"))
        hidden = {n: p for n, p in parameters.items() if p.dim() == 2 and n not in own}
        if not hidden:
            refuse(
                "adamw",
                self.adamw,
                "a filter that leaves matrices",
                f"of {names[:5]} none is left for Muon",
            )
        rate, decay = local.settings.learning_rate, local.settings.weight_decay
        muon = torch.optim.Muon(
            hidden.values(),
            lr=rate,
            weight_decay=decay,
            momentum=self.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        rest = [p for name, p in parameters.items() if name not in hidden]
        return Joined(
            muon,
            torch.optim.AdamW(rest, lr=rate, weight_decay=decay, betas=self.betas),
        )


class Joined(torch.optim.Optimizer):
    """Optimizers of different parameters as one, with one state and all their groups.

    Parameters
    ----------
    *parts : torch.optim.Optimizer
        New ones, which are stepped in this order.

    Examples
    --------
    >>> one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    >>> joined = Joined(torch.optim.SGD([one], 0.5), torch.optim.SGD([other], 0.25))
    >>> one.grad = other.grad = torch.ones(1)
    >>> joined.step()
    >>> one.item(), other.item()
    (0.5, 0.75)
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        groups = [group for part in parts for group in part.param_groups]
        self._parts = parts
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this one's groups and state."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state, as of a ``state_dict``."""
        super().__setstate__(state)
        self._share()

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take a step of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            cast(Callable[[], None], part.step)()
        return loss
