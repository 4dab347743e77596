#!/bin/sh
# Runs the tests of the CPU kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
# Usage: run.sh PYTHON [options for pytest]. The build has its own cache; needs GCC.
set -eu

python=$1
shift
cd "$(dirname "$0")/../.."

compiler=${CXX:-g++}
runtime=$("$compiler" -print-file-name=libasan.so)
if [ ! -e "$runtime" ]; then
    echo "sanitize: $compiler has no libasan.so; on Debian and Ubuntu: apt install libasan8" >&2
    exit 1
fi

export MOH_CPU_FLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
export MOH_CACHE_DIR="${MOH_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/moh}/sanitize"
# No check for leaks: Python and torch leave memory to the system at exit.
export ASAN_OPTIONS="detect_leaks=0:abort_on_error=0:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
export PYTHONMALLOC=malloc

# AddressSanitizer must load before Python and torch, and looks for libstdc++ then, which Python has not loaded yet.
preload="$runtime $("$compiler" -print-file-name=libstdc++.so.6)"

# The build comes first, by itself: it may take longer than a test is allowed to.
export MOH_CPU_IMITATE_AMX="${MOH_CPU_IMITATE_AMX:-1}"
LD_PRELOAD="$preload" PYTHONPATH="$PWD/src" "$python" -c "from moh.attention import cpu; cpu.instruction_sets()"

# Without capturing: a finding ends the process, and a captured report would be lost. Inductor's own C++ is left out.
LD_PRELOAD="$preload" "$python" -m pytest tests/attention/test_cpu_backend.py tests/attention/test_projections.py tests/attention/test_decode_layer.py tests/attention/test_decode_mlp.py tests/attention/test_attention_conformance.py \
    tests/models/test_transnext_attention.py \
    -k "not inductor and not sdpa and not -reference" --capture=no -p no:faulthandler "$@"
