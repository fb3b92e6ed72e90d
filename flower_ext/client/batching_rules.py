"""Operations in the forward pass of several clients at once.

``torch.func.vmap`` turns what one client computes into what all do, operation by
operation. The rules here are for those where it has none, or not the right one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flower_ext.client.seeds import Globals


class NotFillable(Exception):  # noqa: N818
    """The losses of a batch are others when it is filled up; nothing has changed."""


class Random(Protocol):
    """Who has random states of its own, which are made when they are asked for."""

    @property
    def globals(self) -> Globals:
        """The states."""


class BatchingRules(TorchFunctionMode):
    """Rules for operations that ``vmap`` has none for, or not the right one.

    Dropout draws the masks of each client from its own generator.

    Parameters
    ----------
    clients : sequence, optional
        The clients with their random states, in the order of the stack. Without them
        nothing is dropped.
    filled : bool
        Whether batches are filled up. Then nothing can be dropped: masks would be
        others.
    """

    def __init__(self, clients: Sequence[Random] | None, *, filled: bool) -> None:
        super().__init__()
        self._clients = clients
        self._filled = filled
        self._generators: list[torch.Generator] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        replaced = self._replaced.get(func)
        if replaced is None:
            return func(*args, **(kwargs or {}))
        return replaced(self, *args, **(kwargs or {}))

    def _dropout(
        self,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        return self._masked(input, None, p, training, inplace)

    def _dropout_of_channels(
        self,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        shape = (*input.shape[:2], *[1] * (input.dim() - 2))
        return self._masked(input, shape, p, training, inplace)

    def _masked(
        self,
        x: Tensor,
        shape: tuple[int, ...] | None,
        p: float,
        training: bool,
        inplace: bool,
    ) -> Tensor:
        if not training or p == 0 or self._clients is None:
            return x
        if self._filled:
            raise NotFillable
        mask: Tensor = _Masks.apply(x, shape, p, self._draw)  # type: ignore[no-untyped-call]
        return x.mul_(mask) if inplace else x * mask

    def _draw(self, x: Tensor, shape: tuple[int, ...] | None, p: float) -> Tensor:
        """Return the masks of all clients, of a shape or like each of the values."""
        if not self._generators:
            self._generators = [_generator(c.globals, x) for c in self._clients or ()]
        masks = [
            # Values are drawn in the order in which they lie in memory.
            torch.empty_like(own) if shape is None else own.new_empty(shape)
            for own in x
        ]
        for mask, generator in zip(masks, self._generators, strict=True):
            mask.bernoulli_(1 - p, generator=generator)
        found = torch.stack(masks)
        return found.div_(1 - p) if p < 1 else found

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend as always, or in single steps where there is no rule for all."""
        if dropout_p == 0 and query.is_cuda:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if enable_gqa:
            key, value = (
                x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)
                for x in (key, value)
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.transpose(-2, -1) * scale
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], device=query.device).tril().bool()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        # Where nothing is to be seen, the weights are zero.
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        return self._dropout(weights, dropout_p) @ value

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        """Look up; the row of the padding has no gradient, which vmap forgets."""
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise RuntimeError("embeddings with max_norm, or gradients of their own")
        found = F.embedding(input, weight)
        if padding_idx is None:
            return found
        padding = (input == padding_idx % weight.shape[0])[..., None]
        return torch.where(padding, found.detach(), found)

    def keep(self) -> None:
        """Take note of what was drawn; without it, it is drawn again."""
        if self._generators and self._clients:
            for generator, client in zip(self._generators, self._clients, strict=True):
                _keep(generator, client.globals)

    _replaced: ClassVar[Mapping[Callable[..., Any], Callable[..., Tensor]]] = {
        F.dropout: _dropout,
        F.dropout1d: _dropout_of_channels,
        F.dropout2d: _dropout_of_channels,
        F.dropout3d: _dropout_of_channels,
        F.scaled_dot_product_attention: _attention,
        F.embedding: _embedding,
    }


class _Masks(torch.autograd.Function):
    """Draws masks where all clients are in sight, and not one for all."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, shape: Any, p: float, draw: Any) -> Tensor:
        raise RuntimeError("dropout of values that all clients share")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, shape: Any, p: float, draw: Any
    ) -> tuple[Tensor, int]:
        return draw(x.movedim(in_dims[0], 0), shape, p), 0


def _generator(own: Globals, like: Tensor) -> torch.Generator:
    generator = torch.Generator(like.device)
    generator.set_state(own.cuda[like.device.index or 0] if like.is_cuda else own.torch)
    return generator


def _keep(generator: torch.Generator, own: Globals) -> None:
    if generator.device.type == "cuda":
        own.cuda[generator.device.index or 0] = generator.get_state()
    else:
        own.torch = generator.get_state()
