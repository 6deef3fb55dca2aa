"""Who may import whom, what importing costs, and which packages it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sambay
from sambay.cli.main import COMMANDS
from sambay.cli.scaling import SUBCOMMANDS

ROOT = Path(sambay.__file__).parent
# A room may import rooms of earlier rows only. `data` reads and writes files and knows no model.
ROWS = (
    ("errors",),
    ("files",),
    ("spec", "data"),
    ("ops", "plots"),
    ("layers",),
    ("model",),
    ("generate", "scaling", "speed"),
    ("hf",),
    ("train", "serve"),
    ("recipes",),
    ("evals",),
    ("studies",),
    ("cli",),
    ("demo",),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
OPTIONAL = {
    "tokenizers", "pyarrow", "zstandard", "tqdm", "tensorboard", "matplotlib", "transformers",
    "jinja2", "accelerate", "peft", "trl", "datasets", "torchao", "trackio", "wandb", "scipy",
    "lm_eval", "math_verify", "names", "nltk", "wonderwords", "triton",
}  # fmt: skip
# The classes of transformers derive from its own, so these import it at their top.
TRANSFORMERS_CLASSES = {
    f"hf/{name}.py" for name in ("cache", "configuration", "conversion", "modeling", "pretrained")
}
# The classes of vLLM likewise; they import transformers as well, which comes with it.
VLLM_CLASSES = {
    f"serve/{name}.py"
    for name in (
        "attention", "configuration", "decoder", "layers", "mamba", "model", "platform",
        "recurrence", "registration", "sharding", "verification",
    )
}  # fmt: skip
# A Triton kernel is compiled in the names of its module, so these import it at their top. Nothing
# imports them but `ops/triton/launch.py`, when one is launched.
TRITON_KERNELS = {
    path.relative_to(ROOT).as_posix() for path in (ROOT / "ops/triton/kernels").glob("*.py")
}
WITH_CLASSES = TRANSFORMERS_CLASSES | VLLM_CLASSES | TRITON_KERNELS
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The module without what only type checkers import."""

    def is_for_types(node: ast.stmt) -> bool:
        return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"

    body = [node for node in tree.body if not is_for_types(node)]
    return ast.Module(body=body, type_ignores=[])


def imported_names(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module == "sambay":
            names += [f"sambay.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this project"
            names.append(node.module or "")
    return names


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_earlier_rooms(path: Path) -> None:
    room = room_of(path)
    if room == "__init__" or path.name == "__main__.py":
        return  # the public names, of which a lazy one may live anywhere; ways to start a command
    assert room in RANK, f"{room} is a new room: give it a row in {Path(__file__).name}"
    for name in imported_names(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "sambay" and len(parts) > 1 and parts[1] != room and parts[1] in RANK:
            assert RANK[parts[1]] < RANK[room], f"{room} may not import {name}: see ROWS"


def test_each_optional_package_is_imported_in_one_file_and_lazily() -> None:
    homes: dict[str, set[str]] = {}
    for path in FILES:
        if path.relative_to(ROOT).as_posix() in WITH_CLASSES:
            continue
        tree = without_type_checking(ast.parse(path.read_text()))
        at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for name in imported_names(ast.Module(body=list(at_top), type_ignores=[])):
            assert name.split(".")[0] not in OPTIONAL, f"{path} imports {name} at its top"
        for name in imported_names(tree):
            package = name.split(".")[0]
            if package in OPTIONAL:
                homes.setdefault(package, set()).add(str(path.relative_to(ROOT)))
    assert "matplotlib" in homes
    for package, files in homes.items():
        assert len(files) == 1, f"{package} is imported in {sorted(files)}; keep it in one file"


# The public names that transformers' classes are behind, where it is missing.
CLASSES_ARE_EXPLAINED = """
import sambay
from sambay.errors import MissingPackage
assert sambay.LanguageModel and sambay.load_model
for name in ("SambaYForCausalLM", "Phi4FlashForCausalLM", "SambaYConfig"):
    try:
        getattr(sambay, name)
    except MissingPackage as error:
        assert "transformers" in str(error) and "sambay[hf]" in str(error), error
    else:
        raise AssertionError(name)
"""


def test_vllm_is_imported_in_its_room_only() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(name.split(".")[0] == "vllm" for name in imported_names(ast.parse(path.read_text())))
    }
    assert importers
    assert importers <= VLLM_CLASSES


def test_triton_kernels_are_reached_by_their_launcher_only() -> None:
    assert len(TRITON_KERNELS) > 5
    for path in FILES:
        if path.relative_to(ROOT).as_posix() not in TRITON_KERNELS:
            names = imported_names(ast.parse(path.read_text()))
            assert not any(name.startswith("sambay.ops.triton.kernels") for name in names), path


def test_importing_everything_needs_only_the_required_packages() -> None:
    """All modules but entry points, with every optional package hidden."""
    paths = [
        path.relative_to(ROOT.parent)
        for path in FILES
        if path.name != "__main__.py" and path.relative_to(ROOT).as_posix() not in WITH_CLASSES
    ]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    code = f"import sys\nfor name in {sorted(OPTIONAL)}: sys.modules[name] = None\n"
    code += "".join(f"import {module}\n" for module in modules)
    result = run_python(code + CLASSES_ARE_EXPLAINED)
    assert result.returncode == 0, result.stderr.splitlines()[-3:]


@pytest.mark.parametrize(
    "code",
    [
        "import sambay",
        "import sambay.spec, sambay.spec.presets, sambay.spec.footprint",
        "import sambay.plots.architecture",
        "import sambay.data.manifest",
        "from sambay.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        *(
            f"from sambay.cli.main import main\ntry: main(['{command}', '--help'])\n"
            "except SystemExit: pass"
            for command in COMMANDS
        ),
        *(
            f"from sambay.cli.main import main\ntry: main(['scaling', '{command}', '--help'])\n"
            "except SystemExit: pass"
            for command in SUBCOMMANDS
        ),
    ],
)
def test_no_torch_where_it_is_not_needed(code: str) -> None:
    result = run_python(
        f"{code}\nimport sys; assert 'torch' not in sys.modules, 'torch came along'"
    )
    assert result.returncode == 0, result.stderr.splitlines()[-1:]


# What `sambay generate` does with a folder, and a forward pass with gradients.
GENERATES = """
import sys
from pathlib import Path
from sambay import LanguageModel, load_model, presets
from sambay.generate import Engine, Request, Session
from sambay.model.folder import save_model_folder
sizes = dict(vocab_size=61, hidden_size=36, num_heads=4, num_kv_heads=2, head_dim=8)
model = LanguageModel(presets.build("sambay", 8, **sizes))
save_model_folder(Path(sys.argv[1]), model)
model(torch.tensor([[1, 2, 3]])).sum().backward()
engine = Engine(load_model(sys.argv[1]))
request = Request([1, 2, 3], max_new_tokens=4)
assert len(list(Session(engine).stream(request))) >= 4
assert len(engine.generate_many([request, request], max_batch_size=2)) == 2
"""


def test_the_compiler_of_torch_does_not_come_along(tmp_path: Path) -> None:
    """It takes as long to import as torch itself."""
    code = f"import torch\n{GENERATES}\nassert 'torch._dynamo' not in sys.modules, 'it came along'"
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_public_names_exist() -> None:
    for name in sambay.__all__:
        assert getattr(sambay, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sambay.nonsense
