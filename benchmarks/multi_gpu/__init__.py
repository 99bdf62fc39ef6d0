"""The check of several GPUs on one machine: correctness, faults and speed of the layouts in one command.

cases     what is run for a number of GPUs
plan      which cases fit the time budget, and which share a launch
kit       runs the plan and keeps results.json
worker    the ranks of a launch: one case after another
kill      a run that is killed and stopped by signals, and resumed
verdicts  compares records with their baseline
results   the results file and what a finished case depends on
report    the tables at the end
"""
