# Trains and samples: docs/containers.md. CUDA's libraries come with torch, so the smallest CUDA image is enough.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Ubuntu's mirrors keep the newest versions only, so none is pinned here. DeepSpeed compiles with g++ and libaio.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libaio-dev numactl procps python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /neoflix
ENV PATH=/neoflix/.venv/bin:$PATH PIP_NO_CACHE_DIR=1
COPY requirements.txt launch.sh ./
RUN ./launch.sh --setup-only

# CPU Adam and NVMe offload (AIO), compiled once. DeepSpeed compiles for the processor of this machine
# (-march=native), and the image must run on others: the last option wins, and x86-64-v3 is AVX2 (2013 and newer).
# It looks for libaio only where it finds a CUDA toolkit, so the linker gets it by name.
RUN printf '#!/bin/sh\nexec g++ "$@" -march=x86-64-v3 -U__AVX512__ -D__AVX256__\n' >/usr/local/bin/portable-g++ \
    && chmod +x /usr/local/bin/portable-g++ \
    && CXX=portable-g++ LDFLAGS='-Wl,--no-as-needed -laio' \
       DS_ACCELERATOR=cuda DS_BUILD_CPU_ADAM=1 DS_BUILD_AIO=1 \
       pip install --force-reinstall --no-deps --no-build-isolation "$(grep -o '^deepspeed==[^ ]*' requirements.txt)" \
    && rm /usr/local/bin/portable-g++

COPY . .

# Any user may run it (docker run --user): what it writes goes to these two folders, which are meant to be mounted.
RUN mkdir --mode=1777 results /cache
ENV HOME=/cache XDG_CACHE_HOME=/cache TORCH_EXTENSIONS_DIR=/cache/torch_extensions
USER 1000:1000

# SIGTERM to launch.sh saves a checkpoint: give it time (docker run --stop-timeout 600).
ENTRYPOINT ["/neoflix/launch.sh"]
