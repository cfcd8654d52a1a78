"""examples/minimal.py as it is, with what a CPU and a toy model need; run by test_trl_trainer.py.

python minimal_on_cpu.py MODEL BUCKET ENGINE STEPS
"""

import sys
from functools import partial

from examples.trl import on_cpu

on_cpu.prepare()  # in TRL's child process, too, which imports this file
SMALL = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4, "max_inflight_tasks": 8}

QUIET = {"save_strategy": "no", "disable_tqdm": True}


def main(model, bucket, engine, steps):
    from immediate_eos import tokenizer_of

    from examples import minimal

    made = minimal.AsyncGRPOTrainer
    ends = []

    def small_trainer(**options):
        trainer = made(processing_class=tokenizer_of(model), **options)
        ends.append(on_cpu.quick_end(trainer))
        ends[-1].__enter__()
        return trainer

    minimal.AsyncGRPOTrainer = small_trainer
    minimal.AsyncGRPOConfig = partial(
        minimal.AsyncGRPOConfig, save_strategy="no", disable_tqdm=True, **SMALL, **on_cpu.OPTIONS
    )
    minimal.main(model, bucket, engine, int(steps))
    ends[-1].__exit__(None, None, None)


if __name__ == "__main__":
    main(*sys.argv[1:])
