# anybatch on CPUs, as a command. Build from a checkout or an unpacked source archive:
#   docker build -t anybatch .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" anybatch train --data pairs.csv --model MODEL
# For GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126, and docker run --gpus all.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
# torch goes first and alone, as in the Makefile: with its pin in place nothing below can pull another build of it.
RUN python -m venv /opt/anybatch \
    && /opt/anybatch/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
    && grep -v '^torch==' constraints.txt > others.txt \
    && /opt/anybatch/bin/pip install --no-cache-dir -c others.txt '.[demo]'

FROM python:3.11-slim
# PyTorch's CPU build needs OpenMP's library; libgomp1 is 0.4 MB.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/anybatch /opt/anybatch
RUN useradd --create-home anybatch && mkdir /work && chown anybatch /work
ENV PATH=/opt/anybatch/bin:$PATH HF_HOME=/tmp/huggingface NUMBA_CACHE_DIR=/tmp/numba PYTHONUNBUFFERED=1
USER anybatch
WORKDIR /work
ENTRYPOINT ["anybatch"]
CMD ["--help"]
