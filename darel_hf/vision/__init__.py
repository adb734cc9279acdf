"""
Images: networks as Trainer models, files as data sets, hypercomplex layers, the CIFAR task.

Stands on `jobs` and `training/`. Needs torchvision (`pip install 'darel_hf[vision]'`).
"""

from .images import ImageClassifier, load_images, small_image_stem
