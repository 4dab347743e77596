"""Speed and memory of routed attention against dense attention; `python -m benchmarks --help`.

One module per subject (`core`, `decode`, `layer`, `model`, `vision`, `memory`). Not part of the installed package.
"""
