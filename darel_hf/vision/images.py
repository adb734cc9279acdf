"""Images: torchvision networks (and any module from images to logits) as Trainer models, image files as data sets."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model
from transformers.modeling_outputs import ImageClassifierOutput

from ..files import require

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; near those of most photographs
IN_MEMORY = 4 * 2**30  # bytes of decoded images that are kept in memory


class ImageClassifier(nn.Module):
    """
    Make a network from images to logits a model for `Trainer` and `DarelTrainer`.

    Images come as uint8; they are normalized here, and augmented here, in training mode only: scores (eval mode) are
    of the image as it is, and augmentation never touches a sample's id. To score augmented images, augment in the data
    set instead.

    Args:
        network (`nn.Module`): `float [B, 3, H, W] -> float [B, classes]`, such as any of `torchvision.models`.
        padding (`int`): in training, crop at random after padding by so many pixels; 0 for none. 4 is usual for CIFAR.
        flip (`bool`): in training, flip every second image left to right, at random.
        mean, std (`tuple[float, float, float]`): of the channels, for images in [0, 1].
        channels_last (`bool`): on CUDA, lay images out with channels last, which convolutions there like (weights
            stay as they are: safetensors stores no other layout).

    Example:

    ```python
    >>> import torch, torchvision
    >>> model = ImageClassifier(small_image_stem(torchvision.models.resnet18(num_classes=10)), padding=4, flip=True)
    >>> out = model(pixel_values=torch.zeros(2, 3, 32, 32, dtype=torch.uint8), labels=torch.tensor([0, 1]))
    >>> tuple(out.logits.shape)
    (2, 10)
    ```
    """

    def __init__(
        self,
        network: nn.Module,
        padding: int = 0,
        flip: bool = False,
        mean: Iterable[float] = MEAN,
        std: Iterable[float] = STD,
        channels_last: bool = False,
    ):
        super().__init__()
        require(padding >= 0, "padding", padding, "give a number of pixels, 0 or more")
        self.network = network
        self.padding, self.flip, self.channels_last = padding, flip, channels_last
        self.register_buffer("mean", torch.tensor([*mean]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([*std]).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """
        Classify images.

        Args:
            pixel_values (`torch.Tensor`): `[B, 3, H, W]`, uint8, or float in [0, 1].
            labels (`torch.Tensor`, *optional*): int64 `[B]`.
        """
        images = pixel_values.float() / 255 if pixel_values.dtype == torch.uint8 else pixel_values
        images = (images - self.mean) / self.std
        if self.training:
            images = crop_and_flip(images, self.padding, self.flip)
        if self.channels_last and images.is_cuda:
            images = images.contiguous(memory_format=torch.channels_last)
        logits = self.network(images)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def crop_and_flip(images: torch.Tensor, padding: int, flip: bool) -> torch.Tensor:
    """
    Shift each image by up to `padding` pixels a side (zeros come in) and flip it half the time.

    Args:
        images (`torch.Tensor`): float `[B, C, H, W]`; draws come from torch's global generator of its device.

    Returns:
        `torch.Tensor`: `[B, C, H, W]`.
    """
    n, _, height, width = images.shape
    device = images.device
    columns = torch.arange(width, device=device).expand(n, width)
    rows = torch.arange(height, device=device).expand(n, height)
    if flip:
        turned = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(turned, width - 1 - columns, columns)
    if padding:
        images = F.pad(images, (padding,) * 4)
        columns = columns + torch.randint(0, 2 * padding + 1, (n, 1), device=device)
        rows = rows + torch.randint(0, 2 * padding + 1, (n, 1), device=device)
    if not flip and not padding:
        return images
    which = torch.arange(n, device=device)[:, None, None]
    return images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# ---- Networks ----


def small_image_stem(network: nn.Module) -> nn.Module:
    """
    Give a torchvision ResNet the stem for small images, in place: a 3x3 convolution of stride 1, and no pooling.

    Raises:
        ValueError: if the network has no `conv1` and `maxpool`.
    """
    known = isinstance(getattr(network, "conv1", None), nn.Conv2d) and hasattr(network, "maxpool")
    require(known, "network", type(network).__name__, "only ResNets of torchvision have the stem that this replaces")
    old = network.conv1
    network.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def narrow(network: nn.Module, divisor: float) -> nn.Module:
    """
    Return a copy of a network of convolutions with a fraction of the channels, newly initialized.

    Args:
        network (`nn.Module`): convolutions without groups, batch normalization and a last linear layer.
        divisor (`float`): of the channel counts, each of which must stay a whole number (64 channels become 20 with
            3.2); images keep theirs, and so do the classes.

    Raises:
        ValueError: if a channel count cannot be divided.
    """
    if divisor == 1:
        return network
    network = copy.deepcopy(network)
    inputs = next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))

    def part(channels: int) -> int:
        width = round(channels / divisor)
        fits = width > 0 and math.isclose(width * divisor, channels)
        require(fits, "divisor", divisor, f"{channels} channels cannot be divided by it; give a divisor of all")
        return width

    def convolution(m: nn.Conv2d) -> nn.Conv2d:
        require(m.groups == 1, "network", f"groups={m.groups}", "only convolutions without groups can be narrowed")
        narrowed = m.in_channels if m.in_channels == inputs else part(m.in_channels)
        geometry = (m.kernel_size, m.stride, m.padding, m.dilation)
        made = nn.Conv2d(narrowed, part(m.out_channels), *geometry, bias=m.bias is not None)
        nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
        return made

    def normalization(m: nn.BatchNorm2d) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(part(m.num_features), m.eps, m.momentum, m.affine, m.track_running_stats)

    def head(m: nn.Linear) -> nn.Linear:
        return nn.Linear(part(m.in_features), m.out_features, bias=m.bias is not None)

    return replace_modules(network, {nn.Conv2d: convolution, nn.BatchNorm2d: normalization, nn.Linear: head})


def replace_modules(network: nn.Module, makers: dict[type[nn.Module], Any]) -> nn.Module:
    """Replace, in place, every submodule of exactly one of the given types by what its maker returns."""
    for name, child in network.named_children():
        make = makers.get(type(child))
        if make is not None:
            setattr(network, name, make(child))
        else:
            replace_modules(child, makers)
    return network


def make_network(
    name: str, num_classes: int, small_stem: bool = False, divisor: float = 1, weights: str | None = None
) -> nn.Module:
    """
    Build a torchvision network.

    Args:
        name (`str`): as `torchvision.models.get_model` knows it, such as `"resnet18"`.
        num_classes (`int`): outputs.
        small_stem (`bool`): see [`small_image_stem`].
        divisor (`float`): see [`narrow`].
        weights (`str`, *optional*): pre-trained weights as torchvision names them (`"DEFAULT"`); the last linear layer
            is made new if its size differs.

    Raises:
        ValueError: for a name that torchvision does not know.
    """
    try:
        network = get_model(name, weights=weights, **({} if weights else {"num_classes": num_classes}))
    except ValueError as error:
        raise ValueError(f"model={name!r}: {error}; see torchvision.models.list_models()") from None
    if weights:
        heads = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
        old = network.get_submodule(heads[-1])
        network.set_submodule(heads[-1], nn.Linear(old.in_features, num_classes))
    network = narrow(network, divisor)
    return small_image_stem(network) if small_stem else network


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """
    Load weights that a Trainer saved: a folder with `model.safetensors`, or such a file.

    Raises:
        ValueError: if there is no such file, or it holds weights of another model.
    """
    from safetensors.torch import load_file

    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    require(file.is_file(), "scorer", str(path), "no model.safetensors there; name a folder that a training has left")
    try:
        model.load_state_dict(load_file(file))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"scorer={str(path)!r}: weights of another model ({first})") from None
    return model


# ---- Data ----


def load_images(source: str | os.PathLike, split: str, size: int | None = None, revision: str | None = None) -> Any:
    """
    Load images and labels as a `datasets.Dataset` whose items are `pixel_values` (uint8 `[3, H, W]`) and `labels`.

    Decoded once and held in memory where they fit (4 GiB), else decoded when they are asked for. The table keeps the
    column `label`, for `group_column="label"`.

    Args:
        source: a folder with `<split>.parquet` (columns `img` or `image`, and `label` or `fine_label`), a folder of
            images by class (`<split>/<class>/*.png`), or a name on the hub.
        split (`str`): `"train"` or `"test"`.
        size (`int`, *optional*): side in pixels that all images are resized to; needed if they differ in size.
        revision (`str`, *optional*): on the hub.

    Raises:
        ValueError: if there are no images, or a column is missing, or sizes differ.
    """
    folder = Path(source)
    if folder.is_dir() and (folder / f"{split}.parquet").is_file():
        table = datasets.load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
    elif folder.is_dir():
        remedy = f"there is no {split}.parquet and no folder {split}/ with a folder of images a class"
        require((folder / split).is_dir(), "data_dir", str(source), remedy)
        table = datasets.load_dataset("imagefolder", data_dir=str(folder / split), split="train")
    else:
        table = datasets.load_dataset(str(source), split=split, revision=revision)
    names = {}
    for wanted, known in {"image": ("img", "image"), "label": ("label", "fine_label")}.items():
        found = [name for name in known if name in table.column_names]
        remedy = f"no column {' or '.join(known)}, only {table.column_names}"
        require(bool(found), "data_dir", str(source), remedy)
        names[found[0]] = wanted
    table = table.select_columns(list(names)).rename_columns({k: v for k, v in names.items() if k != v})
    require(len(table) > 0, "data_dir", str(source), f"there are no images in the split {split}")
    side, decode = size or table[0]["image"].size[0], partial(_decoded, size=size)
    if 3 * side * side * len(table) > IN_MEMORY:
        return table.with_transform(_Items("image", decode))
    pixels = [decode(row["image"]) for row in table]
    shapes = {image.shape for image in pixels}
    remedy = f"images differ in size ({sorted(shapes)[:3]}, ...); give the size that they are to be resized to"
    require(len(shapes) == 1, "image_size", size, remedy)
    features = datasets.Features({"pixels": datasets.Value("binary"), "label": table.features["label"]})
    columns = {"pixels": [image.tobytes() for image in pixels], "label": table["label"]}
    unpack = _Items("pixels", partial(_unpacked, shape=pixels[0].shape))
    return datasets.Dataset.from_dict(columns, features=features).with_transform(unpack)


@dataclass
class _Items:
    """
    Make items of a batch of rows; a transform of a `datasets.Dataset`.

    Attributes:
        column (`str`): of the images.
        read (`Callable`): makes a uint8 array `[3, H, W]` of what is in it.
    """

    column: str
    read: Callable[[Any], np.ndarray]

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        made: dict[str, list] = {}
        if self.column in rows:
            made["pixel_values"] = [torch.from_numpy(self.read(image)) for image in rows[self.column]]
        if "label" in rows:
            made["labels"] = rows["label"]
        return made


def _decoded(image: Image.Image, size: int | None) -> np.ndarray:
    """Return a PIL image as an array, `size` pixels a side if it is given."""
    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _unpacked(pixels: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the stored bytes of an image as an array."""
    return np.frombuffer(pixels, np.uint8).reshape(shape).copy()
