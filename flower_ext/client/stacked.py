"""Stacked: the clients of a pack trained as one computation.

The parameters of k clients are stacked along a leading axis. ``torch.func.vmap`` turns
the forward pass of one into that of all, with one large kernel in the place of k small
ones; one backward pass and one step of an optimizer on the stack follow. The clients'
models are views of its rows, so that hooks of their halves see and change them as
always.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import cached_property
from logging import WARNING
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from flower_ext._flower import log
from flower_ext.client.batching_rules import BatchingRules, NotFillable
from flower_ext.client.half import ClientHalf, Local, trainable
from flower_ext.client.seeds import Globals, seed_all, stepped_out
from flower_ext.client.task import (
    Batch,
    example_losses,
    num_examples,
    per_example,
    stacking,
)
from flower_ext.client.trainer import Session, Steps, Trainer, batch_norms
from flower_ext.core.errors import refuse, whole
from flower_ext.core.meeting import CLIENTS_OWN, may_meet, meet

# Their step is the same for a row of a stack as for the parameter alone.
_ELEMENTWISE = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
}
# What they keep of a parameter as a whole: functions of the number of steps.
_COUNTERS = {"step", "mu_product"}
_TRIES = 2  # after which a model is not stacked any more


class Stacked(Trainer):
    """Plain steps, of several clients at once where they run in one process.

    Clients are stacked where a :class:`~flower_ext.simulation.PackedGrid`, or
    ``run_local``, runs several of them; elsewhere each takes plain steps. Results are
    those of :class:`~flower_ext.client.trainer.Plain` to rounding. Halves and tasks
    stay as they are.

    Parameters
    ----------
    at_once : int (default: 16)
        The most clients of a process whose models, data and activations are in memory
        at a time.

    Notes
    -----
    A step is that of all clients of a pack with the same model, half, optimizer and
    shape of batches; batches of different sizes are filled up, and the examples added
    do not count, unless examples of a batch depend on each other. A client's random
    choices are its own: dropout on the CPU draws the same masks as for a client alone.
    BatchNorm's statistics are each client's. Parameters that are not trained and are
    equal in all clients, such as the base of an adapter, are shared by the computation.

    Clients are trained one after the other, which is said once, where the model cannot
    be stacked: recurrent layers, random operations other than dropout, branches that
    depend on values, hooks of modules. Optimizers other than torch's SGD, Adam and
    their like step each client's parameters alone. With ``client_timeout`` clients run
    one by one, since only then can a single one be stopped. Clients whose losses fail
    do so alone.

    Other clients of a pack begin before one ends: a ``Task`` must make a new model for
    each, and its functions must not count on running alone.

    Examples
    --------
    >>> import torch
    >>> from flower_ext import Task, client_app
    >>> data = {"x": torch.randn(8, 2)}
    >>> task = Task(
    ...     model=lambda run_config: torch.nn.Linear(2, 1),
    ...     data=lambda context: (data, data),
    ...     loss=lambda model, batch: model(batch["x"])[:, 0] ** 2,
    ... )
    >>> app = client_app(task, trainer=Stacked(at_once=32))
    """

    def __init__(self, at_once: int = 16) -> None:
        self.at_once = whole("at_once", at_once, 1)
        # Of kinds of clients: how often they could not be stacked, of which batches may
        # not be filled up, and which are known to be as they are alone.
        self._failures: dict[Hashable, int] = {}
        self._not_fillable: set[Hashable] = set()
        self._checked: set[Hashable] = set()

    def session(self, local: Local, half: ClientHalf) -> Session:
        """Return a session that waits for those of other clients."""
        return _Session(self)

    def train(self, members: Sequence["_Member"]) -> None:
        """Take all steps of several trainings; errors are noted in them."""
        _require_own_models(members)
        if threads := members[0].local.settings.torch_threads:
            torch.set_num_threads(threads)
        members = [member for member in members if member.advance()]
        while members:
            # Step by step, so that all have taken as many, which Adam counts.
            for group in self._groups(members):
                self._step(group)
            members = [member for member in members if member.advance()]

    def _groups(self, members: Sequence["_Member"]) -> list[list["_Member"]]:
        """Return the members that can take a step together."""
        groups: dict[Hashable, list[_Member]] = {}
        for member in members:
            fill = member.kind not in self._not_fillable
            alone = self._failures.get(member.kind, 0) >= _TRIES
            key: Hashable = id(member)
            if not alone:
                key = member.kind, member.changing(), *member.shapes(fill=fill)
            groups.setdefault(key, []).append(member)
        return list(groups.values())

    def _step(self, members: list["_Member"]) -> None:
        """Take a step of each, together if possible."""
        kind = members[0].kind
        if len(members) > 1:
            try:
                stack = _stack_of(members)
                filled = stack.is_filled()
                stack.step(check=(kind, filled) not in self._checked)
            except NotFillable:
                self._not_fillable.add(kind)
                for group in self._groups(members):
                    self._step(group)
                return
            except _NotStackable as problem:
                for member in members:
                    member.step_alone()
                # Else it was for the sake of one of them, and the rest can be stacked.
                if all(member.error is None for member in members):
                    self._note_failure(kind, problem.__cause__)
                return
            else:
                self._checked.add((kind, filled))
                return
        members[0].step_alone()

    def _note_failure(self, kind: Hashable, problem: BaseException | None) -> None:
        self._failures[kind] = self._failures.get(kind, 0) + 1
        if self._failures[kind] == 1:
            text = "Clients are trained one after the other: %s: %s"
            log(WARNING, text, type(problem).__name__, problem)


class _Differs(Exception):  # noqa: N818
    """Together, losses or gradients are others than alone."""


class _NotStackable(Exception):  # noqa: N818
    """The forward pass of several clients failed; nothing has changed."""


class _Session(Session):
    """Trainings that wait for those of other clients."""

    def __init__(self, trainer: Stacked) -> None:
        self._trainer = trainer

    def take(self, steps: Steps) -> None:
        """Take all steps, with those of others that come to this point."""
        if not may_meet():
            super().take(steps)
            return
        member = _Member(steps)
        with stepped_out():
            meet(self._trainer.train, member)
        if member.error is not None:
            raise member.error


class _Member:
    """One training among several.

    Attributes
    ----------
    steps : Steps
        Its own, with its optimizer.
    error : BaseException or None
        What ended it.
    stack : _Stack or None
        In which it is.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps, self.local, self.half = steps, steps.local, steps.half
        self.error: BaseException | None = None
        self.stack: _Stack | None = None
        self._changing: Hashable = None

    @property
    def batch(self) -> Batch:
        """The batch of its next step."""
        assert self.steps.batch is not None
        return self.steps.batch

    def overrides(self, hook: str) -> bool:
        """Whether its half has a hook of its own."""
        return getattr(type(self.half), hook) is not getattr(ClientHalf, hook)

    # To walk through a large model takes as long as a step on a small batch.

    @cached_property
    def modules(self) -> list[nn.Module]:
        """All modules of its model."""
        return [*self.local.model.modules()]

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of its model."""
        return dict(self.local.model.named_parameters())

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained."""
        return {n: p for n, p in self.parameters.items() if p.requires_grad}

    @cached_property
    def globals(self) -> Globals:
        """Its random states."""
        found = Globals()
        with found.in_force():
            seed_all(self.local.seed(stream=1))
        return found

    @cached_property
    def kind(self) -> Hashable:
        """What must be equal to be in one stack with another."""
        model, local = self.local.model, self.local
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules)
        if hooks or not self.trained():
            return id(self)
        names = {id(p): name for name, p in self.parameters.items()}
        groups = [
            [names.get(id(p)) for p in group["params"]]
            for group in self.steps.optimizer.param_groups
        ]
        return (
            id(local.task),
            type(self.half),
            str(model),
            *_forms(self.parameters),
            *_forms(dict(model.named_buffers())),
            type(self.steps.optimizer),
            repr(groups),
            local.settings.max_gradient_norm,
            str(local.device),
        )

    def changing(self) -> Hashable:
        """What must be equal, too, and may change from step to step."""
        if self._changing is None or self._has_hooks:
            options = [_options(group) for group in self.steps.optimizer.param_groups]
            self._changing = (
                tuple(module.training for module in self.modules),
                tuple(p.requires_grad for p in self.parameters.values()),
                repr(options),
            )
        return self._changing

    @cached_property
    def _has_hooks(self) -> bool:
        hooks = "batches objective regularizer after_backward after_step"
        return any(self.overrides(hook) for hook in hooks.split())

    def shapes(self, *, fill: bool) -> Iterator[Hashable]:
        """Return the form of the next batch; of its size, where it may be filled up."""
        size = num_examples(self.batch)
        # Never to more than twice the size.
        yield (size - 1).bit_length() if fill else size
        for name, column in sorted(self.batch.items()):
            yield name, column.dtype, tuple(column.shape[1:])

    @contextmanager
    def at_work(self, *, draws: bool = True) -> Iterator[None]:
        """Run hooks of its own, with its own random states; note what they raise."""
        try:
            with self.globals.in_force() if draws else nullcontext():
                yield
        except CLIENTS_OWN as error:
            self.error = error

    def advance(self) -> bool:
        """Read the next batch; return whether there is one to train on."""
        found = False
        if self.error is None:
            # The order of plain batches has a generator of its own.
            with self.at_work(draws=self.overrides("batches")):
                found = self.steps.advance()
        if not found and self.stack:
            self.stack.leave(self)
        return found

    def step_alone(self) -> None:
        """Take a step without the others."""
        if self.stack:
            self.stack.leave(self)
        with self.at_work():
            self.steps.step()


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group of parameters."""
    return {key: x for key, x in group.items() if key != "params"}


def _forms(tensors: Mapping[str, Tensor]) -> Iterator[Hashable]:
    for name, x in tensors.items():
        yield name, tuple(x.shape), x.dtype


def _require_own_models(members: Sequence[_Member]) -> None:
    """Refuse models that share what is trained: each would train that of another."""
    owners: dict[int, _Member] = {}
    for member in members:
        for p in member.trained().values():
            other = owners.setdefault(p.data_ptr(), member)
            if other is not member and p.numel():
                try:
                    refuse(
                        "Task.model",
                        "one model for several clients",
                        "a new one for each call",
                        "with the trainer Stacked clients are trained side by side",
                    )
                except ValueError as error:
                    other.error = member.error = error


def _stack_of(members: list[_Member]) -> "_Stack":
    """Return the stack of just these members; make it, if they are in others."""
    stack = members[0].stack
    if stack is None or stack.members != members or not stack.is_as_made():
        for member in members:
            if member.stack:
                member.stack.leave(member)
        stack = _Stack(members)
    return stack


class _Losses(nn.Module):
    """A model with its task's losses, to be called with other parameters."""

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.model = local.model
        self._task = local.task

    def forward(self, batch: Batch) -> Tensor:
        return example_losses(self._task, self.model, batch)


class _Stack:
    """The parameters of several trainings, and an optimizer on them.

    Parameters
    ----------
    members : list of _Member
        Of one kind. Their models become views of the stack's rows.
    """

    def __init__(self, members: list[_Member]) -> None:
        self.members = members
        first = members[0]
        self._made_of = first.changing()
        self._losses = _Losses(first.local)
        self._rows = [member.trained() for member in members]
        self.trained = {
            name: nn.Parameter(_stacked([own[name] for own in self._rows]))
            for name in self._rows[0]
        }
        # Statistics of BatchNorm are updated in place, so that a row is the client's.
        model = first.local.model
        kept = model.state_dict().keys()
        self._stacked, self._shared = _others(members, kept)
        self._normalises = any(x.training for x in batch_norms(model))
        self._optimizer = self._one_optimizer()
        self._sums = torch.zeros(
            len(members), dtype=torch.float64, device=first.local.device
        )
        self._steps = 0
        for member in members:
            member.stack = self

    def is_as_made(self) -> bool:
        """Whether hooks have left what it was made of as it was."""
        return self._made_of == self.members[0].changing()

    # The optimizer ----------------------------------------------------------------

    def _one_optimizer(self) -> torch.optim.Optimizer | None:
        """Return one optimizer in the place of the members', None if there is none."""
        each = [member.steps.optimizer for member in self.members]
        kind = type(each[0])
        hooks = each[0]._optimizer_step_pre_hooks or each[0]._optimizer_step_post_hooks
        if kind not in _ELEMENTWISE or hooks or not self.trained:
            return None
        stacks = {id(p): self.trained[name] for name, p in self._rows[0].items()}
        if any(id(p) not in stacks for g in each[0].param_groups for p in g["params"]):
            return None
        make = cast(Callable[..., torch.optim.Optimizer], kind)
        made = make(
            [
                {**group, "params": [stacks[id(p)] for p in group["params"]]}
                for group in each[0].param_groups
            ]
        )
        for name, stack in self.trained.items():
            states = [
                optimizer.state[own[name]]
                for optimizer, own in zip(each, self._rows, strict=True)
                if own[name] in optimizer.state
            ]
            if 0 < len(states) < len(each) or not _alike(states):
                return None
            if states:
                made.state[stack] = {
                    key: x if _is_whole(key, x) else _stacked([s[key] for s in states])
                    for key, x in states[0].items()
                }
        return made

    def leave(self, member: _Member) -> None:
        """Let a member go on without the others."""
        place = self.members.index(member)
        member.stack = None
        member.steps.total += float(self._sums[place])
        member.steps.count += self._steps
        if self._optimizer is None:
            return
        for name, p in self._rows[place].items():
            if found := self._optimizer.state.get(self.trained[name]):
                member.steps.optimizer.state[p] = {
                    key: _copy(x) if _is_whole(key, x) else x[place]
                    for key, x in found.items()
                }

    # A step -----------------------------------------------------------------------

    def step(self, *, check: bool) -> None:
        """Take one step of each member.

        Parameters
        ----------
        check : bool
            Whether to compare losses and gradients of one member with those that it
            has alone, which costs as much as a step of it.

        Raises
        ------
        _NotStackable, NotFillable
            Before anything has changed.
        """
        sizes = self._sizes()
        losses = self._forward(sizes, check=check)
        objectives = self._objectives(losses, sizes)
        for p in (*self.trained.values(), *self._each()):
            p.grad = None
        if objectives.requires_grad:
            objectives.sum().backward()  # type: ignore[no-untyped-call]
        self._add_gradients_of_regularizers()
        self._after_backward()
        self._scale_down()
        if self._optimizer is not None:
            self._optimizer.step()
        else:
            self._step_each()
        self._sums += objectives.detach()
        self._steps += 1
        if self.members[0].overrides("after_step"):
            for member in self._well():
                with member.at_work():
                    member.half.after_step(member.local)

    def is_filled(self) -> bool:
        """Whether batches of the next step have to be filled up."""
        return len(set(self._sizes())) > 1

    def _sizes(self) -> list[int]:
        return [num_examples(member.batch) for member in self.members]

    def _each(self) -> Iterator[nn.Parameter]:
        for own in self._rows:
            yield from own.values()

    def _well(self) -> list[_Member]:
        return [member for member in self.members if member.error is None]

    def _forward(self, sizes: list[int], *, check: bool) -> Tensor:
        """Return the losses of all examples, of shape ``(clients, examples)``."""
        largest, filled = max(sizes), self.is_filled()
        if filled and self._normalises:
            raise NotFillable
        batch = {
            name: torch.stack([_filled(m.batch[name], largest) for m in self.members])
            for name in self.members[0].batch
        }
        values = {**self.trained, **self._stacked}

        def forward(values: Mapping[str, Tensor], batch: Batch) -> Tensor:
            named = {f"model.{n}": x for n, x in {**self._shared, **values}.items()}
            found: Tensor = functional_call(self._losses, named, (batch,))
            return found

        before = {name: x.clone() for name, x in self._stacked.items()}
        try:
            if check:
                with BatchingRules(None, filled=filled), stacking():
                    losses: Tensor = vmap(forward)(values, batch)
                with BatchingRules(None, filled=filled):
                    self._require_equal(losses, sizes)
                self._put_back(before)
            with BatchingRules(self.members, filled=filled) as rules, stacking():
                losses = vmap(forward)(values, batch)
        except Exception as problem:
            self._put_back(before)
            if filled and isinstance(problem, NotFillable | _Differs):
                raise NotFillable from problem
            raise _NotStackable from problem
        rules.keep()
        return losses

    def _put_back(self, before: Mapping[str, Tensor]) -> None:
        for name, x in before.items():
            self._stacked[name].copy_(x)

    def _require_equal(self, losses: Tensor, sizes: list[int]) -> None:
        """Compare losses and gradients of one member with those that it has alone."""
        # Not the first, which may be right where those behind it are not.
        place = len(sizes) - 1 - sizes[::-1].index(min(sizes))
        member = self.members[place]
        with deepcopy(member.globals).in_force():
            model = deepcopy(member.local.model)
            alone = example_losses(member.local.task, model, member.batch)
        own = losses[place, : sizes[place]]
        found = _gradients(own, self.trained.values())
        pairs = [(alone.detach(), own.detach())]
        trained = trainable(model).values()
        for expected, gradient in zip(_gradients(alone, trained), found, strict=True):
            if expected is not None and gradient is not None:
                pairs.append((expected, gradient[place]))
            elif expected is not None or gradient is not None:
                raise _Differs("a parameter has a gradient only alone, or together")
        # Some are zero but for rounding, such as the gradient of a bias before a norm.
        largest = max(float(x.abs().max()) for x, _ in pairs if x.numel())
        for expected, value in pairs:
            near = torch.allclose(
                value, expected, rtol=1e-2, atol=1e-4 * largest, equal_nan=True
            )
            if not near:
                raise _Differs("losses or gradients are not those of a client alone")

    def _objectives(self, losses: Tensor, sizes: list[int]) -> Tensor:
        """Return the objective of each member."""
        first = self.members[0]
        if first.overrides("objective"):
            objectives = torch.stack(
                [
                    self._objective(member, losses[place, :size])
                    for place, (member, size) in enumerate(
                        zip(self.members, sizes, strict=True)
                    )
                ]
            )
        elif min(sizes) == max(sizes):
            objectives = losses.mean(1)
        else:
            counts = torch.tensor(sizes, device=losses.device)[:, None]
            added = torch.arange(losses.shape[1], device=losses.device) >= counts
            objectives = losses.masked_fill(added, 0.0).sum(1) / counts[:, 0]
        if not first.overrides("regularizer"):
            return objectives
        extra = [self._regularizer(member, objectives) for member in self.members]
        return objectives + torch.stack(extra)

    def _objective(self, member: _Member, losses: Tensor) -> Tensor:
        with member.at_work():
            found = member.half.objective(losses, member.batch)
            return per_example("objective", found, member.batch).mean()
        return losses.new_zeros(())

    def _regularizer(self, member: _Member, like: Tensor) -> Tensor:
        with member.at_work():
            if (extra := member.half.regularizer(member.local.model)) is not None:
                return extra
        return like.new_zeros(())

    def _add_gradients_of_regularizers(self) -> None:
        """Add what has reached the rows themselves."""
        for name, stack in self.trained.items():
            for place, own in enumerate(self._rows):
                if (extra := own[name].grad) is not None:
                    if stack.grad is None:
                        stack.grad = torch.zeros_like(stack)
                    stack.grad[place] += extra
                    own[name].grad = None

    def _after_backward(self) -> None:
        if not self.members[0].overrides("after_backward"):
            return
        self._hand_out_gradients()
        for member in self._well():
            with member.at_work():
                member.half.after_backward(member.local.model)
        for name, stack in self.trained.items():
            for place, own in enumerate(self._rows):
                grad = own[name].grad
                if grad is None and stack.grad is not None:
                    stack.grad[place].zero_()
                elif grad is not None:
                    if stack.grad is None:
                        stack.grad = torch.zeros_like(stack)
                    if grad.data_ptr() != stack.grad[place].data_ptr():
                        stack.grad[place] = grad
                own[name].grad = None

    def _hand_out_gradients(self) -> None:
        for name, stack in self.trained.items():
            for place, own in enumerate(self._rows):
                own[name].grad = None if stack.grad is None else stack.grad[place]

    def _scale_down(self) -> None:
        """Do for each member what ``clip_grad_norm_`` does for one."""
        limit = self.members[0].local.settings.max_gradient_norm
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        if limit == float("inf") or not grads:
            return
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
        factors = (limit / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad *= factors.view(-1, *[1] * (grad.dim() - 1)).to(grad.dtype)

    def _step_each(self) -> None:
        for member in self.members:  # of what a hook has frozen, too
            member.steps.optimizer.zero_grad()
        self._hand_out_gradients()
        for member in self._well():
            with member.at_work():
                member.steps.optimizer.step()


def _gradients(losses: Tensor, trained: Iterable[Tensor]) -> list[Tensor | None]:
    return [*torch.autograd.grad(losses.sum(), [*trained], allow_unused=True)]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors, and make each a view of its row."""
    stack = torch.stack([x.detach() for x in tensors])
    for row, x in zip(stack, tensors, strict=True):
        x.data = row
    return stack


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _alike(states: Sequence[Mapping[str, Any]]) -> bool:
    """Whether what is kept of a parameter as a whole is the same in all states.

    It is not where clients go on with states of their own, after unlike numbers of
    steps.
    """
    first = states[0] if states else {}
    return all(
        state.keys() == first.keys()
        and all(x == first[k] for k, x in state.items() if _is_whole(k, x))
        for state in states
    )


def _is_whole(key: str, value: object) -> bool:
    """Whether an optimizer keeps this of a parameter as a whole."""
    return key in _COUNTERS or not isinstance(value, Tensor)


def _others(
    members: Sequence[_Member], kept: Mapping[str, Tensor] | Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what is not trained: stacked, or that of one model for all.

    Stacked are buffers of the state and what differs.
    """
    stacked, shared = {}, {}
    buffered = [dict(member.local.model.named_buffers()) for member in members]
    each = [
        {n: p for n, p in member.parameters.items() if not p.requires_grad} | buffers
        for member, buffers in zip(members, buffered, strict=True)
    ]
    buffers = buffered[0]
    for name, x in each[0].items():
        others = [tensors[name] for tensors in each]
        own = name in buffers and name in kept
        if own or not all(_equal(x, other) for other in others[1:]):
            stacked[name] = _stacked(others)
        else:
            shared[name] = x.detach()
    return stacked, shared


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _filled(column: Tensor, size: int) -> Tensor:
    """Return a column of a batch with its first example repeated at the end."""
    missing = size - len(column)
    if not missing:
        return column
    return torch.cat([column, column[:1].expand(missing, *column.shape[1:])])
