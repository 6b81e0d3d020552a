"""Where the modules of 0.1 are now: importing an old name says so. For version 0.2 only"""
import sys
from importlib.abc import MetaPathFinder

MOVED = {  # Module of 0.1 -> its place in 0.2
    'acceptance': 'hass.acceptance',
    'adapters': 'foundations.adapters',
    'advise': 'cold.tune and evaluation.recommend',
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
    'core': 'foundations.devices, foundations.errors, foundations.files and foundations.timing',
    'custom_generate': 'serving.hf_generate',
    'decode': 'decoding.loop',
    'distill': 'hass.losses',
    'doctor': 'evaluation.kernel_check',
    'document': 'temp_lora.checkpoint',
    'draft_head': 'hass.head and hass.checkpoint',
    'draft_tree': 'hass.drafting',
    'export_head': 'serving.head_export',
    'fast_draft': 'speculation.compiled_draft',
    'features': 'hass.features',
    'finetune': 'cold.expert',
    'handed_over': 'decoding.hf_bridge',
    'harness': 'evaluation.lm_eval',
    'lookup': 'speculation.prompt_lookup and speculation.joint',
    'lora': 'foundations.lora',
    'make_head': 'hass.pipeline',
    'measure': 'evaluation.benchmark',
    'models': 'foundations.models',
    'ops': 'foundations.ops',
    'page': 'serving.web_demo',
    'pareto': 'evaluation.pareto',
    'plan': 'temp_lora.budget and foundations.model_shape',
    'quality': 'evaluation.judging and foundations.statistics',
    'reading': 'temp_lora.perplexity',
    'recipe': 'hass.config',
    'report': 'evaluation.html_report',
    'ring': 'hass.ring_cache and hass.continuous_batching',
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

NAMES = {  # Chapter that has the name of a module of 0.1 -> what that module held, and where it is now
    'cold': {
        'CoLD': 'cold.rule', 'cold_two_pass': 'cold.rule', 'Plain': 'decoding.sampling', 'split_processors': 'decoding.sampling'},
    'temp_lora': {
        'TempLoRA': 'temp_lora.generation', 'TemporaryAdapter': 'temp_lora.adapter', 'temporary': 'temp_lora.adapter',
        'learn': 'temp_lora.adapter', 'token_losses': 'temp_lora.adapter', 'target_layers': 'foundations.model_shape',
        'linear_layers': 'foundations.model_shape'},
}

def getattr_of(
    chapter:str,  # One of `NAMES`
):  # A module's `__getattr__`
    "Return a function that raises an ImportError naming the new place of what a module of 0.1 held"
    def __getattr__(name):
        if name not in NAMES[chapter]: raise AttributeError(f'module {__package__}.{chapter} has no attribute {name!r}')
        raise ImportError(f'{name} was moved in version 0.2: import it from {__package__}.{NAMES[chapter][name]}')
    return __getattr__

class _Moved(MetaPathFinder):
    "Raises an ImportError that names the new place of a module; finds nothing itself"
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.rpartition('.')
        if package == __package__ and name in MOVED:
            raise ImportError(f'{fullname} was moved in version 0.2: import from {package}.{MOVED[name]}', name=fullname)

sys.meta_path.insert(0, _Moved())
