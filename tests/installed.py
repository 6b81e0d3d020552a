"Check an installed wheel from inside its own environment, given the checkout it was built from"

import importlib, importlib.metadata, pkgutil, sys
from pathlib import Path
import npu_lora_decoding, npu_lora_kernels

root = Path(sys.argv[1])
sources = {'npu_lora_decoding': root / 'npu_lora_decoding', 'npu_lora_kernels': root / 'kernels' / 'npu_lora_kernels'}

for o in (npu_lora_decoding, npu_lora_kernels):
    assert Path(o.__file__).is_relative_to(
        sys.prefix
    ), f'{o.__name__} was imported from {o.__file__}, not from the wheel'

# Without the development tools here, an import of one of them by a module fails. `_modidx` is nbdev's and holds data only.
for o in pkgutil.walk_packages(npu_lora_decoding.__path__, 'npu_lora_decoding.'):
    importlib.import_module(o.name)
assert 'torch_npu' not in sys.modules, 'importing the package imported torch_npu, which only import_npu may do'

files = [f for f in importlib.metadata.files('npu_lora_decoding') if f.suffix != '.pyc']
strays = [
    str(f) for f in files if f.parts[0] not in sources and not f.parts[0].endswith('.dist-info') and f.name != 'nld'
]
assert not strays, f'the wheel installs files outside its two packages: {strays}'

# The demo's adapter and heads, and of results nothing else
from npu_lora_decoding.foundations.models import shipped_adapter, shipped_head

for shipped in (shipped_adapter(), shipped_head(), shipped_head('king_james')):
    assert shipped.is_relative_to(sys.prefix), f'{shipped} lies outside the wheel'
    here, there = (
        {f.name: f.read_bytes() for f in o.iterdir()}
        for o in (root / 'results' / shipped.parent.name / shipped.name, shipped)
    )
    assert here == there, f'the wheel holds {sorted(there)} of {shipped.name}, and the checkout {sorted(here)}'
extra = {f.parts[2:4] for f in files if f.parts[:2] == ('npu_lora_decoding', 'shipped')} - {
    ('adapters', 'king_james'),
    ('heads', 'smollm2-135m'),
    ('heads', 'king_james'),
}
assert not extra, f'the wheel holds more of results than it should: {sorted(extra)}'

for name in sources:
    assert (
        Path(name) / 'py.typed' in files
    ), f'{name} has no py.typed in the wheel, so type checkers would pass over its hints'

for name, folder in sources.items():
    wanted = {
        str(Path(name) / f.relative_to(folder))
        for f in folder.rglob('*')
        if f.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & {*f.parts}
    }
    missing = wanted - {str(f) for f in files}
    assert not missing, f'the wheel lacks {sorted(missing)}'
print(f'the wheel holds {" and ".join(sources)}, in {len(files)} files, and every module of the first imports')
