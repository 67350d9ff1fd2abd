"""The shape of the house: which folder may import which, and which library lives where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS: dict[str, set[str]] = {}
_BASE = {"typing", "errors", "config", "files"}
_SERVICES = {"optim", "sharding", "distributed", "data", "checkpoint", "generation", "evaluation", "interop"}
for _name in _BASE:
    LAYERS[_name] = {"errors"}
LAYERS["ops"] = {"typing", "errors", "ops"}
LAYERS["nn"] = _BASE | {"ops", "nn"}
LAYERS["models"] = LAYERS["nn"] | {"models"}
for _name in _SERVICES:
    LAYERS[_name] = LAYERS["models"] | _SERVICES
LAYERS["training"] = LAYERS["models"] | _SERVICES | {"training"}

HOMES = {
    "flax": {"nn", "models", "training", *_SERVICES},
    "optax": {"optim", "training"},
    "grain": {"data"},
    "array_record": {"data"},
    "orbax": {"checkpoint"},
    "tensorboardX": {"training"},
    "tokenizers": {"data", "interop"},
    "safetensors": {"interop"},
    "torch": {"interop"},
    "transformers": {"interop"},
}
ONLY_INSIDE_FUNCTIONS = {"torch", "transformers"}
TORCH_MODULES = "ssm_jax.interop.torch"
"""Its files import PyTorch at the top, so that nobody else may import them there; ``register`` is what all may."""


def _sources() -> list[Path]:
    return sorted((ROOT / "ssm_jax").rglob("*.py"))


def _home(path: Path) -> str:
    return path.relative_to(ROOT / "ssm_jax").parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at top level) of every import statement of a file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, id(node) in top)]
            found += [
                (f"{node.module}.{alias.name}", id(node) in top) for alias in node.names if node.module == "ssm_jax"
            ]
    return found


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    home = _home(path)
    if home == "__init__":
        return
    for module, _ in _imports(path):
        parts = module.split(".")
        if parts[0] == "ssm_jax" and len(parts) > 1:
            assert parts[1] in LAYERS[home], f"{home} must not import ssm_jax.{parts[1]}"


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_stay_in_their_homes(path: Path) -> None:
    for module, at_top in _imports(path):
        library = module.split(".")[0]
        if library in HOMES:
            assert _home(path) in HOMES[library], f"{library} belongs to {sorted(HOMES[library])}"
            only_inside = library in ONLY_INSIDE_FUNCTIONS and not _is_torch_module(path)
            assert not (at_top and only_inside), f"{library} only inside functions"
        elif module.startswith(f"{TORCH_MODULES}.") and module != f"{TORCH_MODULES}.register":
            assert not at_top or _is_torch_module(path), f"{module} only inside functions"


def _is_torch_module(path: Path) -> bool:
    folder = ROOT / Path(*TORCH_MODULES.split("."))
    return path.parent == folder and path.name not in ("__init__.py", "register.py")


def test_import_is_cheap_and_every_public_name_resolves() -> None:
    code = (
        "import sys, ssm_jax; heavy = {'jax', 'flax', 'torch', 'grain', 'orbax'} & set(sys.modules); "
        "assert not heavy, heavy; [getattr(ssm_jax, name) for name in dir(ssm_jax)]; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
