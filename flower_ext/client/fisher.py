r"""Diagonal Fisher estimators of a trained torch model.

The diagonal (empirical) Fisher of a model :math:`p_\theta` on data is
:math:`F_j = \mathbb{E}\,(\partial_j \log p_\theta(y \mid x))^2`. From the gradients of
training steps it comes for free; per example it costs one more pass.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from flower_ext.client.tensors import tensor_record
from flower_ext.core.errors import refuse, whole

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
StepArguments = tuple[tuple[object, ...], dict[str, object]]


@dataclass
class _Sum:
    """Squares of a parameter's gradients; ``steps`` starts at ``-skip``."""

    name: str
    parameter: nn.Parameter
    steps: int
    examples: int = 0
    squares: Tensor | None = None

    def take(self, examples: int, window: int | None, unscale: float = 1.0) -> None:
        """Take in the gradient of one step."""
        # A new window begins with this step: what was summed in the last one goes.
        if window and self.steps >= 0 and self.steps % window == 0:
            self.examples, self.squares = 0, None
        self.steps += 1
        if self.steps <= 0:
            return
        self.examples += examples
        if self.parameter.grad is None:
            return
        gradient = self.parameter.grad.detach().float()
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        weight = (examples * unscale) ** 2  # b_t^2 of the estimator, see the class
        if self.squares is None:
            self.squares = gradient.square().mul_(weight)
        else:
            self.squares = self.squares.to(gradient.device)
            self.squares.addcmul_(gradient, gradient, value=weight)

    def mean(self) -> Tensor:
        """Return the Fisher; 0 where no gradient arrived."""
        if self.squares is None:
            return torch.zeros_like(self.parameter, dtype=torch.float32)
        return self.squares / self.examples


class SquaredGradients:
    r"""Diagonal Fisher from the gradients of training steps, whatever their batches.

    The gradient :math:`g` of a mean loss over :math:`b` examples, drawn independently,
    has :math:`\mathbb{E}\, b^2 g^2 = b F + b (b - 1) m^2`, where :math:`F` is the mean
    square and :math:`m` the mean of one example's gradient. Summed over steps,

    .. math::
       \hat F = \frac{\sum_t b_t^2 g_t^2}{\sum_t b_t}

    therefore estimates :math:`F` at a solution, where :math:`m = 0`, for batches of any
    sizes; elsewhere it is larger by :math:`(\sum b_t^2 / \sum b_t - 1)\, m^2`, to which
    a short last batch adds little. Examples are drawn without replacement: a client
    with a single batch sees less than :math:`F` at its own solution (Khan et al. 2018,
    "Fast and scalable Bayesian deep learning by weight-perturbation in Adam",
    arXiv:1806.04854, Theorem 1).

    Fed either by :meth:`add` after each backward pass, or, in a training loop that is
    not ours, by an optimizer's steps (:meth:`watch`).

    Parameters
    ----------
    model : torch.nn.Module
        Its trainable parameters are looked at; one that a step does not reach has a
        gradient of 0 there. Sums are kept in float32.
    window : int, optional
        Number of steps that count, at least 1; all by default. The sums start anew
        every ``window`` steps: with the number of steps in an epoch, what is there
        after training for whole epochs is that of the last one.
    skip : int (default: 0)
        Steps to ignore before the first window.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> fisher = SquaredGradients(model, window=2).watch()
    >>> for x in (5.0, 1.0, 3.0, 2.0):  # two epochs of two batches
    ...     optimizer.zero_grad()
    ...     model(torch.tensor([[x]])).mean().backward()
    ...     optimizer.step()
    >>> fisher.mean()  # (3**2 + 2**2) / 2
    {'weight': tensor([[6.5000]])}
    """

    def __init__(
        self, model: nn.Module, window: int | None = None, skip: int = 0
    ) -> None:
        if window is not None:
            whole("window", window, 1, "a loader without batches?")
        whole("skip", skip, 0)
        self._model = model
        self._window = window
        self._sums = {
            id(p): _Sum(name, p, -skip)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self._optimizer: Optimizer | None = None
        self._batch_size: int | None = None
        self._hooks: list[RemovableHandle] = []
        self._examples = 0  # examples whose gradients the parameters hold now
        self._stepping: Optimizer | None = None  # whose step is being taken
        self._missed = ""  # why the sums cannot be those of the training

    def add(self, examples: int) -> None:
        """Take in the gradients of one backward pass over so many examples.

        Raises
        ------
        ValueError
            If Opacus keeps the gradients from being released as they are.
        """
        _refuse_private(self._model)
        for total in self._sums.values():
            total.take(examples, self._window)

    def watch(
        self, optimizer: Optimizer | None = None, batch_size: int | None = None
    ) -> "SquaredGradients":
        """Take in the gradients of an optimizer's steps from now on; returns itself.

        The gradient that counts is the one the optimizer takes its step with: unscaled,
        accumulated over backward passes, clipped if the loop clips. A step that a
        ``GradScaler`` skips does not count. Under Opacus it is the clipped and noised
        gradient, which the trained model reveals anyway, and all steps have the same
        weight: how many examples a Poisson batch holds is secret.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer, optional
            By default every optimizer of this process that has parameters of the model.
        batch_size : int, optional
            Examples of every step. By default they are counted: the length of the first
            tensor given to the model, in those calls whose output a backward pass went
            through since the gradients were last zero.
        """
        if not isinstance(optimizer, Optimizer | None):
            refuse("optimizer", optimizer, "a torch.optim.Optimizer, or left out")
        if batch_size is not None:
            self._batch_size = whole("batch_size", batch_size, 1)
        # Opacus calls the step of the optimizer that it wraps, with noised gradients.
        self._optimizer = getattr(optimizer, "original_optimizer", optimizer)
        # Here and not as a decorator, since torch's compiler takes a second to import;
        # partial, so that the hook of a copied model is the copy's own.
        uncompiled = torch.compiler.disable(  # type: ignore[no-untyped-call]
            type(self)._on_forward
        )
        look = functools.partial(uncompiled, self)
        self._hooks.append(self._model.register_forward_hook(look, with_kwargs=True))
        # Hooks on all optimizers stay when a client fails: a weak reference, so that
        # they do not keep its model in memory.
        me = weakref.ref(self)

        def before(
            optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> StepArguments | None:
            found = me()
            return found._before_step(optimizer, args, kwargs) if found else None

        def after(optimizer: Optimizer, *_: object) -> None:
            if (found := me()) and found._stepping is optimizer:
                found._stepping = None

        for handle in (
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        ):
            self._hooks.append(handle)
            weakref.finalize(self, handle.remove)
        return self

    def _on_forward(
        self, _: nn.Module, args: object, kwargs: object, output: object
    ) -> None:
        # A call counts when a backward pass comes to its output: calls in an evaluation
        # never do. Several outputs of one call are one batch.
        given = next((x for x in _tensors((args, kwargs)) if x.ndim), None)
        size = 0 if given is None else len(given)
        counted = False

        def on_backward(_: Tensor) -> None:
            nonlocal counted
            if not counted:
                counted = True
                self._examples = size + self._examples * self._holds_gradients()
            self._stepping = None

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(on_backward)  # type: ignore[no-untyped-call]

    def _holds_gradients(self) -> bool:
        """Whether there are gradients that a backward pass will add to."""
        gradients = (s.parameter.grad for s in self._sums.values())
        return any(g is not None and bool(g.any()) for g in gradients)

    def _before_step(
        self,
        optimizer: Optimizer,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> StepArguments | None:
        if self._optimizer not in (None, optimizer):
            return None
        if self._stepping is optimizer:  # a step that calls the step of its base class
            return None
        self._stepping = optimizer
        # With a closure the gradients are there only once it was evaluated, the first
        # time at the parameters of the step (LBFGS evaluates it again along its
        # search).
        closures = [x for x in (*args[1:], kwargs.get("closure")) if callable(x)]
        if not closures:
            self._take(optimizer)
            return None
        [closure] = closures
        evaluated = False

        def evaluate() -> object:
            nonlocal evaluated
            result = closure()
            if not evaluated:
                evaluated = True
                self._take(optimizer)
            return result

        return (args[0], evaluate), {
            key: x for key, x in kwargs.items() if key != "closure"
        }

    def _take(self, optimizer: Optimizer) -> None:
        """Take in the gradients that an optimizer is about to use."""
        sums = [
            self._sums[id(p)]
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self._sums
        ]
        if not sums:
            return
        # A fused optimizer is handed scaled gradients and what a GradScaler found.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf):
            return
        scale = getattr(optimizer, "grad_scale", None)
        examples = self._batch_size or self._examples
        if any(_is_private(total.parameter) for total in sums):
            examples = 1
        if not examples:
            if all(total.parameter.grad is None for total in sums):
                return
            self._missed = (
                "an optimizer stepped after no backward pass through the output of the "
                "watched model, so that nothing says how many examples it saw: give "
                "watch_fisher the model that the loop calls, or batch_size"
            )
            return
        unscale = 1.0 if scale is None else 1 / float(scale)
        for total in sums:
            total.take(examples, self._window, unscale)

    def mean(self, arrays: Collection[str] = ()) -> dict[str, Tensor]:
        """Stop watching; return the mean over the last window, float32 by name.

        Names are those of the model inside ``torch.compile``, ``DataParallel`` or
        Opacus' module, and of an adapter's those of peft's
        ``get_peft_model_state_dict``.

        Parameters
        ----------
        arrays : collection of str, optional
            Names that the reply's arrays have, or the ArrayRecord itself, where they
            follow another of the model's ways to name its parameters.
        """
        while self._hooks:
            self._hooks.pop().remove()
        names = _names_sent(self._model, arrays)
        return {names[s.name]: s.mean() for s in self._sums.values()}

    def record(self, arrays: Collection[str] = ()) -> ArrayRecord:
        """Stop watching; return the mean as the record a reply carries.

        Parameters
        ----------
        arrays : collection of str, optional
            See :meth:`mean`.

        Raises
        ------
        RuntimeError
            If what was seen is not the training: no optimizer's step, a step whose
            batch is unknown, or a parameter that the model got while it was watched.
        """
        taken = any(s.steps > 0 for s in self._sums.values())
        if self._examples and not taken and not self._missed:
            self._missed = (
                "backward passes, but no step of a torch optimizer with the model's "
                "parameters: in a loop that updates them itself, call add(examples) of "
                "flower_ext.client.fisher.SquaredGradients after each backward pass"
            )
        for name, p in self._model.named_parameters():
            if p.requires_grad and id(p) not in self._sums:
                self._missed = (
                    f"parameter {name!r} is trained, and was not when watch_fisher was "
                    "called: call it with the model as it is trained"
                )
        if self._missed:
            raise RuntimeError(f"this is not the training's Fisher: {self._missed}")
        return tensor_record(self.mean(arrays))


def _tensors(values: object) -> Iterator[Tensor]:
    """Return the tensors among a module's arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def spellings(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names that each trainable parameter may travel by.

    The first is the model's own, then those of the model inside ``torch.compile``,
    ``DataParallel`` or Opacus' module, and peft's.
    """
    outer = [name for name, p in model.named_parameters() if p.requires_grad]
    inner = _unwrapped(model)
    own = [name for name, p in inner.named_parameters() if p.requires_grad]
    return list(zip(outer, own, _adapter_names(inner, own), strict=True))


def _names_sent(model: nn.Module, arrays: Collection[str]) -> dict[str, str]:
    """Return the name that each trainable parameter has among the arrays of a reply."""
    found = {}
    for name, *others in spellings(model):
        if not arrays:
            found[name] = others[-1]
            continue
        known = [x for x in (name, *others) if x in arrays]
        if not known:
            refuse(
                "arrays", sorted(arrays)[:5], f"names with that of parameter {name!r}"
            )
        found[name] = known[0]
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``DataParallel``, ``torch.compile`` or Opacus' module."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    for package, name in (("torch._dynamo.", "_orig_mod"), ("opacus.", "_module")):
        if type(model).__module__.startswith(package):
            return _unwrapped(getattr(model, name))
    return model


def _adapter_names(model: nn.Module, own: list[str]) -> list[str]:
    """Return peft's names of an adapter's parameters, the model's own elsewhere."""
    # peft renames what it is given: empty tensors go through, and tell by their
    # identity which name became which.
    state = model.state_dict()
    if not hasattr(model, "peft_config") or set(state) == set(own):
        return own
    from peft import get_peft_model_state_dict

    marked = {name: torch.empty(0) for name in state}
    theirs = get_peft_model_state_dict(
        model,
        state_dict=marked,
        adapter_name=cast(str, model.active_adapter),
        save_embedding_layers=False,
    )
    origin = {id(x): name for name, x in marked.items()}
    renamed = {origin[id(x)]: name for name, x in theirs.items() if id(x) in origin}
    return [renamed.get(name, name) for name in own]


def _is_private(parameter: nn.Parameter) -> bool:
    """Whether Opacus trains a parameter."""
    return hasattr(parameter, "grad_sample") or hasattr(parameter, "summed_grad")


def _refuse_private(model: nn.Module) -> None:
    """Refuse to look at the raw gradients of a model that is trained privately."""
    for name, parameter in model.named_parameters():
        if _is_private(parameter):
            refuse(
                "model",
                f"{type(model).__name__} with {name!r} under Opacus",
                "one without Opacus",
                "squares of its raw gradients would void the privacy of the model; "
                "watch_fisher takes those that Opacus' optimizer releases",
            )


def per_example(
    model: nn.Module, loss: Loss, data: Iterator[Batch]
) -> dict[str, Tensor]:
    """Return the mean over examples of squared per-example gradients, float32.

    Parameters
    ----------
    model : torch.nn.Module
        Where to take the gradients; run in evaluation mode.
    loss : callable
        ``(model, batch) -> losses`` of shape ``(batch,)``, minus the log-likelihood.
    data : iterator of batches
        One pass over the data.

    Notes
    -----
    Gradients of a batch come from one vectorised pass (``torch.func``), or, where a
    layer cannot be vectorised (recurrent ones), from one pass per example.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> data = [{"x": torch.tensor([[1.0], [2.0]])}, {"x": torch.tensor([[3.0]])}]
    >>> per_example(model, lambda model, batch: model(batch["x"])[:, 0], iter(data))
    {'weight': tensor([[4.6667]])}
    """
    _refuse_private(model)
    was_training = model.training
    model.eval()
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    sums = {
        name: torch.zeros_like(p, dtype=torch.float32) for name, p in trainable.items()
    }
    # One example as a batch of one: the loss is written for batches.
    wrapped = _Loss(model, loss)

    def example_loss(
        parameters: dict[str, Tensor], example: dict[str, Tensor]
    ) -> Tensor:
        batch = {name: column.unsqueeze(0) for name, column in example.items()}
        named = {f"model.{name}": p for name, p in parameters.items()}
        return functional_call(wrapped, named, (batch,)).squeeze()  # type: ignore[no-any-return]

    one = grad(example_loss)
    many = vmap(one, in_dims=(None, 0), randomness="different")
    vectorised = not any(isinstance(m, nn.RNNBase) for m in model.modules())
    count = 0
    for batch in data:
        size = len(next(iter(batch.values())))
        found: Iterable[dict[str, Tensor]] = ()
        if vectorised:
            try:
                found = [many(trainable, dict(batch))]
            except RuntimeError:  # recurrent cells, a loss that calls ``item()``
                vectorised = False
        if not vectorised:
            found = (
                one(trainable, {name: column[i] for name, column in batch.items()})
                for i in range(size)
            )
        for gradients in found:
            for name, g in gradients.items():
                # Vectorised gradients have a leading axis of examples, which is summed.
                sums[name] += g.float().square().sum_to_size(sums[name].shape)
        count += size
    model.train(was_training)
    return {name: total / max(count, 1) for name, total in sums.items()}


class _Loss(nn.Module):
    """A module whose output is the loss, for ``functional_call``."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)
