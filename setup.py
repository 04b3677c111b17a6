"""Packaging of megaslm. Ranges stand here; the exact versions that are tested stand in constraints.txt.

deepspeed is built from source and its build imports torch, so torch comes first (launch/install.sh does both):

    pip install -c constraints.txt torch setuptools wheel
    pip install -c constraints.txt --no-build-isolation -e .
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megaslm/__init__.py").read_text(encoding="utf-8"))[1]
README = HERE / "README.md"

setup(
    name="megaslm",
    version=VERSION,
    description="Pretrain small language models from raw text to a Hugging Face checkpoint, on any machine",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megaslm", "megaslm.*"]) + find_packages("kernels"),
    package_dir={"megaslm_kernels": "kernels/megaslm_kernels"},
    package_data={"megaslm.config": ["presets/*.json"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.9,<2.14",
        # One version: DeepSpeed changes defaults and removes features between minor versions.
        "deepspeed==0.19.8",
        # Not in constraints.txt: CUDA builds of torch ask for the one version they are built with.
        'triton>=3.6; platform_system == "Linux"',
        "annotated-types>=0.6",
        "datasets>=4",
        "gigatoken>=0.10,<0.11",
        "huggingface-hub>=0.25",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "orjson>=3.10",
        "psutil>=5.9",
        "pyarrow>=17",
        "pydantic>=2.9,<3",
        "pypdf[crypto]>=5",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "tokenizers>=0.21,<0.24",
        "tqdm>=4.66",
        "transformers>=4.56,<6",
        "typing-extensions>=4.12",
        "zstandard>=0.22",
    ],
    extras_require={
        "eval": ["lm_eval>=0.4.12"],
        "float8": ["torchao>=0.18,<0.19"],
        "wandb": ["wandb>=0.19"],
        "dev": [
            "hypothesis>=6.100",
            "lm_eval>=0.4.12",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "torchao>=0.18,<0.19",
            "wandb>=0.19",
        ],
    },
)
