"""Suites: rows of runs that differ in one thing, on the same data in the same order, and one report of them."""
