r"""Example-level differential privacy inside every silo: DP-SGD as local training.

Cross-silo federations have few clients with many people's data in each, and what needs
protection is a person, not a hospital. Every silo trains with DP-SGD: a step releases

.. math::
   \frac{1}{q n} \Big( \sum_{i \in B} g_i \min(1, C / \|g_i\|)
   + \mathcal N(0, \sigma^2 C^2 I) \Big),

where every one of the n examples is in the batch B independently with probability q.
What leaves the silo is made of such steps only, so that the server and the other silos
need not be trusted.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from inspect import Parameter, signature
from itertools import chain
from types import SimpleNamespace
from typing import ClassVar, Literal, cast, get_args

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import Batch, example_losses, num_examples
from flower_ext.core.errors import refuse, whole
from flower_ext.core.protocol import Metrics
from flower_ext.privacy.example_gradients import (
    Call,
    Explicit,
    Gradients,
    Part,
    Sampler,
    clipped_sum,
    parts_of_calls,
)
from flower_ext.privacy.factorizations.factorization import Identity
from flower_ext.privacy.noise import NoiseStream
from flower_ext.privacy.silo_account import SiloAccount, ledger_path
from flower_ext.privacy.silo_budget import (
    SiloBudgetExhausted,
    SiloPrivacy,
    StepLedger,
    noise_for_steps,
)

GradSampleMode = Literal["hooks", "ghost"]

EXAMPLE_EPSILON = "example-epsilon"
EXAMPLE_DELTA = "example-delta"
USER_EPSILON = "user-epsilon"
USER_DELTA = "user-delta"
SPENT = (EXAMPLE_EPSILON, EXAMPLE_DELTA, USER_EPSILON, USER_DELTA)

# As good as no clipping, and 0 times it is 0.
_NO_CLIPPING = 1e30
_PROBES = 8


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch about hooks on layers whose input needs no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


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


class ExampleLevelDP(ClientHalf):
    r"""Plain local training, made private for every example of the silo by DP-SGD.

    It replaces plain training, whatever FedAvg-like strategy asks for it, Flower's own
    too. ::

        privacy = SiloPrivacy(epsilon=2.0, delta=1e-5, num_rounds=50, clipping_norm=1.0)
        app = client_app(task, partial(ExampleLevelDP, privacy))

    A ClientApp with it takes no other half, and refuses strategies that need one:
    FedFish's Fisher, MaxFL's and bounded group loss' sums of losses are read from raw
    data.

    Parameters
    ----------
    privacy : SiloPrivacy or callable
        ``Context -> SiloPrivacy`` where silos differ. Take what a silo promises from
        its own ``context.node_config``; run config and messages are the server's.
    mode : str (default: "hooks")
        ``hooks`` keeps every example's gradient (Opacus' ``GradSampleModule``, memory
        batch x parameters); ``ghost`` keeps what each layer has seen (memory of the
        activations), and forms gradients from it when they are needed, a few examples
        of one layer at a time. Both give the same model, up to rounding.
    release_train_loss : bool (default: False)
        Send ``train-loss``, estimated over the batches. It is not private.
    release_evaluation : bool (default: False)
        Answer evaluations with loss and metrics of the silo's test data, not only with
        their number. They are exact, and private for nobody.

    Raises
    ------
    SiloBudgetExhausted
        If the round would exceed the budget. Like the errors below it becomes the
        silo's error reply; nothing is trained or spent then.
    ValueError
        If a layer or the loss cannot be trained so (a BatchNorm, a trained parameter
        of half precision, DoRA; it is named), if ``max-gradient-norm`` is set, and if
        the user column is missing.
    ImportError
        Without Opacus.

    Notes
    -----
    **Guarantee.** Everything a silo sends in all its rounds together, but for what is
    listed below, is (epsilon, delta)-differentially private, by privacy loss
    distributions of the Poisson-sampled Gaussian mechanism, against a server that picks
    each model by what it saw before.

    *Unit*: one example; with ``max_examples_per_user`` one user with all examples in
    this silo (example-level sampling, ELS, of Charles et al.: accounted as a mixture of
    Gaussians). A person in several silos spends the sum of what they spend.

    *Neighbours*: the unit's contributions become zero, Flower's
    ``add-or-remove-one`` with a known number of examples. That number n is public: it
    is sent as ``num-examples`` (after the cap on users), it is in the probability
    :math:`q = \min(1, \text{batch-size} / n)`, and the weights are its.

    *Clipping*: norms and sums are those of the gradients as they were computed, in
    float64, and noise is added before anything is rounded to the parameters' type. So
    an example moves the sum by at most ``clipping_norm``, whatever cancels, overflows
    or vanishes under the weights that the server sends.

    *Sampling*: each step's batch is drawn anew. An empty one is a step too, and
    releases noise. Steps are ``local-steps``, or ``local-epochs`` times
    :math:`\lceil n / \text{batch-size} \rceil`.

    *Not protected*: n; who takes part when, and time; error replies; the test data of
    evaluations and ``train-loss``, where they are released; anything that ``Task``
    itself does with the data, such as standardising it. Momentum, weight decay and
    other optimizers (``Task.optimizer``) are post-processing and free.

    *Assumed*: the loss of an example, and its gradient as it is computed, depend on
    that example, not on the others of its batch or their number. Opacus' validators,
    the comparison of an example's gradient with autograd's, and of its loss in two
    batches, at the start of every round, find models and losses that break this,
    though not all that one can think of. Libraries choose algorithms by the size of a
    batch, which changes rounding: what weights that magnify it can do is not counted.

    *Randomness*: batches and noise come from ``os.urandom``, or from NumPy's SFC64
    generator, which is not cryptographic, with a ``seed``: then from (seed, client,
    round, steps taken) and a digest of received model, data, settings and run config.
    So a run can be repeated, and gives the same replies again, which tells nothing new;
    on anything else batches and noise are others. Take a new seed with every change of
    the silo's code, ``mode``, device or libraries. Opacus' own noise is not used:
    torch's CPU generator has 32 bits of seed. Dropout does draw from torch's, seeded
    secretly. Floating-point noise has gaps that a strong adversary may read (Mironov
    2012).

    *Budget*: with ``SiloPrivacy(ledger=...)`` the guarantee is for all runs that name
    the ledger together. Every round is charged to it, under a lock and flushed to the
    disk, before it trains: a crash costs the steps that it kept from being taken.
    Without a ledger the guarantee is for one run. The steps are kept in
    ``context.state``, which Flower keeps as long, and every run starts from 0: whoever
    may start runs decides what is spent. A run that goes on from a checkpoint, and a
    silo that was restarted or joins later than in round 1, are refused then, unless
    this process remembers the run.

    A gradient that is not finite counts as zero. The reply's metrics hold what is spent
    so far, ``example-epsilon`` and ``example-delta``, or ``user-epsilon`` and
    ``user-delta``; an average over silos means nothing, see :func:`worst_silo`.

    References
    ----------
    Abadi et al. 2016, "Deep learning with differential privacy", arXiv 1607.00133
    (DP-SGD); Bu et al. 2022, "Differentially private optimization on large model at
    small cost", arXiv 2210.00038 (gradients from what layers have seen, without a
    second backward pass; its norms of Gram matrices are not used); Charles et al. 2024,
    "Fine-tuning large language models with user-level differential privacy", arXiv
    2407.07737 (ELS); Yousefpour et al. 2021, arXiv 2109.12298 (Opacus).
    """

    exclusive: ClassVar[bool] = True

    def __init__(
        self,
        privacy: SiloPrivacy | Callable[[Context], SiloPrivacy],
        *,
        mode: GradSampleMode = "hooks",
        release_train_loss: bool = False,
        release_evaluation: bool = False,
    ) -> None:
        if not isinstance(privacy, SiloPrivacy) and not callable(privacy):
            refuse("privacy", privacy, "a SiloPrivacy, or a function that returns one")
        if mode not in get_args(GradSampleMode):
            refuse("mode", mode, f"one of {get_args(GradSampleMode)}")
        self._of_silo = privacy
        self._mode = mode
        self._release_train_loss = release_train_loss
        self._release_evaluation = release_evaluation
        self._evaluates = False
        self._steps = 0

    def begin(self, local: Local) -> None:
        """Refuse what cannot be private, plan the steps, and charge them."""
        privacy = self._privacy = self._of(local.context)
        if local.settings.max_gradient_norm != math.inf:
            refuse(
                "max-gradient-norm",
                local.settings.max_gradient_norm,
                "left out",
                "clipping_norm bounds the gradient of every example",
            )
        if privacy.max_examples_per_user:
            local.train = _capped(local.train, privacy)
        path = None if privacy.ledger is None else ledger_path(privacy.ledger)
        account = SiloAccount(
            path,
            local.context.state,
            client=local.client,
            server_round=local.server_round,
            run=local.run,
        )
        with account.locked():
            self._charge(local, account)

    def _charge(self, local: Local, account: SiloAccount) -> None:
        """Plan the round, see that it can be trained, and charge its steps."""
        privacy, size = self._privacy, num_examples(local.train)
        kept = account.read()
        ledger = StepLedger.read(kept, privacy)
        self._done, self._steps = ledger.total, local.num_steps
        if not self._steps:
            self._spent = ledger.epsilon(privacy.delta)
            return
        account.require(kept)
        if privacy.delta >= 1 / size:
            warnings.warn(
                f"delta={privacy.delta} should be < 1 / examples={1 / size:.3g}: "
                "publishing one whole example would satisfy it",
                stacklevel=3,
            )
        self._rate = min(1.0, local.settings.batch_size / size)
        self._expected = self._rate * size
        self._noise_multiplier = self._calibrated(kept)
        charged = ledger.add(self._rate, self._noise_multiplier, self._steps)
        self._spent = charged.epsilon(privacy.delta)
        # Not "spent > limit": NaN must count as exceeding.
        if privacy.limit is not None and not self._spent <= privacy.limit:
            raise SiloBudgetExhausted(
                f"round {local.server_round} would exceed max_epsilon={privacy.limit} "
                f"at delta={privacy.delta}: {ledger.epsilon(privacy.delta):.6g} is "
                f"spent, it would be {self._spent:.6g}; nothing was trained"
            )
        self._wrap(local)
        # Charged before the first step: a training that breaks off has cost its steps.
        record = charged.record()
        if target := self._target:
            record["noise-multiplier"] = self._noise_multiplier
            record["target"] = target
        account.write(record)

    def _of(self, context: Context) -> SiloPrivacy:
        found = self._of_silo
        if not isinstance(found, SiloPrivacy):
            found = found(context)
        if not isinstance(found, SiloPrivacy):
            refuse("privacy(context)", found, "a SiloPrivacy")
        return found

    @property
    def _target(self) -> list[float] | None:
        """What noise is sought for, if it is."""
        privacy = self._privacy
        if privacy.epsilon is None or privacy.num_rounds is None:
            return None
        return [privacy.epsilon, privacy.delta, float(privacy.num_rounds)]

    def _calibrated(self, kept: ConfigRecord | None) -> float:
        """Return the noise multiplier: given, kept, or sought for the target."""
        privacy = self._privacy
        if privacy.noise_multiplier is not None:
            return float(privacy.noise_multiplier)
        if kept is not None and kept.get("target") == self._target:
            return cast(float, kept["noise-multiplier"])
        assert privacy.epsilon is not None and privacy.num_rounds is not None
        return noise_for_steps(
            privacy.epsilon,
            privacy.delta,
            privacy.num_rounds * self._steps,
            self._rate,
            privacy.group_size,
        )

    def _wrap(self, local: Local) -> None:
        """Let Opacus compute gradients per example, and see that it can."""
        self._opacus = _import_opacus()
        local.model.train()
        _refuse_layers(local.model, self._opacus)
        self._trained = {
            name: p for name, p in local.model.named_parameters() if p.requires_grad
        }
        if not self._trained:
            refuse("model", type(local.model).__name__, "one with parameters to train")
        for name, p in self._trained.items():
            if p.dtype not in (torch.float32, torch.float64):
                refuse(
                    f"parameter {name!r}",
                    p.dtype,
                    "torch.float32 or torch.float64",
                    "what one example adds to a half-precision gradient is lost or "
                    "grows in rounding; freeze it, or train it in float32",
                )
        self._buffers = {n: b.clone() for n, b in local.model.named_buffers()}
        try:
            self._wrapped = self._opacus.wrap[self._mode](
                local.model, loss_reduction="sum"
            )
            self._probe(local)
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"the model has no gradient per example in mode={self._mode!r}: "
                f"{type(error).__name__}: {error}"
            ) from error

    @property
    def _bound(self) -> float:
        return min(self._privacy.clipping_norm, _NO_CLIPPING)

    def _probe(self, local: Local) -> None:
        """Compare with autograd: a gradient that hooks do not see is not clipped."""
        size = num_examples(local.train)
        with torch.random.fork_rng(devices=[]):
            norms = []
            for i in range(min(size, _PROBES)):
                example = {name: c[i : i + 1] for name, c in local.train.items()}
                norms.append(self._seen_norm(local, example))
                if 0 < norms[-1] < math.inf:
                    break
            if not any(map(math.isfinite, norms)):
                raise ValueError(
                    f"no gradient of the first {len(norms)} examples is finite: has "
                    "the received model diverged?"
                )
            if size > 2:
                # Both batches have the same shape, so that dropout is the same.
                one, other = (
                    self._losses_of(local, torch.tensor([0, i])) for i in (1, 2)
                )
                if not torch.allclose(one[0], other[0], rtol=1e-3, equal_nan=True):
                    raise ValueError(
                        "the loss of an example must not depend on the other examples "
                        "of its batch: a layer or Task.loss mixes them"
                    )
        self._wrapped.zero_grad(set_to_none=True)
        self._keep_buffers(local.model)

    def _keep_buffers(self, model: nn.Module) -> None:
        """Refuse buffers that the data have changed: they are sent, without noise."""
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, self._buffers[name]):
                raise ValueError(
                    f"buffer {name!r} changed in training and is not private: a "
                    "layer keeps statistics of the data"
                )

    @torch.no_grad()
    def _losses_of(self, local: Local, chosen: Tensor) -> Tensor:
        torch.manual_seed(0)
        batch = {name: column[chosen] for name, column in local.train.items()}
        return example_losses(local.task, local.model, batch)

    def _seen_norm(self, local: Local, example: Batch) -> float:
        """Return the gradient norm of one example, which Opacus must see as well."""
        _, parts = self._backward(local, example)
        real = {
            name: 0.0 if p.grad is None else float(p.grad.double().norm())
            for name, p in self._trained.items()
        }
        total = math.hypot(*real.values())
        norms = {p: float(n) for part in parts for p, n in part.norms().items()}
        for name, p in self._trained.items() if math.isfinite(total) else ():
            seen = norms.get(p, 0.0)
            if not abs(seen - real[name]) <= 1e-3 * real[name] + 1e-5 * total:
                # Without the norms: the server reads it, and they are of raw data.
                raise ValueError(
                    f"parameter {name!r}: Opacus does not see all of an example's "
                    "gradient: Task.loss must use parameters through model(...) and "
                    "its layers only, with the batch as their first dimension"
                )
        return total

    def _backward(self, local: Local, batch: Batch) -> tuple[float, list[Part]]:
        """Return the summed loss and the gradients of the examples."""
        self._wrapped.zero_grad(set_to_none=True)
        losses = example_losses(local.task, local.model, batch)
        with _quiet():
            losses.sum().backward()  # type: ignore[no-untyped-call]
        return float(losses.detach().sum()), self._parts(len(losses))

    def _parts(self, size: int) -> list[Part]:
        """Return the gradients that the backward pass has left."""
        if self._mode == "ghost":
            calls = self._wrapped.calls
            for call in calls:
                for value in (call.backprops, *call.inputs):
                    self._require_batch(call.module.parameters(), value, size)
            return parts_of_calls(calls, self._opacus.sampler)
        parts: list[Part] = []
        for p in self._trained.values():
            found = p.grad_sample  # type: ignore[attr-defined]
            if found is not None:
                self._require_batch([p], found, size)
                of = partial(_rows_of, p, found)
                parts.append(Explicit([p], size, of, kept=True))
        return parts

    def _require_batch(
        self, parameters: Iterable[nn.Parameter], values: Tensor, size: int
    ) -> None:
        """Require values for every example of the batch."""
        if len(values) != size:
            names = {p: name for name, p in self._trained.items()}
            name = next(names[p] for p in parameters if p in names)
            raise ValueError(
                f"parameter {name!r} has gradients for {len(values)} examples in a "
                f"batch of {size}: the batch must be the first dimension in every layer"
            )

    def optimizer(self, local: Local) -> torch.optim.Optimizer:
        """Return Opacus' optimizer around the task's; clipping and noise are ours."""
        inner = super().optimizer(local)
        if not self._steps:
            return inner
        stepped = [p for group in inner.param_groups for p in group["params"]]
        if set(stepped) != set(self._trained.values()):
            raise ValueError(
                "Task.optimizer must train the parameters that it is given and no "
                "other: those have gradients that are not private"
            )
        self._keys = self._secret_keys(local)
        self._noise = NoiseStream(
            Identity(self._steps),
            {name: tuple(p.shape) for name, p in self._trained.items()},
            seed=None if self._keys is None else self._keys[1],
            secure=self._keys is None,
            dtype="float64",
        )
        outer = self._opacus.optimizer(
            inner,
            noise_multiplier=0.0,
            max_grad_norm=self._bound,
            expected_batch_size=self._expected,
        )
        return cast(torch.optim.Optimizer, outer)

    def _secret_keys(self, local: Local) -> Sequence[int] | None:
        """Return keys of batches, noise and dropout, or None without a seed.

        They depend on whatever decides what the round computes. So the same noise comes
        again in the same reply only, and never on another model or on other data, where
        the difference of two replies would be free of it.
        """
        seed = self._privacy.seed
        if seed is None:
            return None
        hashed = sha256()
        plan = (self._bound, self._noise_multiplier, self._rate, self._steps)
        run_config = sorted(local.context.run_config.items())
        hashed.update(repr((plan, local.settings, run_config)).encode())
        tensors = chain(
            local.model.named_parameters(),
            local.model.named_buffers(),
            sorted(local.train.items()),
        )
        for name, tensor in tensors:
            octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            hashed.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            hashed.update(octets.numpy().data)
        sources = [seed, local.client, local.server_round, self._done]
        sequence = np.random.SeedSequence([*sources, _word(hashed.digest())])
        return [_word(s.generate_state(4).tobytes()) for s in sequence.spawn(3)]

    def batches(self, local: Local) -> Iterator[Batch]:
        """Draw every step's batch: each example independently, maybe none."""
        if not self._steps:
            return
        size = num_examples(local.train)
        keys = self._keys
        coins = None if keys is None else np.random.Generator(np.random.SFC64(keys[0]))
        # With a public seed the server would know which example had which mask.
        torch.manual_seed(_word(os.urandom(8)) if keys is None else keys[2] % 2**63)
        try:
            for _ in range(self._steps):
                chosen = torch.from_numpy(_poisson(size, self._rate, coins))
                yield {k: column[chosen] for k, column in local.train.items()}
        finally:
            self._wrapped.to_standard_module()

    def step(
        self, local: Local, optimizer: torch.optim.Optimizer, batch: Batch
    ) -> float:
        """Clip, add up, add noise and step; return the summed loss over q n."""
        optimizer.zero_grad()
        size = num_examples(batch)
        total, parts = self._backward(local, batch) if size else (0.0, [])
        clipped = clipped_sum(parts, size, self._bound)
        # "and": 0 noise of infinite scale is no noise.
        noise = self._noise_multiplier and self._noise_multiplier * self._bound
        drawn = self._noise.next(noise)
        for name, p in self._trained.items():
            noisy = torch.from_numpy(drawn[name]).to(p.device)
            if p in clipped:
                noisy += clipped[p]
            # Rounding to the parameter's own type comes after the noise.
            p.grad = noisy.to(p.dtype)
        optimizer.step()
        return total / self._expected

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return what is spent so far; refuse buffers that the data have changed."""
        if self._steps:
            self._keep_buffers(local.model)
        users = self._privacy.max_examples_per_user is not None
        names = (
            (USER_EPSILON, USER_DELTA) if users else (EXAMPLE_EPSILON, EXAMPLE_DELTA)
        )
        epsilon, delta = names
        return {}, {epsilon: self._spent, delta: self._privacy.delta}

    def evaluate(self, local: Local) -> Metrics:
        """Note that it is an evaluation that is answered."""
        self._evaluates = True
        return {}

    def release(self, metrics: Metrics) -> Metrics:
        """Withhold what is not private, unless it was asked for."""
        if self._evaluates:
            kept = metrics if self._release_evaluation else {"num-examples"}
        else:
            kept = {"num-examples", *SPENT}
            kept |= {"train-loss"} if self._release_train_loss else set()
        return {name: value for name, value in metrics.items() if name in kept}


def worst_silo(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Average metrics as Flower does, but report the largest epsilon and delta spent.

    A ``train_metrics_aggr_fn`` for federations with :class:`ExampleLevelDP`. It speaks
    of the silos that replied in this round; one that did not has spent what it
    reported last.

    Examples
    --------
    >>> spent = [{"num-examples": 90, "example-epsilon": 1.0},
    ...          {"num-examples": 10, "example-epsilon": 4.0}]
    >>> silos = [RecordDict({"metrics": MetricRecord(m)}) for m in spent]
    >>> worst_silo(silos, "num-examples")["example-epsilon"]
    4.0
    """
    average = FedAvg().train_metrics_aggr_fn
    found = MetricRecord(dict(average(contents, weighted_by_key)))
    for content in contents:
        for record in content.metric_records.values():
            for name in set(SPENT) & set(record):
                found[name] = max(float(record[name]), float(found[name]))  # type: ignore[arg-type]
    return found


def _capped(data: Batch, privacy: SiloPrivacy) -> Batch:
    """Return the data with at most G examples of every user."""
    if privacy.user not in data:
        refuse("user", privacy.user, f"one of the data's columns {sorted(data)}")
    num_examples(data)  # the columns are as long as each other
    kept = keep_per_user(data[privacy.user], privacy.group_size)
    return {name: column[kept] for name, column in data.items()}


def _refuse_layers(model: nn.Module, opacus: SimpleNamespace) -> None:
    """Refuse layers that mix examples or keep statistics of them."""
    mixing = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for name, module in model.named_modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        problems: list[object] = []
        for kind, check in opacus.validators.items():
            # Opacus looks at trained layers only; a frozen BatchNorm mixes as well.
            mixes = isinstance(module, mixing) and module.training
            if isinstance(module, kind) and (trains or mixes):
                problems += check(module)
        if trains and _needed_inputs(module) > 1:
            problems.append("its forward needs more than one input, as DoRA's does")
        if getattr(module, "max_norm", None) is not None:
            problems.append("max_norm changes rows that the data choose, without noise")
        if trains and not problems and any(True for _ in module.buffers()):
            problems.append("a trained layer with buffers, which are not private")
        if problems:
            raise ValueError(
                f"layer {name or 'model'!r} ({type(module).__name__}) cannot be "
                f"trained with example-level privacy: {problems[0]}"
            )


def _needed_inputs(module: nn.Module) -> int:
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return sum(
        p.default is Parameter.empty and p.kind not in kinds
        for p in signature(module.forward).parameters.values()
    )


def _rows_of(p: Tensor, gradients: Tensor, rows: slice) -> Gradients:
    return {p: gradients[rows]}


def _word(octets: bytes) -> int:
    return int.from_bytes(octets, "little")


def _poisson(
    size: int, rate: float, coins: np.random.Generator | None
) -> np.typing.NDArray[np.intp]:
    """Return the indices that fall into a batch."""
    if coins is not None:
        return np.flatnonzero(coins.random(size) < rate)
    words = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
    return np.flatnonzero((words >> np.uint64(11)) * 2.0**-53 < rate)


def _import_opacus() -> SimpleNamespace:
    """Import what is used of Opacus."""
    try:
        from opacus.grad_sample import GradSampleModule
        from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.validators import ModuleValidator
    except ImportError as error:
        raise ImportError(
            "example-level privacy needs Opacus: pip install 'flower-ext[dp]'"
        ) from error

    class Remembering(GradSampleModule):  # type: ignore[misc]
        """Keeps what layers have seen instead of gradients per example."""

        def __init__(self, model: nn.Module, *, loss_reduction: str) -> None:
            super().__init__(model, loss_reduction=loss_reduction)
            self.calls: list[Call] = []

        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none)
            self.calls = []

        def capture_backprops_hook(
            self,
            module: nn.Module,
            _forward_input: object,
            forward_output: Sequence[Tensor],
            loss_reduction: str,
            batch_first: bool,
        ) -> None:
            inputs, backprops = self.rearrange_grad_samples(
                module=module,
                backprops=forward_output[0].detach(),
                loss_reduction=loss_reduction,
                batch_first=batch_first,
            )
            self.calls.append(Call(module, inputs, backprops))

    def sampler(module: nn.Module) -> Sampler:
        known = GradSampleModule.GRAD_SAMPLERS
        return cast(Sampler, known.get(type(module), ft_compute_per_sample_gradient))

    return SimpleNamespace(
        wrap={"hooks": GradSampleModule, "ghost": Remembering},
        sampler=sampler,
        # It scales and steps; "clipped already" is what sets it apart.
        optimizer=DPOptimizerFastGradientClipping,
        validators=ModuleValidator.VALIDATORS,
    )
