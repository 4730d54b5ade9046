# The scripts and what they need, to train, sample or serve (README.md, 'Launch elsewhere'):
#
#   docker build -t flatgpt .                                # CPU
#   docker build -t flatgpt:cuda --build-arg TORCH=cu130 .   # CUDA 13.0; also cu126, cu128 ...

FROM python:3.12.13-slim-bookworm

# torch.compile needs a C compiler, and pays on GPUs only
ARG TORCH=cpu
# hadolint ignore=DL3008
RUN if [ "$TORCH" != cpu ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && \
      rm -rf /var/lib/apt/lists/*; \
    fi

# What changes seldom comes first: a new version of the scripts leaves these layers as they are
WORKDIR /app
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install torch==2.13.0 --index-url "https://download.pytorch.org/whl/$TORCH"
COPY launch/requirements.txt launch/
RUN --mount=type=cache,target=/root/.cache/pip pip install -r launch/requirements.txt

# The user owns what is written to, and so a new volume that is mounted there
RUN useradd --create-home --uid 1000 flatgpt && install -d -o flatgpt -g flatgpt out
COPY --chown=flatgpt data data
COPY web web
COPY config config
COPY *.py ./
USER 1000
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1

# For the server; other commands leave it out with --no-healthcheck
EXPOSE 8000
HEALTHCHECK --start-period=2m CMD ["python", "-c", \
  "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]

ENTRYPOINT ["python"]
CMD ["api.py", "--host=0.0.0.0"]
