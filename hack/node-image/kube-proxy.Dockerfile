# kube-proxy with the packet filter tools that it calls. Built by hack/node-image.sh.
FROM debian:bookworm-slim
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      conntrack iptables kmod nftables \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/*
COPY kube-proxy /usr/local/bin/kube-proxy
