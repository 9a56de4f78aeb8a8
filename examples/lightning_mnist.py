"""LoRA and DoRA on MNIST with Lightning: a network that knows the digits 0-4 learns 5-9, at several ranks and in full.

The experiment of `lora-fast demo`, on its digits and its network, in Lightning's terms: a LightningModule, a CSVLogger,
and the callbacks EarlyStopping, LearningRateMonitor, LearningRateFinder and one of our own.
"""

import argparse
import contextlib
import copy
import io
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from lora_fast import load_adapter, save_adapter
from lora_fast.cli.arguments import whole_number, whole_numbers
from lora_fast.cli.demo import BATCH, MAX_EPOCHS, PATIENCE, Digits, adapted, load_digits, network
from lora_fast.cli.demo_report import Run, plot, table

SWEEP = 1e-4, 1.0, 40  # of the finder: from, to, in so many steps; the first ten never count


class Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.lr = model, 1e-3  # what the finder finds takes the place of this rate

    def _loss(self, part: str, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        outputs = self.model(images)
        loss = F.cross_entropy(outputs, labels)
        accuracy = (outputs.argmax(1) == labels).float().mean()
        self.log_dict({f"{part}_loss": loss, f"{part}_accuracy": accuracy}, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self._loss("train", batch)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self._loss("validation", batch)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self._loss("test", batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr, weight_decay=0.0)
        plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=PATIENCE // 3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "validation_loss"}}


class QuietFinder(LearningRateFinder):
    """Lightning's, without its bar beneath ours."""

    def lr_find(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            super().lr_find(trainer, pl_module)


class KeepBest(lightning.Callback):
    """Copies what trains, an adapter's few tensors, after each epoch with the best loss on validation, and puts that
    back at the end. A ModelCheckpoint would write the whole model each time."""

    def __init__(self, progress: Progress, name: str, epochs: int) -> None:
        self.progress, self.bar = progress, progress.add_task(name, total=epochs)
        self.scores: dict[str, float] = {"validation_loss": float("inf")}
        self.kept: list[Tensor] = []
        self.epochs = 0

    def _trained(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters() if p.requires_grad]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        scores = {name: value.item() for name, value in trainer.callback_metrics.items()}
        if scores["validation_loss"] < self.scores["validation_loss"]:
            self.scores, self.kept = scores, [p.detach().clone() for p in self._trained(pl_module)]
        self.epochs += 1
        self.progress.update(self.bar, completed=self.epochs)

    @torch.no_grad()
    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for parameter, value in zip(self._trained(pl_module), self.kept, strict=True):
            parameter.copy_(value)
        self.progress.remove_task(self.bar)


def fit(args: argparse.Namespace, progress: Progress, name: str, model: nn.Module, digits: Digits) -> dict[str, Any]:
    """Train ``model``, leave its best epoch, test it; returns its scores, the rate that was found, epochs, seconds."""
    began, module = time.perf_counter(), Classifier(model)
    finder, best = QuietFinder(*SWEEP), KeepBest(progress, name, args.epochs)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=1,
        default_root_dir=args.out,
        logger=CSVLogger(args.out / "logs", name.replace(" ", "_")),
        log_every_n_steps=1,
        callbacks=[finder, EarlyStopping("validation_loss", patience=PATIENCE), LearningRateMonitor("epoch"), best],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loaders = {
        part: DataLoader(TensorDataset(*data), BATCH, shuffle=part == "train", pin_memory=torch.cuda.is_available())
        for part, data in digits.items()
    }
    trainer.fit(module, loaders["train"], loaders["validation"])
    (tested,) = trainer.test(module, loaders["test"], verbose=False)
    seconds = time.perf_counter() - began
    return {**best.scores, **tested, "lr": module.lr, "epochs": best.epochs, "seconds": seconds}


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=whole_numbers, default="1,2,4,8,16,32,64", help="ranks, separated by commas")
    parser.add_argument("--epochs", type=whole_number, default=MAX_EPOCHS, help="of a run at most")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="Lightning's name for it")
    parser.add_argument("--out", type=Path, default=Path("lightning-out"), help="folder for logs, plot and an adapter")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, list[Run]]:
    """Returns the runs of LoRA, of DoRA and the full fine-tune."""
    args = options(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the images are in memory
    console, began = Console(highlight=False, markup=False, soft_wrap=True), time.perf_counter()
    known, new = load_digits(torch.device("cpu"))
    runs: dict[str, list[Run]] = {"LoRA": [], "DoRA": [], "full": []}
    models: dict[str, nn.Module] = {}
    with Progress(console=console) as progress:
        total = progress.add_task("all runs", total=2 + 2 * len(args.ranks))

        def run(name: str, model: nn.Module, digits: Digits) -> dict[str, Any]:
            scores = fit(args, progress, name, model, digits)
            progress.advance(total)
            console.print(
                f"{name:13} found rate {scores['lr']:.4f}, {scores['epochs']:3} epochs, train loss "
                f"{scores['train_loss']:.3f}, accuracy {scores['validation_accuracy']:.3f} on validation, "
                f"{scores['test_accuracy']:.3f} on test"
            )
            return scores

        lightning.seed_everything(args.seed, verbose=False)
        base = network()
        run("pretraining", base, known)
        size = sum(p.numel() for p in base.parameters())
        for method, rank in [*((m, r) for m in ("LoRA", "DoRA") for r in args.ranks), ("full", 0)]:
            lightning.seed_everything(args.seed, verbose=False)
            name = f"{method} r={rank}" if rank else "full"
            models[name] = model = adapted(base, rank, method == "DoRA") if rank else copy.deepcopy(base)
            scores = run(name, model, new)
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            accuracies = scores["validation_accuracy"], scores["test_accuracy"]
            runs[method].append(
                Run(rank, args.seed, trainable, trainable / size, *accuracies, scores["epochs"], scores["seconds"])
            )

    groups = {method: [[run] for run in runs[method]] for method in ("LoRA", "DoRA")}
    console.print(table(groups, runs["full"]), soft_wrap=False)
    plot(groups, runs["full"]).savefig(args.out / "accuracy.png", dpi=150)

    method, best = max(
        ((method, run) for method in groups for run in runs[method]), key=lambda pair: pair[1].validation_accuracy
    )
    name = f"{method} r={best.rank}"
    save_adapter(models[name], args.out / "adapter")
    loaded, images = load_adapter(copy.deepcopy(base), args.out / "adapter"), new["test"][0]
    with torch.no_grad():
        same = torch.equal(models[name](images), loaded(images))
    console.print(
        f"{name} was best on validation; saved and loaded again, its outputs are {'' if same else 'not '}equal"
    )
    console.print(
        f"{args.out} holds logs, accuracy.png and adapter. All this took {time.perf_counter() - began:.0f} s."
    )
    if not same:
        raise SystemExit("the adapter that was loaded gives other outputs than the one that was saved")
    return runs


if __name__ == "__main__":
    main()
