"""One set of packages however it is installed: pyproject, constraints, conda, make."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALL = (ROOT / "tools" / "install.sh").read_text()


def pins():
    """{package: version} of constraints.txt."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.!]+)", line)
            assert match, f"constraints.txt: {line!r} is not an exact pin"
            name = canonicalize_name(match[1])
            assert name not in found, f"constraints.txt pins {name} twice"
            found[name] = match[2]
    return found


def conda():
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def requirements():
    """Every requirement of the project, in all extras."""
    extras = [line for name, lines in EXTRAS.items() if name != "all" for line in lines]
    return [Requirement(line) for line in PROJECT["dependencies"] + extras]


def test_conda_installs_what_make_installs():
    """The pip lines of environment.yml are those of tools/install.sh."""
    (pip_lines,) = [d["pip"] for d in conda()["dependencies"] if isinstance(d, dict)]
    assert [line.split()[0] for line in pip_lines] == ["-c", "-e"]
    constraint, package = (line.split(None, 1)[1] for line in pip_lines)
    assert re.findall(r"--constraint ([\w./-]+)", INSTALL) == [constraint]
    assert re.findall(r'--editable "([^"]+)"', INSTALL) == [package] == [".[all]"]


def test_conda_brings_only_python_and_pip_besides():
    plain = [d for d in conda()["dependencies"] if isinstance(d, str)]
    assert [re.split("[=<>]", line)[0] for line in plain] == ["python", "pip"]
    version = plain[0].split("=")[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)


def test_all_is_the_union_of_the_extras():
    (everything,) = EXTRAS["all"]
    assert Requirement(everything).name == PROJECT["name"]
    assert Requirement(everything).extras == set(EXTRAS) - {"all"}


def test_every_requirement_is_pinned_within_its_range():
    versions = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in versions, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(versions[name]), f"{requirement} excludes the pin"


@pytest.mark.skipif(
    Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(), reason="not run by `make test`"
)
def test_every_installed_package_is_at_its_pin():
    versions, wrong = pins(), []
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        public = distribution.version.split("+")[0]  # torch's CPU build is 2.13.0+cpu
        # A GPU build of torch brings CUDA packages that it pins itself.
        if name in ("pip", "qwenlib", "triton") or name.startswith(("nvidia-", "cuda-")):
            continue
        if versions.get(name) != public:
            wrong.append(f"{name} {public}, pinned {versions.get(name)}")
    assert wrong == []


def test_library_imports_only_declared_packages():
    """A package that another one happens to bring may be gone with its next release."""
    declared = {canonicalize_name(r.name) for r in requirements()}
    test_only = {canonicalize_name(Requirement(line).name) for line in EXTRAS["test"]}
    owners = metadata.packages_distributions()
    optional = {"torch_npu", "triton"}  # imported only where present
    faults = []
    for path in sorted((ROOT / "qwenlib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for top in {module.split(".")[0] for module in modules}:
                if top in sys.stdlib_module_names or top == "qwenlib" or top in optional:
                    continue
                names = {canonicalize_name(owner) for owner in owners.get(top, [top])}
                if not names & (declared - test_only):
                    faults.append(f"{path.relative_to(ROOT)}: {top}")
    assert faults == []


def test_console_script_and_all_files_are_packaged():
    """A file that is no module is in the wheel only if a pattern names it: C sources, profiles."""
    assert PROJECT["scripts"] == {"qwenlib": "qwenlib.cli:main"}
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    package = ROOT / "qwenlib"
    (patterns,) = tool["setuptools"]["package-data"].values()
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    assert {"native.c", "06_pretraining.toml"} <= {path.name for path in packaged}
    data = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert sorted(data - packaged) == []
