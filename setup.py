"""Builds the Cython kernels; everything else is in pyproject.toml.

``GATEWAY_CYTHON_DEBUG=1`` builds them with bounds checks, with the ring's seeded yields and deaths
compiled in, and without optimisation of asserts; the tests run against both builds.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("GATEWAY_CYTHON_DEBUG", "0") not in ("", "0")

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "initializedcheck": DEBUG,
    "cdivision": not DEBUG,
    "nonecheck": DEBUG,
    "embedsignature": True,
    "freethreading_compatible": False,
}

KERNELS = (
    "ring",
    "pack",
    "decode",
    "slots",
    "heads",
    "ledger",
    "skeleton",
    "burst",
    "templates",
    "fastlane",
)
DEPENDS = {
    "ring": ["kernels/atomics.h", "kernels/ring_layout.h"],
    "heads": ["kernels/http_head.h", "kernels/http_answer.h"],
    "ledger": ["kernels/atomics.h", "kernels/ledger_layout.h"],
    "skeleton": ["kernels/json_blocks.h", "kernels/numbers.h"],
    "fastlane": [
        "kernels/http_head.h",
        "kernels/http_answer.h",
        "kernels/ledger_layout.h",
        "kernels/ring_layout.h",
    ],
}

extensions = [
    Extension(
        f"gateway._kernels.{name}",
        [f"kernels/{name}.pyx"],
        include_dirs=["kernels"],
        depends=DEPENDS.get(name, []),
        define_macros=[("GATEWAY_RING_STEPS", "1" if DEBUG else "0")],
        extra_compile_args=["-O2", "-g", "-std=c11"] if DEBUG else ["-O3", "-std=c11"],
    )
    for name in KERNELS
]

setup(
    ext_modules=cythonize(
        extensions,
        compiler_directives=DIRECTIVES,
        build_dir="build/cython-debug" if DEBUG else "build/cython",
    )
)
