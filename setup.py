"""`pip install -e .`: kernels/ is installed as fastelectra.kernels, never as `kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "fastelectra/__init__.py").read_text())[1]

setup(
    name="fastelectra",
    version=version,
    description="Fast ELECTRA pre-training: raw text in, a discriminator Hugging Face loads out",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastelectra", "fastelectra.*"]), "fastelectra.kernels"],
    package_dir={"fastelectra.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "numba>=0.61",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "scipy>=1.11",
        "scikit-learn>=1.4",
        "triton>=3.6,<3.9; sys_platform == 'linux'",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "data": ["datasets>=3.0", "pyarrow>=15", "zstandard>=0.22"],
    },
    entry_points={"console_scripts": ["fastelectra = fastelectra.cli:console"]},
)
