"""Packaging: `safer_fast/kernels` is a link to `kernels/`, so that installed and uninstalled trees import it alike.

`safer_fast._C` (csrc/) is built where torch and a C++20 compiler are at hand: `pip install --no-build-isolation .`, or
`python setup.py build_ext --inplace` in a checkout. Without it the package works all the same, by its references.
"""

import platform
import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent

if not (HERE / "safer_fast" / "kernels").is_dir():
    raise SystemExit(
        "safer_fast/kernels is not a link to ../kernels: this tree was unpacked from a ZIP, which loses links. "
        "Use `git clone`, `git archive` or the sdist, or run `ln -sfn ../kernels safer_fast/kernels`."
    )

# Contracted to fused multiply-adds, the kernels would round otherwise than the references they are tested against.
# The target version is the oldest torch that the library loads with: one build serves 2.11 and all later ones.
# The last flag keeps this folder's name out of the messages.
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", f"-ffile-prefix-map={Path(__file__).parent}=."]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]


def native() -> dict:
    """The arguments for setup() that build `_C`, or none where that cannot work."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return without("torch is not importable here (pip install --no-build-isolation builds against yours)")
    if platform.system() == "Windows":
        return without("csrc/ is not tried on Windows")

    class OrElsePython(BuildExtension):
        """A failed build leaves the references, and says so."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # compilers fail in many ways, and none may stop the installation
                without(f"the build failed: {error}")

    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cpu").glob("*.cpp"))
    headers = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cpu").glob("*.h"))
    extension = CppExtension("safer_fast._C", sources, depends=headers, extra_compile_args=FLAGS, py_limited_api=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OrElsePython}}


def without(reason: str) -> dict:
    print(f"safer_fast: no native CPU kernels, the slower PyTorch references run instead: {reason}", file=sys.stderr)
    return {}


# Namespace packages, since kernels/ has no __init__.py: as a top-level `kernels` it would shadow another package.
packages = find_namespace_packages(include=["safer_fast", "safer_fast.*"], exclude=["*__pycache__*"])
setup(packages=packages, **native())
