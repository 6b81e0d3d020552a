"Build from settings.ini: edit that file, not this one"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).resolve().parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
lib, kernels = cfg['lib_path'], 'npu_lora_kernels'
# What `shipped_adapter` and `shipped_head` return: in a clone under results, in a wheel inside the package, as data
shipped = dict(adapters=['king_james'], heads=['smollm2-135m', 'king_james'])

ours = find_packages(include=[lib, f'{lib}.*'])
places = {f'{lib}.shipped.{kind}': f'results/{kind}' for kind in shipped}
data = {f'{lib}.shipped.{kind}': [f'{name}/*' for name in names] for kind, names in shipped.items()}

def reqs(key): return cfg.get(key, '').split()

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license='Apache-2.0', keywords=cfg['keywords'],
    classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Developers'],
    # Named one by one, so that no folder beside them (nbs, tests, results) can slip into the wheel
    packages=[*ours, *find_packages('kernels', include=[kernels, f'{kernels}.*']), *places],
    package_dir={kernels: f'kernels/{kernels}'} | places, include_package_data=True,
    package_data=data | {lib: ['py.typed', '*.mplstyle', '*/*.css', '*/*.html'], kernels: ['py.typed']},
    python_requires=f">={cfg['min_python']}",
    install_requires=reqs('requirements'),
    extras_require={name: reqs(f'{name}_requirements') for name in ('dev', 'eval', 'npu', 'page')},
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    entry_points={'console_scripts': reqs('console_scripts'), 'nbdev': [f'{lib}={lib}._modidx:d']},
    zip_safe=False,
)
