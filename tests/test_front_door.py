"The front door: what `import npu_lora_decoding` offers, what it costs, and where the modules of 0.1 are now"

import configparser
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
import pytest
import npu_lora_decoding

ROOT = Path(__file__).resolve().parent.parent
NAMES = '''load Plain CoLD HASS PromptLookup JointDrafter TempLoRA Decoder DecodingError shipped_adapter shipped_head'''.split()

# Imports the package and prints whether torch came along, and the seconds that the processor worked for it
IMPORT = '''
import os, sys
before = os.times()
import npu_lora_decoding
after = os.times()
print("torch" in sys.modules, after.user + after.system - before.user - before.system)
'''

# Runs `nld` and says so where torch was imported for it
NLD = '''
import sys
from {module} import {function}
sys.argv = ["nld", *{arguments}]
try:
    {function}()
finally:
    if "torch" in sys.modules: print("imported torch")
'''

# Where the flat modules of 0.1 went; `cold`, `temp_lora` and `cli` are packages now
MOVED = {
    'acceptance': 'hass.acceptance',
    'adapters': 'foundations.adapters',
    'advise': 'evaluation.recommend',
    'align': 'hass.alignment',
    'baseline': 'decoding.baseline',
    'cache_reuse': 'temp_lora.cache_reuse',
    'choose': 'decoding.sampling',
    'cli_compare': 'cli.compare',
    'cli_head': 'cli.head',
    'cli_memory': 'cli.memory',
    'commands': 'cli.registry',
    'contestants': 'evaluation.methods',
    'conversations': 'hass.chat_data',
    'core': 'foundations.errors',
    'custom_generate': 'serving.hf_generate',
    'decode': 'decoding.loop',
    'distill': 'hass.losses',
    'doctor': 'evaluation.kernel_check',
    'document': 'temp_lora.checkpoint',
    'draft_head': 'hass.head',
    'draft_tree': 'hass.drafting',
    'export_head': 'serving.head_export',
    'fast_draft': 'speculation.compiled_draft',
    'features': 'hass.features',
    'finetune': 'cold.expert',
    'handed_over': 'decoding.hf_bridge',
    'harness': 'evaluation.lm_eval',
    'lookup': 'speculation.prompt_lookup',
    'lora': 'foundations.lora',
    'make_head': 'hass.pipeline',
    'measure': 'evaluation.benchmark',
    'models': 'foundations.models',
    'ops': 'foundations.ops',
    'page': 'serving.web_demo',
    'pareto': 'evaluation.pareto',
    'plan': 'temp_lora.budget',
    'quality': 'evaluation.judging',
    'reading': 'temp_lora.perplexity',
    'recipe': 'hass.config',
    'report': 'evaluation.html_report',
    'ring': 'hass.continuous_batching',
    'rows': 'decoding.runner',
    'show': 'evaluation.plots',
    'show_draft': 'evaluation.draft_plots',
    'sizing': 'speculation.adaptive',
    'speculate': 'speculation.head_drafter',
    'start': 'hass.initialization',
    'tasks': 'foundations.tasks',
    'train_head': 'hass.train',
    'translating': 'temp_lora.translation',
    'tree': 'decoding.tree',
    'verify': 'evaluation.equivalence',
    'vllm_ask': 'serving.vllm_client',
    'vllm_cold': 'serving.vllm_plugin',
    'vllm_pairs': 'serving.vllm_pairing',
    'vllm_peer': 'serving.vllm_process',
    'vllm_worker': 'serving.vllm_worker',
    'work': 'evaluation.flops',
    'write': 'hass.self_chat',
    'writing': 'temp_lora.generation',
}


def python(code, *options):
    "Run code in a fresh process and return what it printed"
    done = subprocess.run([sys.executable, *options, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def child_seconds(*command):
    "Run a command; return its exit status, its output and the seconds that the processor worked for it, a busy machine's waits not counted"
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    after = os.times()
    return done.returncode, done.stdout + done.stderr, sum(after[2:4]) - sum(before[2:4])


def test_names_are_offered_before_they_are_loaded():
    assert set(NAMES) <= set(npu_lora_decoding.__all__)
    assert set(NAMES) <= set(dir(npu_lora_decoding))
    assert '__version__' in dir(npu_lora_decoding)


@pytest.mark.parametrize('name', NAMES)
def test_every_name_is_that_of_its_module(name):
    value = getattr(npu_lora_decoding, name)
    assert value.__name__ == name
    assert value is getattr(importlib.import_module(value.__module__), name)


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='Hass'):
        npu_lora_decoding.Hass


def test_importing_the_package_is_cheap():
    has_torch, seconds = python(IMPORT).split()
    assert has_torch == 'False'
    assert float(seconds) < 0.3


def test_the_first_example_is_one_import():
    assert python('from npu_lora_decoding import load, CoLD, HASS, TempLoRA; print(CoLD.__name__)') == 'CoLD\n'


def test_help_shows_the_parameters_of_generate():
    shown = python('from npu_lora_decoding import LM; help(LM.generate)')
    assert 'max_new_tokens' in shown and 'drafter' in shown
    assert '*args' not in shown


@pytest.mark.parametrize('old', MOVED)
def test_an_old_module_names_the_new_one(old):
    with pytest.raises(ImportError, match=rf'npu_lora_decoding\..*\b{re.escape(MOVED[old])}\b'):
        importlib.import_module(f'npu_lora_decoding.{old}')


def test_a_module_that_never_was_has_no_hint():
    with pytest.raises(ModuleNotFoundError, match="No module named 'npu_lora_decoding.spekulate'"):
        importlib.import_module('npu_lora_decoding.spekulate')


def nld(*arguments):
    "Run the program that settings.ini calls `nld`; return its exit status, its output and the seconds of processor time"
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini')
    module, function = settings['DEFAULT']['console_scripts'].removeprefix('nld=').split(':')
    return child_seconds(sys.executable, '-c', NLD.format(module=module, function=function, arguments=arguments))


@pytest.mark.parametrize(
    'arguments, status, shown',
    [
        (['--help'], 0, 'generate'),
        ([], 0, 'generate'),
        (['--version'], 0, npu_lora_decoding.__version__),
        (['generat'], 2, 'generate'),
    ],
)
def test_the_command_line_answers_at_once(arguments, status, shown):
    returned, output, seconds = nld(*arguments)
    assert returned == status, output
    assert shown in output
    assert 'imported torch' not in output
    assert seconds < 1
