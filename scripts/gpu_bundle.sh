#!/usr/bin/env bash
# scripts/gpu_bundle.sh FOLDER    everything that a GPU machine without package registries lacks, under 60 MiB
#
# For Python 3.12 with torch (CUDA 13), triton, transformers and what these bring: all else that serving and
# `make gpu-check` import is in it. There:
#
#   mkdir site && for part in FOLDER/*.tar.xz; do tar -C site -xJf "$part"; done
#   SITE=$PWD/site . FOLDER/env.sh && python3 -m pdserve.bench.gpu
#
# FlashInfer comes with its Python, the sources and headers of the kernels that we call, and no compiled ones: the
# machine's own nvcc builds them at the first call, some minutes on 16 cores. Compiled ones of an earlier run
# ($FLASHINFER_WORKSPACE_BASE there) are taken along: PREBUILT=that folder scripts/gpu_bundle.sh FOLDER
set -euo pipefail
out=$(realpath -m "${1:?usage: scripts/gpu_bundle.sh FOLDER}")
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
limit_bytes=$((60 << 20))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"

fetch() { # fetch FOLDER REQUIREMENT...: wheels for Python 3.12 on Linux
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_34_x86_64 --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$1" "${@:2}"
}
pack() { tar --sort=name --owner=0 --group=0 --mtime=@0 -C "$1" -cf - . | xz -6 -T0 >"$2"; }

mapfile -t flashinfer < <(grep -v '^#' "$root/requirements/gpu.txt")
mapfile -t ucx < <(sed -nE 's/^((lib)?(ucx|ucxx|rmm)|rapids-logger)(-cu12)?==/\1\4==/p' "$root/requirements/serve.txt" | sed 's/-cu12/-cu13/')
mapfile -t nixl < <(grep -v '^#' "$root/requirements/nixl.txt" | sed 's/-cu12/-cu13/')
# In the versions that were tried: generated code refuses an older protobuf or grpcio than it was made with. But what the
# machine's transformers was installed with stays: it refuses other versions.
there='torch|numpy|sympy|mpmath|networkx|hf-xet|huggingface_hub|tokenizers|safetensors|fsspec|filelock|packaging|tqdm|PyYAML'
mapfile -t serve < <(grep -vE "^(#|($there)=|cuda-)" "$root/requirements/serve.txt" |
  grep -vE '^((lib)?(ucx|ucxx|rmm)|rapids-logger)(-cu12)?==')
fetch "$work/flashinfer" "${flashinfer[@]}"
fetch "$work/ucx" "${ucx[@]}"
fetch "$work/nixl" "${nixl[@]}"
fetch "$work/serve" "${serve[@]}"

for part in flashinfer ucx nixl serve; do
  "$python" "$root/scripts/trim_wheels.py" "$work/site_$part" "$work/$part"/*.whl
done
if [ -n "${PREBUILT:-}" ]; then
  while read -r library; do
    name=$(basename "$library" .so)
    install -D "$library" "$work/site_flashinfer/flashinfer/data/aot/$name/$name.so"
  done < <(find "$PREBUILT" -path '*/cached_ops/*' -name '*.so')
fi
# nvcc links against the driver's library, which a machine may have without a name to link by.
mkdir -p "$work/site_flashinfer/stubs"
echo 'int pdserve_cuda_stub;' | cc -shared -fPIC -Wl,-soname,libcuda.so.1 -x c - -o "$work/site_flashinfer/stubs/libcuda.so"
for part in flashinfer ucx nixl serve; do
  pack "$work/site_$part" "$out/$part.tar.xz"
done
tar -C "$root" --exclude '*.pyc' --exclude __pycache__ -cJf "$out/pdserve.tar.xz" pdserve kvstore router loadtest

cat >"$out/env.sh" <<'ENV'
# Source with SITE set to the folder that the archives were unpacked into.
export PYTHONPATH=${SITE:?}${PYTHONPATH:+:$PYTHONPATH}
export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$SITE/cache} FLASHINFER_USE_CUDA_NORM=1 FLASHINFER_NO_DOWNLOAD=1
cuda=$(python3 -c "import nvidia, os; print(os.path.join(list(nvidia.__path__)[0], 'cu13'))" 2>/dev/null || true)
# Headers of cuBLAS and cuRAND come with torch, and so does the run-time library of what is built.
[ -d "$cuda/include" ] && export FLASHINFER_EXTRA_CUDAFLAGS="-isystem $cuda/include"
[ -d "$cuda/lib" ] && export LD_LIBRARY_PATH="$cuda/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export FLASHINFER_EXTRA_LDFLAGS="-L$SITE/stubs"
[ -z "${CUDA_HOME:-}" ] && [ -x /usr/local/cuda/bin/nvcc ] && export CUDA_HOME=/usr/local/cuda
true
ENV

size=$(du -sb "$out" | cut -f1)
echo "$out: $((size >> 20)) MiB"
[ "$size" -le "$limit_bytes" ] || { echo "it is larger than $((limit_bytes >> 20)) MiB" >&2; exit 1; }
