"""Hypercomplex layers: convolution, linear, batch normalization over complex, double, dual numbers and quaternions."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..files import require
from .images import replace_modules

logger = logging.getLogger(__name__)

#: Products of the units: ALGEBRAS[name][i][j] = (k, sign) says that e_i e_j = sign * e_k; e_0 = 1.
ALGEBRAS: dict[str, list[list[tuple[int, int]]]] = {
    "complex": [[(0, 1), (1, 1)], [(1, 1), (0, -1)]],
    "double": [[(0, 1), (1, 1)], [(1, 1), (0, 1)]],
    "dual": [[(0, 1), (1, 1)], [(1, 1), (0, 0)]],
    "quaternion": [
        [(0, 1), (1, 1), (2, 1), (3, 1)],
        [(1, 1), (0, -1), (3, 1), (2, -1)],
        [(2, 1), (3, -1), (0, -1), (1, 1)],
        [(3, 1), (2, 1), (1, -1), (0, -1)],
    ],
}


def structure(algebra: str) -> torch.Tensor:
    """
    Return the structure constants C of an algebra: float `[n, n, n]`, (w x)_k = sum over i, j of C[k, i, j] w_i x_j.

    Raises:
        ValueError: for an algebra that is not known.
    """
    require(algebra in ALGEBRAS, "algebra", algebra, f"choose one of {', '.join(ALGEBRAS)}")
    table = ALGEBRAS[algebra]
    constants = torch.zeros(len(table), len(table), len(table))
    for i, row in enumerate(table):
        for j, (k, sign) in enumerate(row):
            constants[k, i, j] = sign
    return constants


class _Hypercomplex(nn.Module):
    """
    What the layers share: a weight of n components, and the real matrix of blocks that multiplies by it from the left.

    Channels are ordered by component: all real parts first, then all parts of e_1, and so on.
    """

    def __init__(self, algebra: str, inputs: int, outputs: int, kernel: tuple[int, ...], bias: bool):
        super().__init__()
        constants = structure(algebra)
        self.algebra, self.n = algebra, len(constants)
        for name, value in (("inputs", inputs), ("outputs", outputs)):
            remedy = f"{algebra} numbers have {self.n} components; give a multiple of {self.n}"
            require(value % self.n == 0, name, value, remedy)
        self.weight = nn.Parameter(torch.empty(self.n, outputs // self.n, inputs // self.n, *kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        # Component k of the output is a sum over components j of the input, of each by one component i of the weight.
        terms = [
            [(j, i, int(constants[k, i, j])) for j in range(self.n) for i in range(self.n) if constants[k, i, j]]
            for k in range(self.n)
        ]
        self.terms, self.dense = terms, all(len(terms_of) == self.n for terms_of in terms)
        self.splits = algebra == "double"  # into two algebras of real numbers, see `_split`
        self.reset_parameters()

    def reset_parameters(self, gain: float = math.sqrt(2)) -> None:
        """Draw normal weights that keep the variance of what passes backwards (He et al.), products counted."""
        products = sum(map(len, self.terms)) / self.n  # of components, in each component of the output
        fan = self.weight[0].numel() // self.weight.shape[2]
        nn.init.normal_(self.weight, std=gain / math.sqrt(fan * products))

    def block(self, k: int) -> torch.Tensor:
        """Return the real weight of output component k: `[outputs / n, inputs / n * terms, ...]`."""
        return torch.cat([self.weight[i] if sign > 0 else -self.weight[i] for _, i, sign in self.terms[k]], dim=1)

    def _split(self, x: torch.Tensor, apply: Any) -> torch.Tensor:
        """
        Multiply double numbers by their coordinates along (1 + e) / 2 and (1 - e) / 2, whose products do not mix.

        (a + b e)(c + d e) has the coordinates (a + b)(c + d) and (a - b)(c - d): two block products in place of four.
        """
        (a, b), (first, second) = self.weight * 0.5, x.chunk(2, dim=1)
        plus, minus = apply(first + second, a + b, None), apply(first - second, a - b, None)
        y = torch.cat([plus + minus, plus - minus], dim=1)
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (y.dim() - 2))

    def _apply_blocks(self, x: torch.Tensor, apply: Any) -> torch.Tensor:
        if self.splits:
            return self._split(x, apply)
        if self.dense:
            return apply(x, torch.cat([self.block(k) for k in range(self.n)]), self.bias)
        size, biases = x.shape[1] // self.n, [None] * self.n if self.bias is None else self.bias.chunk(self.n)
        parts = []
        for k, terms in enumerate(self.terms):  # dual numbers: a quarter of the blocks is zero, and left out
            first, last = terms[0][0] * size, (terms[-1][0] + 1) * size
            # Contiguous: torch 2.15's CPU convolutions crash now and then in the backward pass of slices.
            parts.append(apply(x[:, first:last].contiguous(), self.block(k), biases[k]))
        return torch.cat(parts, dim=1)

    def extra_repr(self) -> str:
        return f"{self.algebra}, weight={tuple(self.weight.shape)}"


class HyperConv2d(_Hypercomplex):
    """
    Convolve with hypercomplex weights: y = W * x, products from the left.

    Args:
        algebra (`str`): one of [`ALGEBRAS`].
        in_channels, out_channels (`int`): real channels, multiples of the algebra's dimension n.
        kernel_size, stride, padding, dilation: as for `nn.Conv2d`.
        bias (`bool`): one real number a channel.

    It has 1/n of the weights of the real convolution. Raises `ValueError` for counts that n does not divide.
    """

    def __init__(
        self,
        algebra: str,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
    ):
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__(algebra, in_channels, out_channels, kernel, bias)
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H', W']`."""
        return self._apply_blocks(
            x, lambda x, weight, bias: F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
        )


class HyperLinear(_Hypercomplex):
    """
    Multiply by a hypercomplex matrix from the left: y = W x + b.

    Args:
        algebra (`str`): one of [`ALGEBRAS`].
        in_features, out_features (`int`): real features, multiples of the algebra's dimension.
        bias (`bool`): one real number a feature.
    """

    def __init__(self, algebra: str, in_features: int, out_features: int, bias: bool = True):
        super().__init__(algebra, in_features, out_features, (), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, in_features]` to `[B, out_features]`."""
        return self._apply_blocks(x, F.linear)


class _NormalizeTogether(torch.autograd.Function):
    """
    Scale `x` by `weight / sqrt(var + eps)`, less its means; var is the mean of the variances of its components.

    What torch does to real channels in one kernel takes a dozen passes over `x` by its single operations. The kernel
    gives the statistics here, too, and two passes do the rest: as it is linear in x for given statistics, its gradient
    is a combination of x and the gradient of the output, with factors of a channel.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, n: int, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
        parts = inverse.square().reciprocal() - eps
        var = parts.view(n, -1).mean(0)
        scale = weight * torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, inverse, parts, var)
        ctx.n, ctx.eps = n, eps
        ctx.mark_non_differentiable(mean, var)
        scales = scale.repeat(n)
        return torch.addcmul(_of_channels(bias - mean * scales), x, _of_channels(scales)), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, inverse, parts, var = ctx.saved_tensors
        sums = torch.ops.aten.native_batch_norm_backward(
            gradient, x, torch.ones_like(mean), mean, parts, mean, inverse, False, ctx.eps, [False, True, True]
        )
        products, total = sums[1] / inverse, sums[2]  # sums over samples and pixels: of g (x - mean), and of g
        product = products.view(ctx.n, -1).sum(0)
        root, count = torch.rsqrt(var + ctx.eps), x.numel() / x.shape[1]
        of_gradient = (weight * root).repeat(ctx.n)
        of_x = (weight * root**3 * product).repeat(ctx.n) / (-ctx.n * count)
        constant = -of_gradient * total / count - of_x * mean
        to_x = torch.addcmul(_of_channels(constant), x, _of_channels(of_x)).addcmul_(
            gradient, _of_channels(of_gradient)
        )
        return to_x, root * product, total, None, None


def _of_channels(factors: torch.Tensor) -> torch.Tensor:
    return factors.view(1, -1, 1, 1)


class HyperBatchNorm2d(nn.Module):
    """
    Normalize each hypercomplex channel: every component to mean 0, all components together to variance 1.

    One scale for all components of a channel keeps their proportions, which is what a number of the algebra is; real
    batch normalization would scale each by itself. The scale is real, the shift hypercomplex.

    Args:
        algebra (`str`): one of [`ALGEBRAS`].
        num_features (`int`): real channels, a multiple of the algebra's dimension.
        eps, momentum (`float`): as for `nn.BatchNorm2d`.
    """

    def __init__(self, algebra: str, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.n = len(structure(algebra))
        remedy = f"{algebra} numbers have {self.n} components; give a multiple of {self.n}"
        require(num_features % self.n == 0, "num_features", num_features, remedy)
        self.algebra, self.eps, self.momentum = algebra, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features // self.n))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features // self.n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, num_features, H, W]` to the same shape."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            # `batch_norm` of the whole layer would give statistics a component; what is shared is their mean variance.
            y, mean, var = _NormalizeTogether.apply(wide, self.weight, self.bias, self.n, self.eps)
            count = x.numel() / x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)
            return y.to(x.dtype)
        scale = (self.weight * torch.rsqrt(self.running_var + self.eps)).repeat(self.n)
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(_of_channels(shift), wide, _of_channels(scale)).to(x.dtype)


def to_hypercomplex(network: nn.Module, algebra: str = "dual", image_size: int = 32) -> nn.Module:
    """
    Return the hypercomplex form of a network, newly initialized, and log what it costs beside the real one.

    Convolutions and batch normalizations become hypercomplex; channel counts, in real numbers, stay, and so the
    weights are 1/n as many. The first convolution (three colours are no numbers of any of these algebras) and the last
    linear layer, which gives the logits, stay real; activations and pooling work on components.

    The DAREL poster trains a hypercomplex ResNet18 and does not say over which algebra. Dual numbers are the default:
    half of the weights, and with e_1 e_1 = 0 three block products where complex numbers have four. (Double
    numbers take two: their algebra is that of pairs of real numbers, in other coordinates.)

    Args:
        network (`nn.Module`): a torchvision ResNet, or another network of convolutions without groups.
        algebra (`str`): one of [`ALGEBRAS`].
        image_size (`int`): pixels a side, for the FLOPs in the log.

    Raises:
        ValueError: for an unknown algebra, or channel counts that its dimension does not divide.
    """
    structure(algebra)
    made = copy.deepcopy(network)
    inputs = next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))

    def convolution(m: nn.Conv2d) -> nn.Module:
        if m.in_channels == inputs:
            return m
        require(m.groups == 1, "network", f"groups={m.groups}", "only convolutions without groups have such a form")
        geometry = (m.kernel_size, m.stride, m.padding, m.dilation)
        return HyperConv2d(algebra, m.in_channels, m.out_channels, *geometry, bias=m.bias is not None)

    def normalization(m: nn.BatchNorm2d) -> nn.Module:
        return HyperBatchNorm2d(algebra, m.num_features, m.eps, m.momentum)

    made = replace_modules(made, {nn.Conv2d: convolution, nn.BatchNorm2d: normalization})
    logger.warning("%s", compare_costs(network, made, algebra, image_size))
    return made


def cost(network: nn.Module, image_size: int) -> tuple[int, int]:
    """Return the trainable parameters of a network, and the FLOPs of its forward pass for one image."""
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    training, device = network.training, next(network.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    network.train(training)
    return parameters, counter.get_total_flops()


def compare_costs(real: nn.Module, made: nn.Module, algebra: str, image_size: int) -> str:
    """Say what a hypercomplex network costs beside the real one."""
    (p0, f0), (p1, f1) = cost(real, image_size), cost(made, image_size)
    return (
        f"{algebra}: {p1:,} parameters, {p1 / p0:.2f} of the real network's {p0:,}; forward pass of one image of "
        f"{image_size} x {image_size}: {f1 / 1e9:.3f} GFLOPs, {f1 / f0:.2f} of {f0 / 1e9:.3f}"
    )
