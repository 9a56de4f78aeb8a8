"""What of models runs in blocks, each with its published configuration, on the meta device, where no weight is made:
MLPs as one step, projections of one input as a group.
"""

import argparse

import torch
from common import trainable
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    Phi3Config,
    ViTConfig,
    set_seed,
)

import lora_fast

CONFIGS = {
    kind.__name__.removesuffix("Config"): kind
    for kind in (LlamaConfig, GemmaConfig, Phi3Config, GPT2Config, ViTConfig, ModernBertConfig, BertConfig)
}


def adapted(name: str, r: int) -> lora_fast.PeftReport:
    """The report of a model whose linear layers all have adapters of rank r."""
    with torch.device("meta"):
        model = get_peft_model(AutoModel.from_config(CONFIGS[name]()), LoraConfig(r=r, target_modules="all-linear"))
    print(f"\n{name}: {sum(p.numel() for p in trainable(model)):,} parameters train")
    return lora_fast.patch_peft(model)


def main(argv: list[str] | None = None) -> dict[str, lora_fast.PeftReport]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS), metavar="NAME", help="some models")
    parser.add_argument("--rank", type=int, default=16, help="default 16")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args(argv)
    set_seed(args.seed)
    found = {}
    for name in args.only:
        report = found[name] = adapted(name, args.rank)
        joined = [line for line in str(report).splitlines() if " block " in line or " group " in line]
        print("\n".join(joined or ["nothing runs together"]))
        print(f"{report.in_blocks} of {len(report.layers)} layers in {len(report.blocks)} blocks, "
              f"{sum(map(len, report.groups))} in {len(report.groups)} groups")  # fmt: skip
    return found


if __name__ == "__main__":
    main()
