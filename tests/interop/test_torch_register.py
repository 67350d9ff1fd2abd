"""When the PyTorch models become known to the Auto classes, and what importing ``ssm_jax.interop`` costs others."""

import subprocess
import sys

import pytest

from ssm_jax.interop.torch import register
from tests.test_architecture import ROOT

KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM
import ssm_jax.interop.torch as modules
for name in ("RetNet", "DenseGauRetNet", "DenseMamba", "Baka", "GatedStateSpaces"):
    config = getattr(modules, name + "Config")
    assert type(AutoConfig.for_model(config.model_type)) is config
    assert AutoModelForCausalLM._model_mapping[config] is getattr(modules, name + "ForCausalLM")
"""
LIGHT = "import sys, ssm_jax.interop; assert not {'torch', 'transformers'} & set(sys.modules)\n"


def python(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


@pytest.mark.torch
@pytest.mark.parametrize(
    "first",
    [
        LIGHT,
        LIGHT + "from transformers import MambaForCausalLM",  # imports the Auto classes while its own file is half read
        LIGHT + "from transformers import GenerationMixin, PreTrainedModel",
        "from transformers import AutoModelForCausalLM; import ssm_jax.interop",
    ],
    ids=["before", "before_a_model", "before_the_bases", "after"],
)
def test_known_whichever_is_imported_first(first: str) -> None:
    python(f"{first}\n{KNOWN}")


def test_without_pytorch_nothing_happens() -> None:
    python(
        "import sys; sys.modules['torch'] = None\nimport ssm_jax.interop.torch\nassert 'transformers' not in sys.modules"
    )


@pytest.mark.torch
def test_a_model_type_of_another_package_stays_its_own() -> None:
    python(
        """
import pytest
from transformers import AutoConfig, PreTrainedConfig
class Theirs(PreTrainedConfig):
    model_type = "retnet"
AutoConfig.register("retnet", Theirs)
with pytest.warns(UserWarning, match="already has a model type 'retnet', by __main__, and keeps it; load"):
    import ssm_jax.interop
assert type(AutoConfig.for_model("retnet")) is Theirs
assert AutoConfig.for_model("gated_state_spaces").depth == 8
"""
    )


def test_a_transformers_that_does_not_fit_is_still_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("cannot import name 'PreTrainedConfig'")

    monkeypatch.setitem(register._ACTIONS, "transformers.models.auto.configuration_auto", fail)
    with pytest.warns(UserWarning, match="are not known to transformers: cannot import name 'PreTrainedConfig'"):
        register._act("transformers.models.auto.configuration_auto")
