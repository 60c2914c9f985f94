"""`emo-jax export`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments

FORMATS = ("hf", "qwen2_moe", "deepseek", "llama", "gguf", "expert-profile")
DTYPES = ("auto", "float32", "bfloat16", "float16", "f32", "bf16", "f16", "q8_0", "q4_0")


def add(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--format", default="hf", choices=FORMATS, metavar="FORMAT",
                        help="hf: the published architecture (remote code). qwen2_moe (or deepseek), llama: the same "
                        "function of MoE and dense models in stock transformers, vLLM and mlx-lm. gguf: one file for llama.cpp. expert-profile: the experts of "
                        "--subset, for servers that keep some of a whole model")
    parser.add_argument("--subset", default="", metavar="FILE", help="of --format expert-profile")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, metavar="DTYPE",
                        help="one of " + ", ".join(DTYPES) + "; auto: as imported, else float32 (gguf: f16)")


def run(args: Namespace) -> Result:
    from emo_jax.convert.exporting import export_checkpoint
    from emo_jax.convert.formats import Options

    result = export_checkpoint(args.checkpoint, args.out, args.format, args.step, Options(args.dtype, subset=args.subset))
    return Result(result, f"{result['tensors']:,} tensors, {result['bytes'] / 1e9:.2f} GB ({result['architecture']}, "
                          f"{result['dtype']}) in {result['out']}")


COMMAND = Command("export", "write a checkpoint for transformers and vLLM", add, run, (
    "emo-jax export runs/emo --out HF", "emo-jax export runs/law --format qwen2_moe --dtype bfloat16 --out HF"))
