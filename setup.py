"""Packaging of sepllm-train. Exact torch builds are chosen by constraints.txt; the ranges live here."""

from pathlib import Path

from setuptools import find_packages, setup

CONFIG_GROUPS = sorted(p.name for p in Path(__file__).parent.joinpath("configs").iterdir() if p.is_dir())

setup(
    name="sepllm-train",
    version="0.1.0",
    description="Pretrain GPTs with SepLLM's separator attention on megatron-core",
    long_description=Path(__file__).parent.joinpath("README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # sep_attention lives in kernels/ because an importable package called `kernels` would shadow the library of
    # that name which transformers imports. The configurations ship inside the wheel as sepllm_train.configs.
    packages=find_packages(include=["sepllm_train*", "data_prep*"])
    + ["sep_attention", "sep_attention.decode", "sep_attention.triton", "sepllm_train.configs"]
    + [f"sepllm_train.configs.{group}" for group in CONFIG_GROUPS],
    package_dir={"sep_attention": "kernels/sep_attention", "sepllm_train.configs": "configs"}
    | {f"sepllm_train.configs.{group}": f"configs/{group}" for group in CONFIG_GROUPS},
    package_data={
        "sepllm_train.configs": ["*.yaml"],
        "sepllm_train.watch": ["page/*"],
        **{f"sepllm_train.configs.{group}": ["*.yaml"] for group in CONFIG_GROUPS},
    },
    install_requires=[
        "torch>=2.11,<2.16",
        "megatron-core>=0.16.1,<0.20; platform_system == 'Linux'",
        # From 0.18 on megatron-core imports Triton, which has wheels for Linux alone.
        "megatron-core>=0.16.1,<0.18; platform_system != 'Linux'",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3",
        "numpy>=1.26",
        "psutil",  # megatron-core's checkpoint writer hangs without it and does not declare it
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "zstandard",
        "tqdm",
        "matplotlib>=3.8",
    ],
    extras_require={
        "gpu": [
            "flash-attn; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
        "wandb": ["wandb>=0.31", "wandb-workspaces>=0.4"],
        "tensorboard": ["tensorboard"],
        "hf": ["transformers>=5.5", "safetensors", "protobuf"],  # protobuf reads SentencePiece's files
        # pyarrow, which lm_eval's datasets bring, refuses NumPy 1 from version 26 on and does not declare it.
        "parquet": ["pyarrow"],
        "eval": ["lm_eval[hf]>=0.4.13", "transformers>=5.5", "safetensors", "protobuf", "numpy>=2"],
        "dev": [
            "wandb>=0.31",
            "wandb-workspaces>=0.4",
            "tensorboard",
            "transformers>=5.5",
            "safetensors",
            "lm_eval[hf]>=0.4.13",
            "pyarrow",
            "peft",
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "ruff==0.17.6",
            "import-linter>=2.5",
            "mypy==2.4.1",
            "pre-commit",
            "setuptools>=77",
        ],
    },
    entry_points={
        "console_scripts": [
            "sepllm=sepllm_train.cli.main:run_process",
            # For one release: these name the new command.
            "sepllm-pretrain=sepllm_train.cli.old:run_process",
            "sepllm-prepare-data=sepllm_train.cli.old:run_process",
            "sepllm-compare-runs=sepllm_train.cli.old:run_process",
        ]
    },
)
