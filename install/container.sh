#!/bin/sh
# The steps of both images, to be run without Docker as well (tests/install does):
#
#     install/container.sh cpu|cuda ENVIRONMENT [EXTRA ...]
#
# makes the virtual environment with these extras (default: llm), compiles the CPU kernels for this machine's processor
# and checks both. $TORCH_INDEX: one more index, which has PyTorch; $PYTHON: the interpreter, python3 by default.
set -eu

kind=$1 environment=$2
shift 2
root=$(dirname "$0")/..
case $kind in
    cpu) torch=cpu ;;
    cuda) torch=index ;; # what is on PyPI for Linux
    *) echo "container.sh: the first argument must be cpu or cuda, got $kind" >&2; exit 2 ;;
esac

"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/python" "$root/install/environment.py" --copy --torch "$torch" --torch-index "${TORCH_INDEX:-}" \
    --pip-flags="--quiet --no-cache-dir" "${@:-llm}"

"$environment/bin/python" - <<'EOF'
import torch
from moh.attention import cpu

if reason := cpu.unavailable():  # compiles them, unless they are in the cache
    raise SystemExit(f"the CPU kernels can't be used: {reason}")
import moh

layer = moh.MoHAttention(64, num_heads=8, shared_heads=2, active_heads=2)
assert layer(torch.randn(1, 16, 64)).shape == (1, 16, 64)
EOF
"$environment/bin/moh" info
