"""When transformers' Auto classes know the variants, and what importing the package costs; each in a new process."""

import subprocess
import sys

import pytest
from conftest import GOLDEN, ROOT

PARALLEL = str(GOLDEN / "parallel_mean")
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "huggingface_hub", "numpy")


def python(code: str) -> str:
    """What `code` prints in a new process, which imports the package of this checkout."""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout.strip()


def test_importing_the_package_imports_nothing():
    said = f"print([name for name in {HEAVY} if name in sys.modules])"
    assert python(f"import sys, gpt2_variants; gpt2_variants.VARIANTS['drift'].summary; {said}") == "[]"
    # a module that somebody has forbidden to be imported is not there
    assert python("import sys; sys.modules['transformers'] = None; import gpt2_variants; print('fine')") == "fine"


KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(sorted(name for name in CONFIG_MAPPING if name.endswith("gpt2") and name != "gpt2"))
"""
ALL = "['dd-gpt2', 'duo-predict-gpt2', 'parallel-gpt2', 'rotating-head-gpt2']"


@pytest.mark.parametrize(
    "way",
    [
        "import transformers; import gpt2_variants",
        *(
            pytest.param(way, marks=pytest.mark.slow)
            for way in (
                "import gpt2_variants; gpt2_variants.register()",
                "from transformers import AutoModelForCausalLM; from gpt2_variants.models import modeling_parallel",
                "from gpt2_variants import VARIANTS; [v.config_class for v in VARIANTS.values()]",
            )
        ),
        f"from gpt2_variants import VARIANTS, warm_start as w; w.config_fields({PARALLEL!r}, VARIANTS['parallel'])",
    ],
)
def test_what_registers_the_variants(way):
    assert python(way + KNOWN) == ALL


@pytest.mark.slow
def test_asking_for_one_variant_registers_that_one():
    assert python("import gpt2_variants; gpt2_variants.VARIANTS['parallel'].model_class" + KNOWN) == "['parallel-gpt2']"
    assert python("import gpt2_variants" + KNOWN) == "[]"


def test_registering_again_does_nothing(monkeypatch):
    import transformers

    import gpt2_variants

    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "register", None)
    gpt2_variants.register()
