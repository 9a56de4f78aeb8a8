"""minLoRA's way on handwritten digits: LoRA as a parametrization of the weights, one adapter for each of three tasks.

A small convolutional network that knows the digits 0-4 gets three adapters, each for one kind of strange image:
inverted, mirrored, turned. They are trained, saved, loaded side by side into one model, selected in turn and merged.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lora_fast import LoRAConfig, parametrize
from lora_fast.cli.demo import accuracy, load_digits

TASKS: dict[str, Any] = {
    "inverted": lambda images: images.amax() + images.amin() - images,
    "mirrored": lambda images: images.flip(3),
    "turned": lambda images: images.rot90(1, (2, 3)),
}


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--rank", type=int, default=4, help="of the adapters")
    parser.add_argument("--steps", type=int, default=200, help="of the optimiser, for the network and each adapter")
    parser.add_argument("--batch", type=int, default=128, help="images of a step")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument("--out", type=Path, default=Path("minlora-out"), help="folder for the adapters")
    return parser.parse_args(argv)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(784, 5)
    )


def fit(args: argparse.Namespace, name: str, model: nn.Module, parameters: Any, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    for _ in tqdm(range(args.steps), desc=name, leave=False):
        batch = torch.randint(len(labels), (args.batch,), device=labels.device)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Returns {task: test accuracy before and after}."""
    args = options(argv)
    torch.manual_seed(args.seed)
    digits = load_digits(torch.device(args.device))[0]
    (images, labels), (held_out, held_out_labels) = (
        (x.view(-1, 1, 28, 28), y) for x, y in (digits["train"], digits["test"])
    )
    base = network().to(args.device)
    fit(args, "base", base, base.parameters(), images, labels)
    print(f"The network knows 0-4: test accuracy {accuracy(base, held_out, held_out_labels):.3f}")
    print(f"It has {sum(p.numel() for p in base.parameters())} parameters")

    # Add and train: an adapter for each task, each on its own copy of the network, then its file.
    config = LoRAConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=".*", use_dora=args.dora)
    args.out.mkdir(parents=True, exist_ok=True)
    alone = {}
    for task, change in TASKS.items():
        model = parametrize.add_lora(copy.deepcopy(base), config)
        fit(args, task, model, list(parametrize.get_lora_params(model)), change(images), labels)
        torch.save(parametrize.get_lora_state_dict(model), args.out / f"{task}.pt")
        alone[task] = model
    print(f"Trained {sum(p.numel() for p in parametrize.get_lora_params(model))} for each task; saved in {args.out}")

    # Load all three beside each other, and select them in turn.
    model, result = copy.deepcopy(base), {}
    for task in TASKS:
        parametrize.add_lora(model, config, name=task)
        parametrize.load_lora_state_dict(model, torch.load(args.out / f"{task}.pt"), name=task)
    print(model[-1])
    for task, change in TASKS.items():
        x = change(held_out)
        selected = parametrize.select_lora(model, task)(x)
        assert torch.equal(selected, alone[task](x))
        result[task] = accuracy(base, x, held_out_labels), accuracy(model, x, held_out_labels)

        # Merge: a plain network again, with the same outputs.
        merged = parametrize.merge_lora(copy.deepcopy(model))
        assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
        torch.testing.assert_close(merged(x), selected)
    parametrize.remove_lora(model)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), base.parameters(), strict=True))

    print(f"{'task':10} before  after (selected, and merged)")
    for task, (before, after) in result.items():
        print(f"{task:10} {before:6.3f} {after:6.3f}")
    return result


if __name__ == "__main__":
    main()
