"""Contrastive (CoLD), speculative (HASS) and long-text (Temp-LoRA) decoding for LoRA-adapted language models

The names below are all that a first script needs. They are imported when they are first used, so that importing the
package loads no torch: vLLM's worker imports it inside another environment, and `nld --help` has to answer at once.
"""
import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:  # what editors and type checkers see
    from .cold.rule import CoLD as CoLD
    from .decoding.loop import LM as LM, Decoder as Decoder, Result as Result, load as load
    from .decoding.sampling import Plain as Plain
    from .foundations.errors import DecodingError as DecodingError
    from .foundations.models import shipped_adapter as shipped_adapter, shipped_head as shipped_head
    from .speculation.head_drafter import HASS as HASS
    from .speculation.joint import JointDrafter as JointDrafter
    from .speculation.prompt_lookup import PromptLookup as PromptLookup
    from .temp_lora.generation import TempLoRA as TempLoRA

_HOMES = {  # Name -> module that defines it
    'load': 'decoding.loop',
    'LM': 'decoding.loop',
    'Decoder': 'decoding.loop',
    'Result': 'decoding.loop',
    'Plain': 'decoding.sampling',
    'CoLD': 'cold.rule',
    'HASS': 'speculation.head_drafter',
    'PromptLookup': 'speculation.prompt_lookup',
    'JointDrafter': 'speculation.joint',
    'TempLoRA': 'temp_lora.generation',
    'DecodingError': 'foundations.errors',
    'shipped_adapter': 'foundations.models',
    'shipped_head': 'foundations.models',
}

__all__ = ['__version__', *_HOMES]

def __getattr__(name):
    "Import a public name from its module when it is first asked for (PEP 562)"
    if name not in _HOMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
    globals()[name] = value
    return value

def __dir__(): return sorted(__all__)

importlib.import_module(f'{__name__}.foundations.threads')  # how torch's threads wait is decided before torch is loaded
importlib.import_module(f'{__name__}._moved')  # names the new place of modules that were renamed in 0.2.0
