"One of several processes that train toy heads together; torchrun starts them, tests/hass/test_train.py reads what they found"

import json, os, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from npu_lora_decoding.hass import train as th
from npu_lora_decoding.hass.train import train
from helpers.heads import CASES, CONFIG, TEXTS, begin, noting


def note(folder, name, run, norms=()):
    "Write what this process found"
    batches = (
        [run.batch(i).numbers for i in range(run.config.steps)] if name != 'lonely' else [run.accelerator.process_index]
    )
    found = dict(
        losses=run.losses,
        norms=[n.item() for n in norms],
        history=run.history,
        batches=batches,
        weights=[p.double().sum().item() for p in run.head.parameters()],
    )
    (folder / f'{name}-{run.accelerator.process_index}.json').write_text(json.dumps(found))


def main(folder):
    torch.set_num_threads(1)
    acc = Accelerator(mixed_precision='no', cpu=True)
    for name, config in CASES.items():
        run = begin(folder / f'{name}-{acc.process_index}', config, accelerator=acc)
        norms = noting(run)
        note(folder, name, train(run, TEXTS), norms)
    step_of = th.train_step

    def interrupted(run, step):
        if step == 4 and acc.process_index == 1:
            signal.raise_signal(signal.SIGINT)  # the other one is not asked, and stops as well
        return step_of(run, step)

    th.train_step = interrupted
    run = train(begin(folder / 'shared', CONFIG, accelerator=acc), TEXTS)
    th.train_step = step_of
    assert run.done == 5, run.done
    acc.wait_for_everyone()
    note(folder, 'stopped', train(begin(folder / 'shared', CONFIG, accelerator=acc), TEXTS))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
