"Every test starts from the same state: no network, no progress bars, one thread, the same seeds"

import os
from collections import Counter

# Read once, at import, by the libraries below: hence before them.
os.environ.update(HF_HUB_OFFLINE='1', HF_HUB_DISABLE_PROGRESS_BARS='1', TOKENIZERS_PARALLELISM='false')
os.environ.update(NLD_PROGRESS='none')

import random
import hypothesis, numpy as np, pytest, torch

pytest.register_assert_rewrite('helpers')

torch.set_num_threads(1)  # fp32 on several threads stalls at random

# A first call that loads a model is slow and no fault; and a failure must come back on the next run.
hypothesis.settings.register_profile('repeatable', deadline=None, derandomize=True)
hypothesis.settings.load_profile('repeatable')


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    "Put files of many tests first, and before them the one that forks: where autograd has run, no child can train"
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name != 'test_faults.py', -tests[item.path]))


@pytest.fixture(autouse=True)
def same_seeds():
    "Seed every global generator"
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
