"""Mutated inputs for the readers of files that others may have written.

  python -m tests.fuzz --inputs 100000
  python -m tests.fuzz --targets index header --inputs 1000 --seed 7
  python -m tests.fuzz --targets header --again 812        one input, with its traceback

Each input ends with success or UserError; everything else is a finding: another exception, a crash, more than 30
seconds of the processor, more than 1 GiB. Exits with 1 when there are findings.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.runner import all_targets, fuzz, run_one


def main() -> int:
    """Run what the command line asks for and print the findings."""
    targets = all_targets()
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000, metavar="N", help="inputs of each target (default: 1000)")
    parser.add_argument("--targets", nargs="+", choices=sorted(targets), default=sorted(targets), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the inputs (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input (default: 0)")
    parser.add_argument("--again", type=int, metavar="N", help="run input N of the target alone")
    arguments = parser.parse_args()
    if arguments.again is not None:
        for target in arguments.targets:
            run_one(target, arguments.again, arguments.seed)
        return 0
    count = 0
    for target in arguments.targets:
        start = time.perf_counter()
        numbers = range(arguments.first, arguments.first + arguments.inputs)
        for finding in fuzz(target, numbers, arguments.seed):
            count += 1
            print(f"{finding.target} input {finding.number}: {finding.what}", flush=True)
        print(f"{target}: {arguments.inputs:,} inputs in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{count} findings")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
