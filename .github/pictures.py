# SPDX-License-Identifier: MIT
"""Draw method.png and demo.png, beside this file: python .github/pictures.py data/imagenette"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

sys.path.insert(0, str(Path(__file__).parents[1]))
import bagssl

HERE = Path(__file__).parent


def enlarged(image, height):
    """An image, uint8 or float in [0, 1] (3, h, w), as a PIL image of that height, not smoothed."""
    image = to_pil_image(image)
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.NEAREST)


def draw(path, rows, height=128, gap=14, text=14):
    """Write a picture of rows of labelled images, [[(label, image (3, h, w)), ...], ...], all resized to one height."""
    font, line = ImageFont.load_default(text), text + 6
    rows = [[(label, enlarged(image, height)) for label, image in row] for row in rows]
    widths = [gap + max(max(row[k][1].width, round(font.getlength(row[k][0]))) for row in rows if k < len(row))
              for k in range(max(map(len, rows)))]
    sheet = Image.new("RGB", (sum(widths) + gap, len(rows) * (height + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top, left = gap + r * (height + line + gap), gap
        for (label, image), width in zip(row, widths):
            pen.text((left, top), label, "black", font)
            sheet.paste(image, (left, top + line))
            left += width
    sheet.save(path)


class Canvas:
    """A white sheet for pictures, boxes, arrows and vectors, each placed by the middle of its left edge."""

    def __init__(self, width, height):
        self.sheet = Image.new("RGB", (width, height), "white")
        self.pen, self.random = ImageDraw.Draw(self.sheet), np.random.default_rng(1)

    def text(self, x, y, words, size=38, anchor="lm", fill="black"):
        self.pen.multiline_text((x, y), words, fill, ImageFont.load_default(size), anchor, align="center")

    def paste(self, x, y, image):
        self.sheet.paste(image, (x, y - image.height // 2))

    def box(self, x, y, words, width, height=120, fill="#dbe9f6"):
        self.pen.rounded_rectangle((x, y - height // 2, x + width, y + height // 2), 16, fill, "#345", 3)
        self.text(x + width // 2, y, words, anchor="mm")

    def arrow(self, x, y, to_x, to_y=None, both=False, fill="#345"):
        to_y = y if to_y is None else to_y
        self.pen.line((x, y, to_x, to_y), fill, 5)
        along = np.array([to_x - x, to_y - y]) / np.hypot(to_x - x, to_y - y)
        across = np.array([-along[1], along[0]])
        for tip, way in (((to_x, to_y), along), ((x, y), -along))[:2 if both else 1]:
            self.pen.polygon([tuple(tip + 4 * way), *(tuple(tip - 20 * way + s * 11 * across) for s in (1, -1))], fill)

    def vector(self, x, y, cell=20, length=8, values=None):
        """A column of shades for the numbers of a vector, random unless given in [0, 1]; returns them."""
        values = self.random.random(length) if values is None else values
        for k, value in enumerate(values):
            top, shade = y - cell * length // 2 + k * cell, round(245 - 175 * value)
            self.pen.rectangle((x, top, x + cell, top + cell), (shade, shade, 250), "#345")
        return values


def draw_method(image, scale=0.0625):
    """method.png: above, how an image is represented; below, a training step. image: float (3, H, H) in [0, 1]."""
    canvas = Canvas(2000, 1020)
    y = 250  # of the upper row
    canvas.text(20, 40, "An image's representation: the mean of its patches' embeddings", 44)
    canvas.paste(20, y, enlarged(image, 300))
    canvas.arrow(335, y, 395)
    patches = bagssl.grid_patches(image[None], 4, scale)[0]
    canvas.paste(410, y, enlarged(make_grid(patches, 4, 6, pad_value=1), 330))
    canvas.arrow(755, y, 815)
    canvas.box(830, y, "f", 110)
    canvas.arrow(955, y, 1015)
    columns = [canvas.vector(1030 + 28 * k, y) for k in range(16)]
    canvas.text(1030 + 14 * 16, y + 120, "embeddings h", anchor="mm")
    canvas.arrow(1485, y, 1585)
    canvas.text(1533, y - 35, "mean", anchor="mm")
    canvas.vector(1600, y, values=np.mean(columns, 0))
    canvas.arrow(1630, y, 1670)
    canvas.box(1685, y, "linear\nprobe", 140)
    canvas.arrow(1835, y, 1875)
    canvas.text(1893, y, "class")

    y = 760  # of the lower row
    u = torch.tensor([[[0.2, 0.25, 0, 0.9, 0, 0.9, 0.6, 0.5, 0.3, 0.9, 0.9],
                       [0.75, 0.6, 0, 0.2, 0, 0.3, 0.6, 0.8, 0.9, 0.9, 0.9]]])
    canvas.text(20, 510, "A training step: VICReg on the projections of an image's patches", 44)
    canvas.paste(20, y, enlarged(image, 300))
    size, side = image.shape[-1], bagssl.patch_side(*image.shape[-2:], scale)
    views = bagssl.augment(bagssl.crop_patches(image[None], u[..., :3], scale), u[..., 3:])[0]
    for k, row in ((0, y - 115), (1, y + 115)):
        top, left = (int(u[0, k, i] * (size - side + 1)) * 300 // size for i in (0, 1))
        corner = 20 + left, y - 150 + top
        canvas.pen.rectangle((*corner, corner[0] + side * 300 // size, corner[1] + side * 300 // size), None, "red", 4)
        canvas.arrow(corner[0] + side * 300 // size, corner[1] + side * 150 // size, 430, row, fill="red")
        canvas.paste(440, row, enlarged(views[k], 150))
        canvas.arrow(605, row, 655)
        canvas.box(670, row, "f", 100)
        canvas.arrow(785, row, 835)
        canvas.text(810, row - 30, "h", anchor="mm", size=34)
        canvas.box(850, row, "g", 100, fill="#fbe6d4")
        canvas.arrow(965, row, 1015)
        canvas.vector(1030, row)
        canvas.text(1066, row, f"z{k + 1}")
    canvas.arrow(1040, y - 27, 1040, y + 27, both=True, fill="#a00")
    canvas.text(515, y, "cut, augmented", 30, "mm")
    canvas.text(1068, y, "invariance: alike", 36, fill="#a00")
    canvas.text(1400, 600, "z1 of a batch of images", 34)
    for k in range(9):
        canvas.vector(1470 + 34 * k, y, 26)
    canvas.arrow(1470, y + 125, 1768, y + 125, both=True, fill="#a00")
    canvas.text(1620, y + 165, "variance: each dimension\nvaries over the batch", 36, "ma", "#a00")
    canvas.arrow(1790, y - 90, 1790, y + 90, both=True, fill="#a00")
    canvas.text(1808, y, "covariance:\ndimensions\nare not\ncorrelated", 34, fill="#a00")
    canvas.sheet.save(HERE / "method.png")


def main():
    if len(sys.argv) != 2:
        raise bagssl.UserError("give the folder of Imagenette")
    images, _ = bagssl.load_images(sys.argv[1], "train", 128)
    draw_method(images[5000] / 255)  # an object before a plain background
    demo, labels, _ = bagssl.demo_images(200, 80, seed=0)
    chosen = torch.cat([demo[labels == label][:2] for label in range(10)])
    save_image(chosen / 255, HERE / "demo.png", nrow=10, padding=4, pad_value=1)


if __name__ == "__main__":
    bagssl.run_cli(main)
