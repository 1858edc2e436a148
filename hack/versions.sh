# shellcheck shell=bash disable=SC2034
# Pinned versions of everything that the cluster tooling fetches or builds. A change of a version
# changes the cache key, so that only what depends on it is made again.

KIND_VERSION=0.33.0
KUBERNETES_VERSION=1.34.4
HELM_VERSION=3.19.5
ETCD_VERSION=3.6.16
COREDNS_VERSION=1.14.7
CONTAINERD_VERSION=2.3.7
RUNC_VERSION=1.5.2

# kubectl where it is downloaded: the release that goes with kind's own default node image.
KUBECTL_DOWNLOAD_VERSION=1.37.0

# Oldest versions that are taken from PATH instead.
KIND_MINIMUM=0.30.0
KUBECTL_MINIMUM=1.33.0
HELM_MINIMUM=3.14.0

DEBIAN_SUITE=bookworm
BASE_IMAGE=debian:bookworm-slim
