"""gpt2_variants: DeepSpeed training and measurement of GPT-2 variants."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "gpt2_variants/__init__.py").read_text()).group(1)

setup(
    name="gpt2_variants",
    version=VERSION,
    description="Is a new GPT-2 architecture better than GPT-2, at equal data and equal cost?",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["gpt2_variants", "gpt2_variants.*"]), "gpt2_variants.ds_configs"],
    package_dir={"gpt2_variants.ds_configs": "ds_configs"},  # visible in a checkout, within the package in a wheel
    package_data={
        "gpt2_variants": ["py.typed", "*/*.md", "report/templates/*"],
        "gpt2_variants.ds_configs": ["*.json"],
    },
    entry_points={"console_scripts": ["gpt2-variants = gpt2_variants.__main__:script"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "deepspeed>=0.19.8",  # before 0.18.7 small models ran 2.5 times slower
        "datasets>=4",
        "tokenizers>=0.22",
        "huggingface_hub>=1.5",
        "safetensors",
        "filelock",
        "jinja2>=3.1",
        "pydantic>=2",
        "xxhash",
        "numpy",
        "psutil",
        "tqdm",
    ],
    extras_require={
        "wandb": ["wandb>=0.20"],
        "tensorboard": ["tensorboard>=2.18"],
        "zst": ["zstandard>=0.22"],  # to read .zst files
        "plot": ["matplotlib>=3.8", "scipy>=1.11"],
        "lm-eval": ["lm_eval[hf]>=0.4.13,<0.5"],
        "dev": [
            *("pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "ruff", "mypy>=2,<3", "zstandard>=0.22"),
            *("accelerate>=1.1", "peft>=0.17", "tensorboard>=2.18"),  # other people's tools, for the tests
        ],
    },
)
