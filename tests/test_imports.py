"""Who may import whom, that jax's public API is all the library uses, and that a bare import is light."""

import ast
import pathlib
import subprocess
import sys

import lora_jax

ROOT = pathlib.Path(lora_jax.__file__).parent
ALLOWED = {
    "tree": set(),
    "nnx": {"tree"},
    "weight": set(),
    "layouts": {"tree", "weight"},
    "targets": {"tree", "weight", "layouts"},
    "sharding": {"tree", "weight", "nnx"},
    "initializers": {"weight", "targets", "sharding"},
    "params": {"tree", "weight", "layouts", "targets", "initializers", "nnx"},
    "report": {"tree", "weight", "layouts", "params", "nnx"},
    "interpret": {"tree", "weight", "nnx"},
    "rules.linear": {"weight", "interpret", "rules.shape"},
    "rules.shape": {"weight", "interpret"},
    "rules.control": {"weight", "interpret"},
    "rules.algebra": {"weight", "interpret", "rules.linear", "rules.shape"},
    "rules.custom": {"weight", "interpret", "rules.control", "rules.linear"},
    "rules": {"rules.algebra", "rules.control", "rules.custom", "rules.linear", "rules.shape"},
    "axes": {"tree", "weight", "nnx", "interpret", "rules", "rules.control", "rules.shape"},
    "train": {"tree", "weight", "nnx", "params", "interpret", "sharding"},
    "check": {"tree", "weight", "nnx", "params", "interpret"},
    "files": {"tree", "weight", "nnx", "params", "tensors"},
    "saves": {"tree", "weight", "nnx", "params", "train"},
    "checkpoint": {"files", "saves", "train"},
    "tensors": set(),
    "names": {"tree", "weight"},
    "factors": {"names", "weight"},
    "peft_config": {"tensors"},
    "peft": {
        "tree",
        "weight",
        "nnx",
        "params",
        "layouts",
        "files",
        "names",
        "factors",
        "tensors",
        "peft_config",
    },
    "analysis": {"tree", "weight", "nnx", "params"},
    "hub": {"tree", "files", "tensors"},
    "stream": {"tree", "weight", "check", "files", "factors", "hub", "peft", "tensors"},
    "cli": {"weight", "params", "analysis", "files", "factors", "peft", "stream"},
    "hlo": set(),
    "operations": {"tree", "weight", "nnx", "train", "rules.control"},
    "planning": {"tree", "weight", "nnx", "params", "interpret", "sharding", "train", "hlo", "operations"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield name, path


def test_the_table_of_imports_holds():
    known = {name for name, _ in modules()}
    for name, path in modules():
        if not name:
            continue
        ours = {i.removeprefix("lora_jax.") for i in imports(path) if i.startswith("lora_jax.")} & known
        ours |= {i for i in ours if i in known}
        assert name in ALLOWED, f"{name} is not in the table"
        extra = ours - ALLOWED[name] - {"rules"} - {name}
        assert not extra, f"{name} imports {extra}"
    assert set(ALLOWED) <= known, "the table names a file that is not there"


def test_nothing_private_is_used():
    for name, path in modules():
        for imported in imports(path):
            assert not any(part.startswith("_") and part != "__future__" for part in imported.split(".")), (
                f"{name} imports {imported}"
            )
        assert "._src" not in path.read_text(), name


def test_the_package_exports_names_only():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)) for node in tree.body)
    public = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(public) <= 36
    for name in public:
        assert getattr(lora_jax, name).__doc__, name


def test_optional_packages_are_not_imported():
    code = (
        "import sys, lora_jax;"
        "extra = {'safetensors', 'equinox', 'sklearn', 'matplotlib', 'tqdm', 'grain', 'tokenizers', 'torch'};"
        "sys.exit(str(extra & set(sys.modules)) if extra & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
