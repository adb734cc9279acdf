"""Hypercomplex layers against their multiplication tables, and numbers that Python and a textbook know."""

import logging

import pytest

pytest.importorskip("torchvision")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from darel_hf.vision.hypercomplex import (
    ALGEBRAS,
    HyperBatchNorm2d,
    HyperConv2d,
    HyperLinear,
    cost,
    structure,
    to_hypercomplex,
)
from darel_hf.vision.images import ImageClassifier, small_image_stem

DIMENSION = {"complex": 2, "double": 2, "dual": 2, "quaternion": 4}
SQUARES = {"complex": [-1], "double": [1], "dual": [0], "quaternion": [-1, -1, -1]}


def product(algebra, a, b):
    """Multiply two numbers, lists of components, by the table, term by term."""
    result = [0.0] * len(a)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            k, sign = ALGEBRAS[algebra][i][j]
            result[k] += sign * x * y
    return result


@pytest.mark.parametrize("algebra", sorted(ALGEBRAS))
def test_tables(algebra):
    n = len(ALGEBRAS[algebra])
    assert n == DIMENSION[algebra]
    units = torch.eye(n).tolist()
    for i in range(n):
        assert product(algebra, units[0], units[i]) == product(algebra, units[i], units[0]) == units[i]
    for i, square in enumerate(SQUARES[algebra], 1):
        assert product(algebra, units[i], units[i]) == [square, *[0.0] * (n - 1)]
    if algebra == "quaternion":  # i j = k = -j i, and so on
        for i, j, k in ((1, 2, 3), (2, 3, 1), (3, 1, 2)):
            assert product(algebra, units[i], units[j]) == units[k]
            assert product(algebra, units[j], units[i]) == [-x for x in units[k]]
    a, b, c = torch.randn(3, n, generator=torch.Generator().manual_seed(0)).tolist()
    left, right = (
        product(algebra, product(algebra, a, b), c),
        product(algebra, a, product(algebra, b, c)),
    )
    assert left == pytest.approx(right, abs=1e-5)  # associative


@given(st.complex_numbers(max_magnitude=10), st.complex_numbers(max_magnitude=10))
@settings(deadline=None)
def test_complex_numbers_are_pythons(a, b):
    expected = a * b
    assert product("complex", [a.real, a.imag], [b.real, b.imag]) == pytest.approx([expected.real, expected.imag])


@pytest.mark.parametrize("algebra", sorted(ALGEBRAS))
def test_linear_multiplies_from_the_left(algebra):
    n = DIMENSION[algebra]
    torch.manual_seed(0)
    layer = HyperLinear(algebra, 3 * n, 2 * n)
    x = torch.randn(5, 3 * n)
    out = layer(x)
    for row in range(5):
        for o in range(2):
            expected = layer.bias[o::2].tolist()  # components of output o: channels are ordered by component
            for i in range(3):
                term = product(algebra, layer.weight[:, o, i].tolist(), x[row, i::3].tolist())
                expected = [e + t for e, t in zip(expected, term, strict=True)]
            assert out[row, o::2].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("algebra", sorted(ALGEBRAS))
def test_convolution_is_the_linear_layer_at_every_pixel(algebra):
    n = DIMENSION[algebra]
    torch.manual_seed(0)
    layer = HyperConv2d(algebra, 2 * n, 3 * n, 3, padding=1, stride=2)
    x = torch.randn(2, 2 * n, 6, 6)
    out = layer(x)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    row, column = 1, 2
    patch = padded[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
    summed = layer.bias.expand(2, -1).clone()
    for a in range(3):
        for b in range(3):
            flat = HyperLinear(algebra, 2 * n, 3 * n, bias=False)
            flat.weight.data = layer.weight[..., a, b].detach()
            summed += flat(patch[..., a, b])
    torch.testing.assert_close(out[:, :, row, column], summed, atol=1e-5, rtol=1e-5)


def test_dual_numbers_carry_derivatives():
    """f(x + e) = f(x) + f'(x) e: multiplying by a dual number twice differentiates a product."""
    layer = HyperLinear("dual", 2, 2, bias=False)
    layer.weight.data = torch.tensor([3.0, 5.0]).view(2, 1, 1)  # 3 + 5 e
    assert layer(torch.tensor([[7.0, 1.0]])).tolist() == [[21.0, 3.0 + 35.0]]


@pytest.mark.parametrize("algebra", sorted(ALGEBRAS))
def test_weights_keep_the_variance(algebra):
    n = DIMENSION[algebra]
    torch.manual_seed(0)
    layer = HyperLinear(algebra, 64 * n, 64 * n, bias=False)
    out = torch.relu(layer(torch.randn(512, 64 * n)))
    assert out.pow(2).mean().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("algebra", sorted(ALGEBRAS))
def test_batch_normalization(algebra):
    n = DIMENSION[algebra]
    torch.manual_seed(0)
    layer = HyperBatchNorm2d(algebra, 3 * n, momentum=1.0)
    scales = torch.rand(3 * n) + 0.5
    x = torch.randn(64, 3 * n, 4, 4) * scales.view(1, -1, 1, 1) + 2
    out = layer(x)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3 * n), atol=1e-5, rtol=0)
    variance = out.var((0, 2, 3), correction=0).view(n, 3)
    torch.testing.assert_close(variance.mean(0), torch.ones(3), atol=1e-4, rtol=0)
    # The components keep their proportions: what real normalization would lose.
    original = x.var((0, 2, 3), correction=0).view(n, 3)
    torch.testing.assert_close(variance / variance[0], original / original[0], atol=1e-4, rtol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(x), out, atol=1e-2, rtol=1e-2)  # running statistics, of one batch


@pytest.mark.parametrize("algebra", sorted(ALGEBRAS))
def test_gradients_of_batch_normalization(algebra):
    n = DIMENSION[algebra]
    torch.manual_seed(0)
    layer = HyperBatchNorm2d(algebra, 2 * n).double()
    nn.init.normal_(layer.weight)
    x = torch.randn(3, 2 * n, 2, 3, dtype=torch.double).mul_(3).add_(1).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.double)

    def by_autograd(x, weight, bias):
        centred = x - x.mean((0, 2, 3), keepdim=True)
        var = centred.square().mean((0, 2, 3)).view(n, -1).mean(0)
        scale = weight * torch.rsqrt(var + layer.eps)
        return centred * scale.repeat(n).view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    inputs = (x, layer.weight, layer.bias)
    found, expected = layer(x), by_autograd(*inputs)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((y * upstream).sum(), inputs) for y in (found, expected)]
    torch.testing.assert_close(*gradients)
    torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("algebra", sorted(ALGEBRAS))
def test_network(algebra, caplog):
    real = small_image_stem(resnet18(num_classes=10))
    with caplog.at_level(logging.INFO, "darel_hf.vision.hypercomplex"):
        made = to_hypercomplex(real, algebra)
    assert algebra in caplog.text and "parameters" in caplog.text and "GFLOPs" in caplog.text
    (parameters, flops), (real_parameters, real_flops) = cost(made, 32), cost(real, 32)
    assert parameters / real_parameters == pytest.approx(1 / DIMENSION[algebra], abs=0.01)
    assert flops / real_flops == pytest.approx({"dual": 0.75, "double": 0.5}.get(algebra, 1.0), abs=0.01)
    assert all(isinstance(m, HyperConv2d) or m.in_channels == 3 for m in made.modules() if hasattr(m, "in_channels"))
    model = ImageClassifier(made)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    model(images, torch.tensor([0, 1, 2, 3])).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_bad_settings():
    with pytest.raises(ValueError, match="algebra='octonion'"):
        structure("octonion")
    with pytest.raises(ValueError, match="inputs=3"):
        HyperConv2d("complex", 3, 4, 3)
    with pytest.raises(ValueError, match="outputs=6"):
        HyperLinear("quaternion", 4, 6)
    with pytest.raises(ValueError, match="num_features=3"):
        HyperBatchNorm2d("dual", 3)
