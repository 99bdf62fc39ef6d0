"""Tests; a package so that tests/sep_attention and tests/data_prep do not hide the packages of those names."""
