# SPDX-License-Identifier: MIT
"""How fast bagssl.py is on this machine, and what a run computes.

    python .github/benchmark.py ratios                         # each fast piece against the plain way
    python .github/benchmark.py profile --preset cifar10-cpu   # a training step, operation by operation
    python .github/benchmark.py flops --preset cifar10-cpu     # the operations of a run, counted
    python .github/benchmark.py scale --preset imagenet --processes 1 8 64 512   # a step on many GPUs, simulated

`ratios` runs on the CPU: patches as in the preset cifar10-cpu, the loss for two views at several sizes. The others take
any flag of bagssl.py. The images are noise, and nothing is trained or written. `flops` and `scale` run a step on
tensors that have a shape and no content, so they need no GPU.
"""

import argparse
import contextlib
import functools
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
import bagssl

CPU = torch.device("cpu")


@contextlib.contextmanager
def timed(name, times, device=CPU):
    """Append the seconds that the block takes, waiting for the device, to times[name]."""
    begun = time.perf_counter()
    yield
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    times[name].append(time.perf_counter() - begun)


# ---- A step of bagssl.train, at a learning rate of 0 -----------------------------------------------------------------


def make_optimizer(encoder, config):
    return torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.0, momentum=0.9, nesterov=True,
                           weight_decay=config.weight_decay, fused=True)


def train_step(x, model, optimizer, config):
    """What follows the input x in a step."""
    with bagssl.autocast(x.device):
        _, z = model(x)
    z = bagssl.gather(z.unflatten(0, (-1, config.num_patches)))
    loss, _ = bagssl.vicreg_loss(z, config.inv_weight, config.var_weight, config.cov_weight)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip or math.inf)
    optimizer.step()


def profile(flags, warm_up=5, rounds=20):
    """Print the median time of a step, its rate beside that of a large matrix product, and its operations."""
    config = bagssl.parse_config(flags)
    device, B, S = bagssl.start_process(config.device), config.batch_size, config.image_size
    images = torch.randint(256, (B, 3, S, S), dtype=torch.uint8, device=device)
    u, times = torch.rand(B, config.num_patches, 11, device=device), defaultdict(list)
    encoder = bagssl.Encoder(config.arch, config.stem_stride, config.projector)
    model, views = encoder.to(device, memory_format=torch.channels_last), bagssl.training_views
    optimizer = make_optimizer(encoder, config)
    if config.compile:
        model, views = torch.compile(model), torch.compile(views)
    for _ in range(warm_up + rounds):
        with timed("step", times, device):
            train_step(views(images, u, config), model, optimizer, config)
    with torch.profiler.profile() as operations:
        for _ in range(rounds):
            train_step(views(images, u, config), model, optimizer, config)

    with bagssl.autocast(device):
        dtype = (torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)).dtype
    side = 8192 if device.type == "cuda" else 2048
    square = torch.randn(side, side, device=device, dtype=dtype)
    for _ in range(10):
        with timed("product", times, device):
            square @ square
    seconds, flop = float(np.median(times["step"][warm_up:])), 1e12 * count_step(config, 1)[0]
    rate, limit = flop / seconds / 1e9, 2 * side ** 3 / min(times["product"]) / 1e9
    by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    print(operations.key_averages().table(by, row_limit=16, max_name_column_width=60))
    print(f"step {1e3 * seconds:.1f} ms, {B * config.num_patches / seconds:,.0f} patches/s; {flop / 1e9:,.1f} GFLOP, "
          f"{rate:,.0f} GFLOP/s: {rate / limit:.0%} of the {limit:,.0f} of a large {str(dtype)[6:]} matrix product; "
          f"{torch.get_num_threads()} threads; torch {torch.__version__}")


# ---- flops, scale: a step on tensors without content -----------------------------------------------------------------


class Communication(TorchDispatchMode):
    """Counts the collective operations of the block: [calls, bytes] of each kind.

    Bytes are counted over the rows of all processes: what a gather returns, the tensor that a sum adds up.
    """

    KINDS = {"allgather_": "gather", "allreduce_": "sum"}

    def __init__(self):
        super().__init__()
        self.counts = {kind: [0, 0] for kind in self.KINDS.values()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            count = self.counts[self.KINDS[function._schema.name.removeprefix("c10d::")]]
            count[0] += 1
            count[1] += sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor))
        return function(*args, **kwargs or {})


def count_step(config, processes):
    """TFLOP, peak GB, and [calls, bytes] of each kind of communication of one process in a step of `processes`.

    The network is in bfloat16, as on a GPU. DistributedDataParallel cannot be simulated: its sum of the gradients is
    done here by hand.
    """
    b, S = config.batch_size // processes, config.image_size
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    with mock.patch.object(bagssl, "WORLD_SIZE", processes), FakeTensorMode():
        encoder = bagssl.Encoder(config.arch, config.stem_stride, config.projector)
        if config.arch == "patchnet":  # MemTracker refuses a parameter that is not trained
            whiten = encoder.backbone.whiten.weight.detach()
            del encoder.backbone.whiten.weight
            encoder.backbone.whiten.weight = whiten
        optimizer, memory = make_optimizer(encoder, config), MemTracker()
        images = torch.zeros(b, 3, S, S, dtype=torch.uint8)
        weights = list(encoder.parameters())
        gradients = torch.zeros(sum(p.numel() for p in weights))
        for p, part in zip(weights, gradients.split([p.numel() for p in weights])):
            p.grad = part.view_as(p)
        memory.track_external(encoder, optimizer, images)
        with memory, Communication() as communication, FlopCounterMode(display=False) as flops:
            x = bagssl.training_views(images, torch.rand(b, config.num_patches, 11), config)
            with torch.autocast("cpu", torch.bfloat16):
                _, z = encoder(x)
            z = bagssl.gather(z.unflatten(0, (-1, config.num_patches)))
            loss, _ = bagssl.vicreg_loss(z, config.inv_weight, config.var_weight, config.cov_weight)
            loss.backward()
            if processes > 1:
                for part in gradients.split(25 * 2 ** 20 // gradients.itemsize):  # DistributedDataParallel's buckets
                    dist.all_reduce(part)
            optimizer.step()
        peak = memory.get_tracker_snapshot("peak")[CPU]["Total"]
    dist.destroy_process_group()
    return flops.get_total_flops() / 1e12, peak / 1e9, communication.counts


def count_run(flags):
    """Print the operations of a step and of a run, a multiply-add as two, elementwise operations not counted.

    A folder is taken to be ImageNet.
    """
    config = bagssl.parse_config(flags)
    images = {"demo": 1_600, "cifar10": 50_000, "cifar100": 50_000}.get(config.data, 1_281_167)
    steps, tflop = config.epochs * (images // config.batch_size), count_step(config, 1)[0]
    patches = config.batch_size * config.num_patches
    print(f"{1e3 * tflop:,.4g} GFLOP a step of {patches:,} patches; {config.epochs} epochs of {images:,} images: "
          f"{steps:,} steps, {steps * patches:,} patches, {steps * tflop / 1e3:.3g} PFLOP")


def scale(flags):
    """Print the operations, memory and communication of a process's step, for several numbers of processes."""
    parser = argparse.ArgumentParser(prog="benchmark.py scale", description=scale.__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64, 512], help="numbers of processes")
    ours, flags = parser.parse_known_args(flags)
    config = bagssl.parse_config(flags)
    print(f"{config.arch}, projector {' '.join(map(str, config.projector))}, B = {config.batch_size}, "
          f"V = {config.num_patches}; a step's communication: MB (calls)\n"
          f"processes  images each   TFLOP  peak GB" + "".join(f"{kind:>15}" for kind in Communication.KINDS.values()))
    for n in ours.processes:
        if n < 1 or config.batch_size % n:
            parser.error(f"{config.batch_size} images cannot be divided among {n} processes")
        tflop, peak, counts = count_step(config, n)
        columns = [f"{size / 1e6:,.1f} ({calls})" for calls, size in counts.values()]
        print(f"{n:9}  {config.batch_size // n:11}  {tflop:6.3g}  {peak:7.1f}", *(f"{text:>13}" for text in columns),
              sep="  ", flush=True)


# ---- ratios ----------------------------------------------------------------------------------------------------------

CONFIG = bagssl.Config(**bagssl.PRESETS["cifar10-cpu"])


def compare(what, rounds, sides, patches=None):
    """Time functions in turn; print their medians, and the speed of the others relative to the first."""
    times = defaultdict(list)
    for _ in range(rounds + 1):
        for name, function in sides.items():
            with timed(name, times):
                function()
    medians = {name: float(np.median(seconds[1:])) for name, seconds in times.items()}  # the first round warms up
    first, *others = medians
    figures = {name: f"{patches / median:,.0f} patches/s" if patches else f"{1e3 * median:,.1f} ms"
               for name, median in medians.items()}
    print(f"{what}: {first} {figures[first]}" + "".join(
        f"; {name} {figures[name]}, {medians[first] / medians[name]:.3g} times as fast" for name in others), flush=True)


def per_image(transform, images):
    """The input pipeline of EMP-SSL, lightly and solo-learn: PIL and torchvision's transforms, one patch at a time."""
    images = [transforms.functional.to_pil_image(image) for image in images]
    return torch.stack([torch.stack([transform(image) for _ in range(CONFIG.num_patches)]) for image in images])


def inputs(images, views=bagssl.training_views):
    """Our input pipeline: the encoder's input for each batch of the images."""
    for batch in images.split(CONFIG.batch_size):
        yield views(batch, torch.rand(len(batch), CONFIG.num_patches, 11), CONFIG)


def compare_input(images):
    transform = transforms.Compose([
        transforms.RandomCrop(16), transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2), transforms.RandomSolarize(128, p=0.1), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    batches = torch.utils.data.DataLoader(images, CONFIG.batch_size, shuffle=True, num_workers=os.cpu_count(),
                                          persistent_workers=True, collate_fn=functools.partial(per_image, transform))
    compiled = torch.compile(bagssl.training_views)
    compare("crop + augment", 5, {"per image with PIL": lambda: list(batches), "batched": lambda: list(inputs(images)),
                                  "compiled": lambda: list(inputs(images, compiled))}, len(images) * CONFIG.num_patches)


def our_loss(z):
    return bagssl.vicreg_loss(z)[0]


def square_loss(z):
    """VICReg for two views by the D x D covariance matrix, as its definition says."""
    loss = 25 * (z[:, 0] - z[:, 1]).square().mean()
    for view in z.unbind(1):
        view = view - view.mean(0)
        covariance = view.T @ view / (len(view) - 1)
        loss = loss + 12.5 * (1 - (covariance.diagonal() + 1e-4).sqrt()).relu().mean()
        loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / len(covariance)
    return loss


def compare_losses():
    for B, D in ((64, 1024), (256, 2048), (256, 8192), (1024, 1024), (2048, 512)):
        z = torch.randn(B, 2, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
        torch.testing.assert_close(our_loss(z), square_loss(z))  # one loss, in two ways
        compare(f"loss and gradient, V = 2, B = {B}, D = {D}", 5,
                {"by D x D": lambda: torch.autograd.grad(square_loss(z), z),
                 "ours": lambda: torch.autograd.grad(our_loss(z), z)})


def ratios():
    """Print all comparisons. In each the candidates take turns, so that all see the same machine."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    compare_input(torch.randint(256, (1024, 3, 32, 32), dtype=torch.uint8))
    compare_losses()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["ratios", "profile", "flops", "scale"])
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="those of bagssl.py; ratios takes none")
    arguments = parser.parse_args()
    if arguments.command != "ratios":
        {"profile": profile, "flops": count_run, "scale": scale}[arguments.command](arguments.flags)
    elif arguments.flags:
        parser.error("ratios takes no flags")
    else:
        ratios()


if __name__ == "__main__":
    bagssl.run_cli(main)
