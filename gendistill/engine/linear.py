"""Linear layers that read the same input, as one matrix product on weights that are cast once a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from gendistill.engine.adapted import Adapters, plain
from gendistill.engine.products import grad_dtype, product
from gendistill.ops import thin
from gendistill.ops.select import Impl

# rows of a packed matrix: products with other widths fall off the fast paths of matrix units
_MULTIPLE = 8


class PackedLinear:
    """Linear layers that read the same input, their weights one below the other in the dtype of arithmetic.

    The layers keep their parameters, and get the gradients. Parameters that do not learn and have that dtype already
    become views of the packed matrix, which then costs no memory; :meth:`release` gives them memory of their own.
    Adapters beside a layer stay beside it: what they add is added to its output.

    Args:
        layers: Of one input width; with biases or without, plain or with an adapter.
        dtype: Of arithmetic.
        learns: Whether an optimizer changes parameters that require a gradient.

    Attributes:
        adapters: Of those layers that have one; None without any.
        sources, targets: Parameters, and where each is in ``matrix`` or ``bias``.
        matrix: ``[rows, in_features]``; zeros below the last layer.
        bias: ``[rows]``, or None.
        widths: Outputs of each layer.
    """

    adapters: Adapters | None = None

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype, *, learns: bool = True) -> None:
        given, layers = layers, [plain(layer) for layer in layers]
        self.layers = tuple(layers)
        self._learns = learns
        self.widths = tuple(layer.out_features for layer in layers)
        self.parameters: list[Tensor] = [layer.weight for layer in layers]
        self.biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        total = sum(self.widths)
        rows = total if len(self.layers) == 1 else -(-total // _MULTIPLE) * _MULTIPLE
        first = self.parameters[0]
        self.matrix = torch.zeros(rows, first.shape[1], dtype=dtype, device=first.device)
        self.bias = torch.zeros(rows, dtype=dtype, device=first.device) if self.biases else None
        self.places = list(pairwise(accumulate(self.widths, initial=0)))
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []
        for layer, (start, end) in zip(self.layers, self.places, strict=True):
            self._take(layer.weight, self.matrix[start:end])
            if layer.bias is not None:
                assert self.bias is not None
                self._take(layer.bias, self.bias[start:end])
        if any(layer is not own for layer, own in zip(given, layers, strict=True)):
            self.adapters = Adapters(given, self.places, dtype)
            self.sources += self.adapters.parameters
            self.targets += self.adapters.targets

    def part(self, layers: Sequence[nn.Linear]) -> PackedLinear:
        """Return some of the layers, which follow each other here, as if packed alone, in the same memory."""
        first = self.layers.index(layers[0])
        start, end = self.places[first][0], self.places[first + len(layers) - 1][1]
        if end == self.places[-1][1]:
            # with the zeros below
            end = len(self.matrix)
        made = PackedLinear.__new__(PackedLinear)
        made.layers, made._learns = tuple(layers), self._learns
        made.widths = self.widths[first : first + len(layers)]
        made.parameters = [layer.weight for layer in layers]
        made.biases = [layer.bias for layer in layers if layer.bias is not None]
        made.matrix = self.matrix[start:end]
        made.bias = self.bias[start:end] if self.bias is not None and made.biases else None
        made.places = list(pairwise(accumulate(made.widths, initial=0)))
        # whoever has the whole refreshes it
        made.sources, made.targets = [], []
        return made

    @torch.no_grad()
    def _take(self, parameter: Tensor, target: Tensor) -> None:
        if parameter.dtype == target.dtype and not (self._learns and parameter.requires_grad):
            target.copy_(parameter)
            parameter.data = target
        self.sources.append(parameter)
        self.targets.append(target)

    def release(self) -> None:
        """Give parameters that are views of the matrix memory of their own."""
        for parameter, target in zip(self.sources, self.targets, strict=True):
            if parameter.data_ptr() == target.data_ptr():
                parameter.data = parameter.data.clone()
        self.sources, self.targets = [], []

    def saved(self) -> Tensor | None:
        """Return what a function keeps of the matrix for its backward pass."""
        return self.matrix

    @property
    def weights(self) -> list[Tensor]:
        """The weights, then the factors of the adapters: what :meth:`weight_grads` returns gradients of."""
        return [*self.parameters, *(self.adapters.parameters if self.adapters else ())]

    @property
    def learns(self) -> bool:
        """Whether any of them learns."""
        return any(weight.requires_grad for weight in self.weights)

    def adapt(self, out: Tensor, x: Tensor) -> Tensor:
        """Add what adapters say about ``x`` ``[N, in_features]`` to ``out`` ``[N, rows]``, in place, and return it."""
        if self.adapters:
            self.adapters.add_to(out, x)
        return out

    def outer(self, grad: Tensor) -> Tensor | None:
        """Return the gradient between the factors of adapters from that of the output; None without adapters."""
        return self.adapters.outer(grad) if self.adapters else None

    def input_grad(self, grad: Tensor, matrix: Tensor, outer: Tensor | None) -> Tensor:
        """Return the gradient of the input ``[N, in_features]``.

        Args:
            grad: Of the output, ``[N, rows]``.
            matrix: As many rows of the packed one.
            outer: What :meth:`outer` returns.
        """
        found = grad @ matrix
        return found.addmm_(outer, self.adapters.down) if self.adapters and outer is not None else found

    def weight_grads(self, grad: Tensor, x: Tensor, outer: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of :attr:`weights` that learn."""
        found = _weight_grads(grad, x, self.places, self.parameters)
        return found + self.adapters.grads(grad, x, outer) if self.adapters and outer is not None else found

    def is_thin(self, x: Tensor) -> bool:
        """Say whether as many rows as those of ``x`` ``[..., K]`` are so few that kernels of their own take them."""
        return thin.suits(x, self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        """Run all layers on ``[..., in_features]``; returns ``[..., rows]`` in the dtype of arithmetic."""
        if self.is_thin(x):
            flat = x.flatten(0, -2).to(self.matrix.dtype)
            out = thin.thin_linear(flat, self.matrix, self.bias, impl=Impl.TRITON)
            return self.adapt(out, flat).view(*x.shape[:-1], -1)
        return _Packed.apply(x, self, *self.weights, *self.biases)  # pyright: ignore[reportReturnType]

    def split(self, out: Tensor) -> tuple[Tensor, ...]:
        """Cut an output into those of the layers."""
        if self.widths == out.shape[-1:]:
            # going backward, a part that is all of it would be copied
            return (out,)
        rest = out.shape[-1] - sum(self.widths)
        return out.split([*self.widths, rest] if rest else list(self.widths), dim=-1)[: len(self.widths)]


class GatheredLinear(PackedLinear):
    """Linear layers whose parameters are split among processes, and whole only while their decoder layer runs.

    The matrix is put together whenever it is asked for, also in the backward pass, for which the parameters are
    gathered again; kept in between, it would take the memory that splitting saves.

    Args:
        layers: As for :class:`PackedLinear`.
        dtype: Of arithmetic.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        self.layers = tuple(layers)
        self.dtype = dtype
        self.widths = tuple(layer.out_features for layer in layers)
        self.places = list(pairwise(accumulate(self.widths, initial=0)))
        self.sources, self.targets = [], []

    @property
    def parameters(self) -> list[Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weights as they are at the moment."""
        return [layer.weight for layer in self.layers]

    @property
    def biases(self) -> list[Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The biases as they are at the moment."""
        return [layer.bias for layer in self.layers if layer.bias is not None]

    @property
    def matrix(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weights in the dtype of arithmetic, one below the other."""
        return self._pack([layer.weight for layer in self.layers])

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The biases likewise; zeros for a layer that has none."""
        if not self.biases:
            return None
        return self._pack(
            [
                layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
                for layer in self.layers
            ]
        )

    def saved(self) -> Tensor | None:
        """Keep nothing."""
        return None

    def is_thin(self, x: Tensor) -> bool:
        """No: such kernels read weights ahead, and these have only just been put together."""
        return False

    def _pack(self, parts: list[Tensor]) -> Tensor:
        parts = [part.detach().to(self.dtype) for part in parts]
        if len(parts) == 1:
            return parts[0]
        if rest := -sum(self.widths) % _MULTIPLE:
            parts.append(parts[0].new_zeros(rest, *parts[0].shape[1:]))
        return torch.cat(parts)


class PackedDiagonal:
    """Linear layers of which each reads its part of what lies side by side, as one product, without gradients.

    The matrix has their weights on its diagonal and zeros beside them. So few rows as a decode step has cost no more
    than those of the largest layer: such products take the time that it takes to launch them.

    Args:
        layers: Plain, with biases or without.
        dtype: Of arithmetic.

    Attributes:
        sources, targets: Parameters, and where each is in ``matrix`` or ``bias``.
        matrix: ``[outputs, inputs]``, of all layers.
        bias: ``[outputs]``, or None.
        widths: Outputs of each layer.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        self.widths = tuple(layer.out_features for layer in layers)
        device = layers[0].weight.device
        total, inputs = sum(self.widths), sum(layer.in_features for layer in layers)
        self.matrix = torch.zeros(total, inputs, dtype=dtype, device=device)
        biased = any(layer.bias is not None for layer in layers)
        self.bias = torch.zeros(total, dtype=dtype, device=device) if biased else None
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []
        row = column = 0
        for layer in layers:
            rows, columns = slice(row, row + layer.out_features), slice(column, column + layer.in_features)
            self.sources.append(layer.weight)
            self.targets.append(self.matrix[rows, columns])
            if self.bias is not None and layer.bias is not None:
                self.sources.append(layer.bias)
                self.targets.append(self.bias[rows])
            row, column = rows.stop, columns.stop

    def release(self) -> None:
        """Let go of the parameters, which are where they were."""
        self.sources, self.targets = [], []

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run all layers on ``[..., inputs]``; returns the output ``[..., out_features]`` of each."""
        flat = x.flatten(0, -2).to(self.matrix.dtype)
        if thin.suits(x, self.matrix):
            out = thin.thin_linear(flat, self.matrix, self.bias, impl=Impl.TRITON)
        else:
            out = F.linear(flat, self.matrix, self.bias)
        return out.view(*x.shape[:-1], -1).split(self.widths, dim=-1)


def can_lie_diagonally(layers: Sequence[nn.Linear]) -> bool:
    """Say whether there are several layers, none with an adapter, and this process has their parameters whole."""
    return len(layers) > 1 and not any(
        plain(layer) is not layer or isinstance(layer.weight, DTensor) for layer in layers
    )


def pack(layers: Sequence[nn.Linear], dtype: torch.dtype, *, learns: bool = True) -> PackedLinear:
    """Pack linear layers, whether this process has their weights whole or not."""
    if any(isinstance(plain(layer).weight, DTensor) for layer in layers):
        return GatheredLinear(layers, dtype)
    return PackedLinear(layers, dtype, learns=learns)


def pack_groups(
    groups: Sequence[tuple[nn.Linear, ...]], dtype: torch.dtype, *, learns: bool = True
) -> dict[tuple[nn.Linear, ...], PackedLinear]:
    """Pack several groups; one whose layers are part of another's shares its memory.

    The larger is left out where they cannot share: if an adapter stands beside a layer, if parameters are split among
    processes, or if a product with the smaller one's rows would be slow.

    Args:
        groups: A larger one before those that are part of it.
        dtype: Of arithmetic.
        learns: As for :class:`PackedLinear`.
    """
    made: dict[tuple[nn.Linear, ...], PackedLinear] = {}
    for group in groups:
        whole = next((packed for larger, packed in made.items() if {*group} < {*larger}), None)
        if whole is not None:
            made[group] = whole.part(group)
        elif all(_can_share(group, other) for other in groups if {*other} < {*group}):
            made[group] = pack(group, dtype, learns=learns)
    return made


def _can_share(group: tuple[nn.Linear, ...], part: tuple[nn.Linear, ...]) -> bool:
    if any(plain(layer) is not layer or isinstance(layer.weight, DTensor) for layer in group):
        return False
    ends = [0, *accumulate(layer.out_features for layer in group)]
    start, end = group.index(part[0]), group.index(part[-1]) + 1
    return ends[start] % _MULTIPLE == 0 and (end == len(group) or ends[end] % _MULTIPLE == 0)


def _weight_grads(
    grad: Tensor, x: Tensor, places: Sequence[tuple[int, int]], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradient of every packed weight that learns, as it wants it, from one product if all of them do.

    Args:
        grad: ``[N, rows]``.
        x: ``[N, in_features]``.
        places: First and one past the last row of each weight.
        parameters: The weights.
    """
    wanted = [parameter.requires_grad for parameter in parameters]
    if not any(wanted):
        return [None] * len(wanted)
    if all(wanted):
        whole = product(grad.T, x)
        return [
            whole[start:end].to(grad_dtype(parameter))
            for (start, end), parameter in zip(places, parameters, strict=True)
        ]
    return [
        product(grad[:, start:end].T, x).to(grad_dtype(parameter)) if parameter.requires_grad else None
        for (start, end), parameter in zip(places, parameters, strict=True)
    ]


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedLinear, *parameters: Tensor) -> Tensor:
        # as a matrix: with more dimensions, a bias would be added in a pass of its own
        matrix = packed.matrix
        flat = x.flatten(0, -2).to(matrix.dtype)
        ctx.packed, ctx.shape, ctx.dtype = packed, x.shape, x.dtype
        ctx.save_for_backward(flat, packed.saved())
        return packed.adapt(F.linear(flat, matrix, packed.bias), flat).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        packed: PackedLinear = ctx.packed
        flat = grad.flatten(0, -2)
        if matrix is None:
            matrix = packed.matrix
        outer, grad_x = packed.outer(flat), None
        if ctx.needs_input_grad[0]:
            grad_x = packed.input_grad(flat, matrix, outer).view(ctx.shape).to(ctx.dtype)
        grads = packed.weight_grads(flat, x, outer)
        bias_grads: list[Tensor | None] = [None] * len(packed.biases)
        if any(bias.requires_grad for bias in packed.biases):
            sums = flat.sum(0, dtype=torch.promote_types(flat.dtype, torch.float32))
            places = [
                place
                for place, layer in zip(packed.places, packed.layers, strict=True)
                if layer.bias is not None
            ]
            bias_grads = [
                sums[start:end].to(grad_dtype(bias)) if bias.requires_grad else None
                for (start, end), bias in zip(places, packed.biases, strict=True)
            ]
        return (grad_x, None, *grads, *bias_grads)
