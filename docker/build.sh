#!/usr/bin/env bash
# Build the image without Docker, and without an image registry: buildah runs the Dockerfile, on a Debian that mmdebstrap
# makes. It differs from Docker's image in the base alone: Debian's packages of today, not those of the pinned digest.
#
#   apt-get install buildah mmdebstrap
#   sudo docker/build.sh --build-arg TORCH=cpu
#   container=$(sudo buildah from chateau) && sudo buildah run --isolation chroot "$container" -- tini -- docker/entrypoint make demo
set -euo pipefail
cd "$(dirname "$0")/.."
from=$(sed -n 's/^FROM \(debian:[^ ]*\) AS .*/\1/p' docker/Dockerfile)
if ! buildah inspect --type image chateau-base >/dev/null 2>&1; then
    release=${from#debian:}
    tar=$(mktemp) && trap 'rm -f "$tar"' EXIT
    mmdebstrap --quiet --format=tar --variant=minbase "${release%%-*}" - >"$tar"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$tar" / >/dev/null
    buildah commit --quiet --rm "$container" chateau-base >/dev/null
fi
# --format docker: the other format has no SHELL and no HEALTHCHECK. chroot: needs no rights to make namespaces.
buildah build --isolation chroot --format docker --pull-never --build-arg EXTRAS=packages \
    --build-context "$from=container-image://localhost/chateau-base" \
    --file docker/Dockerfile --tag chateau "$@" .
