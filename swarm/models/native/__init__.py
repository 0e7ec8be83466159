"""What is computed by C that is compiled on the machine that runs it: linear layers, and whole decode steps.

A decode step of a small model is hundreds of short operations; between them torch and Python take longer than the
operations themselves, all the more on a server whose caches others have used since the last step.
"""
