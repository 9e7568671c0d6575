"""``python -m regimewrap.integrations.timm.train``: train any model of timm while its budget moves, from timm's parts.

Arguments to a ``Run``, errors to one line and an exit status: 0 is success, 2 a mistake or something missing, 130
Ctrl-C. Runs on one process, or on many under torchrun. No work of its own.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from timm import utils

from regimewrap.errors import RegimewrapError
from regimewrap.policy.policy import PRESETS
from regimewrap.recipes.outputs import claimed_folder

from .images import AUGMENTATIONS
from .run import Run, start_from

if TYPE_CHECKING:
    from collections.abc import Sequence

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or this process's; return the exit status."""
    args = _parser().parse_args(arguments)
    try:
        device: torch.device = utils.init_distributed_device(args)
        with claimed_folder(args.out):
            Run(args, device, start_from(args.out, args.resume)).train()
    except RegimewrapError as error:
        return _failed(str(error))
    except torch.OutOfMemoryError:
        return _failed("the device's memory is full. Choose smaller batches with --batch-size.")
    except KeyboardInterrupt:
        sys.stderr.write(f"Interrupted; the same command with --resume goes on. The run is in {args.out}.\n")
        return _INTERRUPTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regimewrap.integrations.timm.train",
        description="Train a model of timm while its activation budget moves, from timm's own parts.",
        epilog="Under torchrun, --batch-size is that of one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, help="digits, cifar10, or a folder or zip with train/ and test/ (or val/) of images")
    add("--out", type=Path, required=True, help="folder for summary.csv and timm's checkpoints")
    add("--model", required=True, help="a model of timm, such as resnet18 or regimewrap_wrn28_4")
    add("--model-kwargs", nargs="*", type=_pair, default=[], metavar="NAME=VALUE", help="for timm.create_model")
    add("--pretrained", action="store_true", help="begin with timm's pretrained weights")
    add(
        "--policy",
        help=f"a preset ({', '.join(PRESETS)}), rescaled to the run; a policy file; or none, which trains the bare "
        "model; without it, loss-reset, or for regimewrap_auto that model's own",
    )
    add("--limit", type=_count, help="most training images")
    add("--test-limit", type=_count, help="most test images")
    add("--img-size", type=_count, help="scale the images to this height and width")
    add("--augment", choices=AUGMENTATIONS, default="none", help="of training images")
    add("--aa", metavar="NAME", help="with --augment timm: an auto-augment policy of timm's, such as rand-m9-mstd0.5")
    add("--epochs", type=_count, default=10, help="passes over the training images")
    add("--batch-size", type=_count, default=128, help="images in a batch")
    add("--grad-accum-steps", type=_count, default=1, help="batches in an update")
    add("--opt", default="sgd", help="an optimizer of timm's")
    add("--opt-kwargs", nargs="*", type=_pair, default=[], metavar="NAME=VALUE", help="for the optimizer")
    add("--lr", type=_positive, default=0.1, help="learning rate")
    add("--momentum", type=float, default=0.9, help="of the optimizer, where it has one")
    add("--weight-decay", type=float, default=0.0, help="of the optimizer")
    add("--clip-grad", type=_positive, help="largest norm of the gradient")
    add("--smoothing", type=float, default=0.0, help="of the labels")
    add("--sched", default="cosine", help="a learning rate schedule of timm's")
    add("--sched-kwargs", nargs="*", type=_pair, default=[], metavar="NAME=VALUE", help="for the schedule")
    add("--sched-on-updates", action="store_true", help="move the learning rate at each update, not each epoch")
    add("--warmup-epochs", type=int, default=0, help="epochs over which the learning rate rises")
    add("--warmup-lr", type=float, default=1e-5, help="where it begins to rise")
    add("--model-ema", action="store_true", help="evaluate a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.9998, help="weight on the past, per update")
    add("--model-ema-warmup", action="store_true", help="begin with less weight on the past")
    add("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and limits")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--workers", type=int, default=0, help="processes that prepare batches")
    resume_help = "go on from a checkpoint; without FILE, from the newest in --out, or from the beginning without one"
    add("--resume", nargs="?", const="", metavar="FILE", help=resume_help)
    add("--recovery-interval", type=_count, default=200, help="updates between two checkpoints within an epoch")
    add("--checkpoint-hist", type=_count, default=3, help="how many of the best epochs to keep")
    add("--log-interval", type=_count, default=50, help="updates between two lines")
    return parser


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE; got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # text without quotes


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number; got {text!r}")
    return value


def _failed(text: str) -> int:
    for line in text.splitlines():
        sys.stderr.write(f"Error: {line}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
