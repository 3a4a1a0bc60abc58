# SPDX-License-Identifier: MIT
"""Draw the README's pictures, beside this file: python .github/pictures.py data/imagenette data/cifar10"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image

sys.path.insert(0, str(Path(__file__).parents[1]))
import bagssl

HERE = Path(__file__).parent


def bag(image, scale, seed, side=256, gap=16):
    """An image (3, H, H) in [0, 1], its 4 x 4 grid of patches, and 16 augmented training patches, in a row."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(1, 16, 11, generator=generator)
    views = bagssl.augment(bagssl.crop_patches(image[None], u[..., :3], scale), u[..., 3:])[0]
    parts = (image, make_grid(bagssl.grid_patches(image[None], 4, scale)[0], nrow=4, padding=2, pad_value=1),
             make_grid(views, nrow=4, padding=2, pad_value=1))
    parts = [F.interpolate(part[None], size=(side, side))[0] for part in parts]  # nearest: the pixels stay visible
    return torch.cat([F.pad(part, (0, gap, 0, gap), value=1) for part in parts], 2)


def main():
    if len(sys.argv) != 3:
        raise bagssl.UserError("give two folders of images, Imagenette's and CIFAR-10's")
    demo, labels, _ = bagssl.demo_images(200, 80, seed=0)
    rows = [bag(demo[0] / 255, 0.04, seed=0)]
    for folder, size, scale, index in zip(sys.argv[1:], (128, 32), (0.0625, 0.25), (5000, 41000)):
        images, _ = bagssl.load_images(folder, "train", size)
        rows.append(bag(images[index] / 255, scale, seed=1))
    save_image(torch.cat(rows, 1), HERE / "bag.png")
    chosen = torch.cat([demo[labels == label][:2] for label in range(10)])
    save_image(make_grid(chosen / 255, nrow=10, padding=4, pad_value=1), HERE / "demo.png")


if __name__ == "__main__":
    bagssl.run_cli(main)
