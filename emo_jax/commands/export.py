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
                        "function of MoE and dense models in stock transformers, vLLM and mlx-lm. gguf: a file for llama.cpp. "
                        "expert-profile: the experts of --subset, for servers that keep some of a whole model")
    parser.add_argument("--subset", default="", metavar="FILE", help="of --format expert-profile")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, metavar="DTYPE",
                        help="one of " + ", ".join(DTYPES) + "; auto: as imported, else float32 (gguf: f16)")
    parser.add_argument("--code", default="own", choices=("own", "published"), metavar="CODE",
                        help="of --format hf: own puts our modeling code into the folder (transformers 4.57 and 5, offline); "
                        "published names the published code on the hub (transformers 4.57)")
    parser.add_argument("--license", default="", metavar="ID", help="the hub's name of the licence, for the model card")
    parser.add_argument("--push", default="", metavar="REPO", help="also upload the folder to this repository of the hub, "
                        "ORGANISATION/NAME (extra hub; log in with `hf auth login` or HF_TOKEN)")


def run(args: Namespace) -> Result:
    from emo_jax.convert import hub
    from emo_jax.convert.exporting import export_checkpoint
    from emo_jax.convert.formats import Options

    push = hub.Push.checked(args.push, args.out) if args.push else None
    options = Options(args.dtype, subset=args.subset, code=args.code, license=args.license, repo=args.push)
    result = export_checkpoint(args.checkpoint, args.out, args.format, args.step, options)
    if push:
        result |= {"pushed": push(result["out"])}
    return Result(result, f"{result['tensors']:,} tensors, {result['bytes'] / 1e9:.2f} GB ({result['architecture']}, "
                          f"{result['dtype']}) in {result['out']}" + (f", {result['pushed']}" if push else ""))


COMMAND = Command("export", "write a checkpoint for transformers, vLLM, mlx-lm or llama.cpp", add, run, (
    "emo-jax export runs/emo --out HF --license apache-2.0 --push me/emo",
    "emo-jax export runs/law --format qwen2_moe --dtype bfloat16 --out HF",
    "emo-jax export runs/law --format gguf --dtype q8_0 --out GGUF"))
