"""Errors, files, console output and statistics. Imports nothing else of this project."""
