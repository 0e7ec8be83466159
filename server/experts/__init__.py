"""Experts as network objects: a server that hosts some of them, and a server of blocks that has them computed there."""
