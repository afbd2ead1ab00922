"""People <-> token ids: tokenizers, chat rendering, incremental text.

Knows no torch; imports nothing of qwenkit outside this folder.
"""
