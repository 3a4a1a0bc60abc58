# SPDX-License-Identifier: MIT
"""Each fast piece against the plain way, as ratios within one run: python .github/benchmark.py

Both sides run in turn on this machine; a figure is the median over the rounds. Images are noise of 32 x 32 pixels,
patches 16 x 16, the network ResNet-18 with a stem of stride 1. No data is needed, and nothing is written.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
import bagssl
import eval_linear

CONFIG = bagssl.Config(dataset="noise", batch_size=64, num_patches=4, projector=(1024, 1024, 1024))
MINE, WORLD = slice(0, 64), bagssl.World()


def medians(rounds, **sides):
    """Seconds each side takes, the median over the rounds, in each of which every side runs once."""
    took = {name: [] for name in sides}
    for round in range(rounds + 1):
        for name, function in sides.items():
            begun = time.perf_counter()
            function()
            took[name].append(time.perf_counter() - begun)
    return [float(np.median(times[1:])) for times in took.values()]  # the first round warms up


class PerImage(torch.utils.data.Dataset):
    """The pipeline of EMP-SSL, lightly and solo-learn: PIL images, torchvision's transforms, one patch at a time."""

    def __init__(self, images, crop):
        self.images = [transforms.functional.to_pil_image(image) for image in images]
        self.transform = transforms.Compose([
            crop, transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2), transforms.RandomSolarize(128, p=0.1), transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.stack([self.transform(self.images[index]) for _ in range(CONFIG.num_patches)])


def loader(images, crop):
    """Batches of 64 images from as many worker processes as there are cores, which stay between the rounds."""
    return torch.utils.data.DataLoader(PerImage(images, crop), 64, shuffle=True, num_workers=os.cpu_count(),
                                       persistent_workers=True)


def square_loss(z):
    """VICReg for two views by the D x D covariance matrix, as its definition says."""
    loss = 25 * (z[:, 0] - z[:, 1]).square().mean()
    for view in z.unbind(1):
        view = view - view.mean(0)
        covariance = view.T @ view / (len(view) - 1)
        loss = loss + 12.5 * (1 - (covariance.diagonal() + 1e-4).sqrt()).relu().mean()
        loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / len(covariance)
    return loss


def loss_and_gradient(loss, B, D):
    z = torch.randn(B, 2, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss(z).backward()


def high_water():
    """The most memory that this process has held, in MB. On Linux; getrusage would count the parent's too."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e3


def memory_of(answer, loss, B, D):
    """Most memory that the loss and its gradient add to this process, in MB."""
    loss_and_gradient(loss, 8, 8)
    before = high_water()
    loss_and_gradient(loss, B, D)
    answer.put(high_water() - before)


def our_loss(z):
    return bagssl.vicreg_loss(z)[0]


def input_rates(images):
    batches, prepare = loader(images, transforms.RandomCrop(16)), torch.compile(bagssl.make_input)

    def batched(make_input):
        for step, batch in enumerate(images.split(64)):
            bagssl.draw_input(batch, CONFIG, step, MINE, make_input)

    theirs, eager, compiled = medians(5, theirs=lambda: list(batches), eager=lambda: batched(bagssl.make_input),
                                      compiled=lambda: batched(prepare))
    patches = len(images) * CONFIG.num_patches
    print(f"crop + augment, patches/s: per image with PIL {patches / theirs:,.0f}; batched {patches / eager:,.0f}, "
          f"{theirs / eager:.1f} times; compiled {patches / compiled:,.0f}, {theirs / compiled:.1f} times", flush=True)


def losses():
    z = torch.randn(64, 2, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(our_loss(z), square_loss(z))  # one loss, in two ways
    for B, D in ((256, 8192), (64, 1024), (256, 2048), (1024, 1024), (2048, 512), (4096, 64)):
        ours, square = medians(5, ours=lambda: loss_and_gradient(our_loss, B, D),
                               square=lambda: loss_and_gradient(square_loss, B, D))
        print(f"loss and gradient, V = 2, B = {B}, D = {D}: {1e3 * ours:.1f} ms; by D x D {1e3 * square:.1f} ms, "
              f"{square / ours:.1f} times", flush=True)
    context, memory = multiprocessing.get_context("spawn"), []
    for loss in (our_loss, square_loss):
        answer = context.Queue()
        process = context.Process(target=memory_of, args=(answer, loss, 256, 8192))
        process.start()
        memory.append(answer.get())
        process.join()
    print(f"memory of the loss, V = 2, B = 256, D = 8192: {memory[0]:.0f} MB; by D x D {memory[1]:.0f} MB",
          flush=True)


@torch.no_grad()
def bag(images):
    backbone = bagssl.make_backbone("resnet18", 1).eval().to(memory_format=torch.channels_last)
    patches = torch.randn(512, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    bare, whole = medians(5, bare=lambda: [backbone(patches) for _ in range(2)],
                          whole=lambda: bagssl.BagOfPatches(backbone, 4, 0.25)(images[:64]))
    print(f"BagOfPatches, patches/s: {1024 / whole:,.0f}; the backbone alone {1024 / bare:,.0f}, {bare / whole:.0%}",
          flush=True)


def steps(images):
    torch.manual_seed(0)
    encoder = bagssl.Encoder("resnet18", 1, CONFIG.projector).to(memory_format=torch.channels_last)
    plain = bagssl.Encoder("resnet18", 1, CONFIG.projector)  # contiguous, upsampled: the pipeline of EMP-SSL
    for name, module in list(plain.named_modules()):
        if isinstance(module, bagssl.Conv2d):
            plain.set_submodule(name, nn.Conv2d(module.in_channels, module.out_channels, 3, module.stride, 1, bias=False))
    batches = loader(images, transforms.RandomResizedCrop(32, scale=(0.25, 0.25), ratio=(1, 1)))
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9) for network in (encoder, plain)]

    def ours():
        for step, batch in enumerate(images.split(64)):
            x = bagssl.draw_input(batch, CONFIG, step, MINE)
            bagssl.update(encoder, optimizers[0], x, CONFIG, WORLD)

    def theirs():
        for batch in batches:
            loss, _ = bagssl.loss_of(plain(batch.flatten(0, 1))[1], CONFIG, WORLD)
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()

    took, patches = medians(2, ours=ours, theirs=theirs), len(images) * CONFIG.num_patches
    print(f"training step, patches/s: {patches / took[0]:,.0f}; by PIL, upsampled to 32 x 32, float32, contiguous "
          f"{patches / took[1]:,.0f}, {took[1] / took[0]:.1f} times", flush=True)


def probe():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (60_000,), generator=generator)
    features = torch.randn(10, 512, generator=generator)[labels] * 0.15 + torch.randn(60_000, 512, generator=generator)
    features = features @ torch.randn(512, 512, generator=generator) * torch.logspace(0, -2, 512)
    took, = medians(1, fit=lambda: eval_linear.linear_probe(features, labels, features[:1000], labels[:1000]))
    print(f"linear probe, 60,000 x 512, all regularisations: {took:.1f} s", flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}")
    noise = torch.randint(256, (1024, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    input_rates(noise)
    losses()
    bag(noise)
    steps(noise[:128])
    probe()
