"""Check several GPUs of one machine: layouts, resume, kill, overlap, scaling, throughput; one file of results.

    make multi-gpu-check
    python -m benchmarks.multi_gpu --output multi_gpu_check
    python -m benchmarks.multi_gpu --stages layouts kill --gpus 4 --budget-minutes 8
    python -m benchmarks.multi_gpu --cpu --output runs/rehearsal

Needs no network: all runs train on the sample corpus. Within 20 minutes on 8 GPUs; --budget-minutes leaves the least
important cases out where that is less. Every case is written to DIR/results.json when it ends, and the same command
continues: it keeps cases that passed with the same code, configuration and machine. DIR/report.md has the tables.
Exit code 0: no case failed; 1: one did; 2: a mistake, or fewer than two GPUs.
"""

from benchmarks.multi_gpu.cli import main

if __name__ == "__main__":
    raise SystemExit(main(__doc__ or ""))
