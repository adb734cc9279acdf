"""
Images: the step of a hypercomplex ResNet18 beside the real one's.

    python eval/benchmarks/hypercomplex.py [--narrow 4] [--batch_size 64] [--quick]

A training step, forward and backward, on random images of 32 x 32, of the real network and its form over each algebra,
of the same width; all interleaved, medians over rounds. A row a network goes to results/hypercomplex.jsonl, and the
table of all rows of these settings to hypercomplex.md.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time

import torch
from common import RESULTS, add_quick, latest_rows, store
from torchvision.models import resnet18

from darel_hf.vision.hypercomplex import ALGEBRAS, cost, to_hypercomplex
from darel_hf.vision.images import narrow, small_image_stem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--narrow", type=float, default=1.0, help="channels are divided by it")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.narrow, options.batch_size, options.rounds = 8.0, 4, 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.getLogger("darel_hf").setLevel(logging.ERROR)  # each conversion tells its costs
    real = resnet18(num_classes=10)
    real = small_image_stem(real if options.narrow == 1 else narrow(real, options.narrow))
    networks = {"real": real, **{algebra: to_hypercomplex(real, algebra) for algebra in sorted(ALGEBRAS)}}
    images, labels = torch.randn(options.batch_size, 3, 32, 32), torch.randint(10, (options.batch_size,))
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(options.rounds + 1):
        for name, network in networks.items():
            network.zero_grad()
            started = time.perf_counter()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    settings = {key: value for key, value in vars(options).items() if key != "quick"}
    parameters, flops = cost(real, 32)
    for name, network in networks.items():
        own, own_flops = cost(network, 32)
        row = {"arm": name, "seed": 0, "step": medians[name] / medians["real"], "seconds": medians[name]}
        store("hypercomplex", settings, {**row, "parameters": own / parameters, "flops": own_flops / flops})
    lines = ["| network | step | parameters | FLOPs, forward |", "| --- | --- | --- | --- |"]
    for name, (row,) in latest_rows("hypercomplex", settings).items():
        lines.append(f"| {name} | {row['step']:.2f} | {row['parameters']:.2f} | {row['flops']:.2f} |")
    conditions = ", ".join(f"{key} {value}" for key, value in settings.items())
    (RESULTS / "hypercomplex.md").write_text("\n".join(lines) + f"\n\nSettings: {conditions}.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
