"""From the name of a model that a person types to verified files on this machine.

Imports nothing of qwenkit outside this folder.
"""
