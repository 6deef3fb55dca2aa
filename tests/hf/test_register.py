"""`import sambay` beside transformers: in both orders, without it, and with one that is too old."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sambay
from sambay.hf.register import _AfterImport
from tests.train.processes import together

KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as models
for name, causal in (("sambay", "SambaYForCausalLM"), ("phi4flash", "Phi4FlashForCausalLM")):
    config = AutoConfig.for_model(name)
    assert config.model_type == name
    assert models[type(config)].__name__ == causal
"""
# Makes `import transformers` fail as if it were not installed, but only in that process.
HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Hide())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_later_import_of_sambay_registers_at_once(tmp_path: Path) -> None:
    """In a fork in which the Auto classes are imported, and know nothing of sambay."""

    def action() -> None:
        from transformers import AutoConfig
        from transformers.models.auto import configuration_auto, modeling_auto

        for mapping in (
            configuration_auto.CONFIG_MAPPING,
            modeling_auto.MODEL_MAPPING,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        ):
            mapping._extra_content.clear()
        sys.meta_path[:] = [one for one in sys.meta_path if not isinstance(one, _AfterImport)]
        with pytest.raises(ValueError, match="sambay"):
            AutoConfig.for_model("sambay")
        for _ in range(2):  # the second does no harm
            importlib.reload(sambay)
        exec(KNOWN, {})

    together(1, action, tmp_path)


@pytest.mark.slow
def test_auto_classes_know_both_types_when_they_were_imported_before_sambay() -> None:
    """The other order is that of every test here. A second import does no harm."""
    done = run(
        "from transformers import AutoModelForCausalLM\n"
        "import sambay\n"
        f"import importlib; importlib.reload(sambay)\n{KNOWN}"
    )
    assert done.returncode == 0, done.stderr


def test_importing_sambay_imports_neither_torch_nor_transformers() -> None:
    """Within the promised two seconds, of this process alone; it takes a twentieth of that."""
    done = run(
        "import sys, time, sambay\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 2"
    )
    assert done.returncode == 0, done.stderr


def test_transformers_alone_stays_as_lazy_as_it_is() -> None:
    done = run(
        "import sys, sambay, transformers\n"
        "assert 'sambay.hf.modeling' not in sys.modules\n"
        "assert 'transformers.models.auto.modeling_auto' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # among the imports of everything in tests/test_imports.py otherwise
def test_without_transformers_the_core_works_and_the_classes_say_what_is_missing() -> None:
    done = run(
        f"{HIDDEN}\n"
        "import sambay\n"
        "assert sambay.LanguageModel and sambay.load_model\n"
        "from sambay.errors import MissingPackage\n"
        "for name in ('SambaYForCausalLM', 'Phi4FlashForCausalLM', 'SambaYConfig'):\n"
        "    try:\n"
        "        getattr(sambay, name)\n"
        "    except MissingPackage as error:\n"
        "        assert 'transformers' in str(error) and 'sambay[hf]' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", ["5.16.9", "4.57.6.dev0"])
def test_older_transformers_is_named_once_and_left_alone(version: str, tmp_path: Path) -> None:
    """A stand-in with the modules of the Auto classes, in which nothing can be registered."""
    auto = tmp_path / "transformers" / "models" / "auto"
    auto.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").write_text(f"__version__ = '{version}'")
    for name in ("configuration_auto", "modeling_auto"):
        (auto / f"{name}.py").write_text("")
    done = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import sambay\n"
        "from transformers.models.auto import configuration_auto, modeling_auto\n"
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"transformers {version} is older than 5.17")
    assert line.endswith('pip install "transformers>=5.17"')
