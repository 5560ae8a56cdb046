"""The parts of ``benchmarks/peers.py``: what is compared, how it is started, asked, loaded and judged.

The command and this package share their name; ``import peers`` finds the package, as Python looks for
packages before modules. The modules here run in the project's environment. Those in `servers` run in the
peers' own, and import nothing of ours but each other.
"""
