"""The package as others get it: every folder is in the wheel, nothing leaks to the top level, everything imports."""

import shutil
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("lowbit_lightning", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE")

# Runs in an environment that has the wheel but not the repository, and from another folder.
IMPORT_EVERYTHING = """
import importlib, importlib.resources, importlib.util, pathlib, pkgutil, sys
import lowbit_lightning
root = pathlib.Path(lowbit_lightning.__file__).parent
assert root.is_relative_to(sys.prefix), root
names = [module.name for module in pkgutil.walk_packages(lowbit_lightning.__path__, "lowbit_lightning.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert {"lowbit_lightning.kernels.solo", "lowbit_lightning.optim.solo"} <= set(names), names
for leaked in ("kernels", "configs", "tests", "examples"):
    assert importlib.util.find_spec(leaked) is None, leaked
configs = importlib.resources.files("lowbit_lightning.configs")
assert (configs / "recipes" / "quickstart.yaml").is_file()
assert (root / "py.typed").is_file()
"""


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = [path.parent for path in (ROOT / "lowbit_lightning").rglob("__init__.py")]
    beside = [Path("lowbit_lightning") / name for name in ("kernels", "configs")]
    found = [path.relative_to(ROOT) for path in inside] + beside
    assert sorted(listed) == sorted(".".join(path.parts) for path in found)


def test_the_wheel_imports_in_another_environment(tmp_path: Path) -> None:
    source, wheels, other = tmp_path / "source", tmp_path / "wheels", tmp_path / "environment"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)

    venv.create(other, with_pip=False)
    python = other / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", *wheels.glob("*.whl")], check=True)
    # The dependencies come from this environment. A path in a .pth file is added without reading the .pth files
    # there, so the editable install of this repository stays out.
    (site_packages,) = (other / "lib").glob("python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    subprocess.run([python, "-W", "ignore", "-c", IMPORT_EVERYTHING], check=True, cwd=tmp_path)
