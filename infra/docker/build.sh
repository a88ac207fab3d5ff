#!/usr/bin/env bash
# Builds the images that clusters run, under the names of cluster/: mmdistill:VERSION-gpu, mmdistill:VERSION-cpu, and MLflow's.
#   infra/docker/build.sh [--push REGISTRY] [gpu|cpu|mlflow ...]        by default all three
# TORCH_CPU names an index of torch's CPU builds; without it the cpu image carries CUDA as well, and is as large as the other.
# REGISTRY: what stands before /mmdistill, such as `terraform -chdir=infra/terraform output -raw registry` tells. Log in first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
mlflow=$(sed -n "s/^RUN pip .*mlflow\[auth\]==\([0-9.]*\)'.*/\1/p" infra/mlflow/Dockerfile)
registry=''
if [ "${1:-}" = --push ]; then
    registry=${2:?--push wants a registry}
    shift 2
fi
[ $# -gt 0 ] || set -- gpu cpu mlflow

for what in "$@"; do
    case $what in
        gpu) name=mmdistill:$version-gpu
            docker build --file infra/docker/Dockerfile --tag "$name" . ;;
        cpu) name=mmdistill:$version-cpu
            docker build --file infra/docker/Dockerfile --tag "$name" --build-arg "TORCH=torch${TORCH_CPU:+ --index-url $TORCH_CPU}" . ;;
        mlflow) name=mmdistill-mlflow:$mlflow
            docker build --tag "$name" infra/mlflow ;;
        *) echo "build.sh: $what: gpu, cpu or mlflow" >&2; exit 1 ;;
    esac
    [ -z "$registry" ] || { docker tag "$name" "$registry/$name"; docker push "$registry/$name"; }
done
