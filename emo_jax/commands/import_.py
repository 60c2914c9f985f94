"""`emo-jax import`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result


def add(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="HF_DIR", help="config.json and *.safetensors, tokenizer.json if there is one")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new run folder; an import goes on where it stopped")
    parser.add_argument("--config", default="", metavar="CONFIG", help="the config of training, and of a state dict's model")


def run(args: Namespace) -> Result:
    from emo_jax.convert.importing import import_checkpoint

    result = import_checkpoint(args.source, args.out, args.config, args.overrides)
    return Result(result, f"{result['parameters']:,} parameters ({result['layout']}, {result['dtype']}) in "
                          f"{result['checkpoint']}")


COMMAND = Command("import", "turn a published checkpoint (Hugging Face folder, or the trainer's state dict in safetensors) "
                  "into a run folder", add, run, ("emo-jax import Emo_1b14b_1T --out runs/emo",
                                             "emo-jax import state_dict --config emo_1b14b_1t --out runs/emo"),
                  overrides="config")
